import socket
from pathlib import Path

import pytest

from cpfean.errors import ConfigError
from orchestration.settings import ServiceError, Settings, check_name, running_head


def resolve(environment: dict[str, str] | None = None, **asked: str) -> Settings:
    return Settings.resolve(output=Path("runs"), environment=environment or {}, **asked)


def test_what_is_asked_for_wins_over_the_environment() -> None:
    environment = {"MLFLOW_TRACKING_URI": "http://there:5000", "RAY_ADDRESS": "head:6379"}
    assert resolve(environment).tracking_uri == "http://there:5000"
    assert resolve(environment).address == "head:6379"
    assert resolve(environment, tracking_uri="http://here:1").tracking_uri == "http://here:1"
    assert resolve(environment, address="10.0.0.1:1234").address == "10.0.0.1:1234"
    assert resolve(environment, address="local").address is None


def test_the_default_store_is_a_file_in_the_output_folder() -> None:
    assert resolve().tracking_uri == f"sqlite:///{Path('runs').absolute() / 'mlflow.db'}"


@pytest.mark.parametrize("address", ["head", "head:port", "head:99999", "http://head:1", ":6379"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        resolve(address=address)


def test_an_address_where_nothing_listens_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ServiceError, match=address):
            resolve(address=address).check_address()


def test_a_running_head_is_found_and_a_dead_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert running_head() is None
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address + "\n")
        assert running_head() == address
    assert running_head() is None


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp", "a b", "-x", "a\0", "x" * 81, "é"])
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        check_name(name)


def test_an_ordinary_name_is_taken() -> None:
    assert check_name("sweep-2026.11_b") == "sweep-2026.11_b"
