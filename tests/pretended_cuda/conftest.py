"""The smallest data that there are negatives in."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpfean.config import SyntheticConfig
from cpfean.data.synthetic import write_synthetic


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    sizes = SyntheticConfig(
        train_images=4, dev_images=3, test_images=3, num_regions=8, feature_dim=16
    )
    write_synthetic(folder, sizes)
    return folder
