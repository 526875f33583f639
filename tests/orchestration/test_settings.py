import os
from pathlib import Path

import pytest

from cpfean.errors import ConfigError
from orchestration.settings import Settings, check_name


def resolve(environment: dict[str, str] | None = None, **asked: str) -> Settings:
    return Settings.resolve(output=Path("runs"), environment=environment or {}, **asked)


def test_what_is_asked_for_wins_over_the_environment() -> None:
    environment = {"MLFLOW_TRACKING_URI": "http://there:5000", "RAY_ADDRESS": "head:6379"}
    assert resolve(environment).tracking_uri == "http://there:5000"
    assert resolve(environment).address == "head:6379"
    assert resolve(environment, tracking_uri="http://here:1").tracking_uri == "http://here:1"
    assert resolve(environment, address="10.0.0.1:1234").address == "10.0.0.1:1234"
    assert resolve(environment, address="local").address is None
    assert resolve(environment).address_source == "RAY_ADDRESS"
    assert resolve(environment, address="10.0.0.1:1234").address_source == "--address"


@pytest.mark.parametrize("output", ["~nobody-of-this-name/runs", b"/data/\xff\xfe"])
def test_a_folder_that_cannot_be_written_down_or_found_is_refused(output: str | bytes) -> None:
    with pytest.raises(ConfigError, match="--output"):
        Settings.resolve(output=Path(os.fsdecode(output)), environment={})


def test_the_default_store_is_a_file_in_the_output_folder() -> None:
    assert resolve().tracking_uri == f"sqlite:///{Path('runs').absolute() / 'mlflow.db'}"


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp", "a b", "-x", "a\0", "x" * 81, "é"])
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        check_name(name)


def test_an_ordinary_name_is_taken() -> None:
    assert check_name("sweep-2026.11_b") == "sweep-2026.11_b"
