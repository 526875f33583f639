"""The tiny data and configuration that trainings are tested with."""

from tests.training.conftest import data_folder, tiny_config

__all__ = ["data_folder", "tiny_config"]
