"""Addresses of stores as people write them."""

import os
from pathlib import Path

import pytest

from cpfean.errors import ConfigError
from orchestration.settings import Settings
from orchestration.tracking.address import shown, sqlite_file, tracking_address


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with things that are in the way, and a home."""
    folder = tmp_path / "Übung mit Blank"
    (folder / "folder").mkdir(parents=True)
    (folder / "runs.data").write_text("")
    os.mkfifo(folder / "fifo")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    return folder


@pytest.mark.parametrize(
    ("asked", "file"),
    [
        ("sqlite:///mlflow.db", "mlflow.db"),
        ("sqlite:///./a/../mlflow.db", "a/../mlflow.db"),
        ("sqlite:///sub/my%20runs.db", "sub/my runs.db"),
        ("sqlite:///100% done.db", "100% done.db"),
        ("sqlite:///Ümläute.db", "Ümläute.db"),
        ("sqlite+pysqlite:///mlflow.db", "mlflow.db"),
        ("SQLite:///mlflow.db", "mlflow.db"),
        ("sqlite:////abs/mlflow.db", "/abs/mlflow.db"),
        ("sqlite:///~/mlflow.db", "../home/mlflow.db"),
    ],
)
def test_a_file_is_the_same_from_every_folder(
    asked: str, file: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = tracking_address(asked)
    monkeypatch.chdir("/")
    assert sqlite_file(address) == sqlite_file(tracking_address(address))
    found = sqlite_file(address)
    assert found is not None
    assert found.is_absolute()
    assert os.path.normpath(found) == os.path.normpath(here / file)


@pytest.mark.parametrize(
    "address",
    [
        "http://localhost:5000",
        "HTTPS://mlflow.example.org/path",
        "http://us:word@host:1",
        "http://[::1]:5000",
        "postgresql://us:word@host/db?sslmode=require",
        "mysql+pymysql://host/db",
        "databricks",
        "databricks://profile",
    ],
)
def test_what_is_no_file_stays_as_it_is(address: str) -> None:
    assert tracking_address(address) == address


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("localhost:5000", "did you mean http://localhost:5000?"),
        ("10.0.0.1:5000/", "did you mean http://10.0.0.1:5000/?"),
        ("[::1]:5000", "did you mean http://[::1]:5000?"),
        ("mlflow.example.org:80", "did you mean http://mlflow.example.org:80?"),
        ("http//localhost:5000", "did you mean http://localhost:5000?"),
        ("http:/localhost:5000", "did you mean http://localhost:5000?"),
        ("https:localhost", "did you mean https://localhost?"),
        ("//localhost:5000", "did you mean http://localhost:5000?"),
        ("htpp://localhost:5000", "did you mean 'http'"),
        (" http://localhost:5000", "did you mean http://localhost:5000?"),
        ("http://localhost:5000\n", "did you mean http://localhost:5000?"),
        ("http://", "names no host"),
        ("http://:5000", "names no host"),
        ("http://host:99999", "names no host and port"),
        ("http://a host:1", "names no host"),
        ("", "empty"),
        ("sqlite://", "in memory"),
        ("sqlite:///", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:///file:mlflow.db?mode=memory&uri=true", "did you mean sqlite:///mlflow.db?"),
        ("sqlite:///mlflow.db?timeout=30", "did you mean sqlite:///mlflow.db?"),
        ("sqlite:///a%3Fb/mlflow.db", "cannot hold a '?'"),
        ("sqlite:///a%2520b.db", "cannot hold a '?', nor a '%'"),
        ("sqlite:///a\0b.db", "control characters"),
        ("sqlite:mlflow.db", "did you mean sqlite:///mlflow.db?"),
        ("sqlite://mlflow.db", "did you mean sqlite:///mlflow.db?"),
        ("sqlite+aiosqlite:///mlflow.db", "did you mean sqlite:///mlflow.db?"),
        ("sqlite:///folder", "is a folder"),
        ("sqlite:///new/", "is a folder"),
        ("sqlite:///fifo", "no regular file"),
        ("mlflow.db", "did you mean sqlite:///mlflow.db?"),
        ("runs.data", "did you mean sqlite:///runs.data?"),
        ("mlruns", "keeps no runs any more"),
        ("./mlruns", "keeps no runs any more"),
        ("file:///abs/mlruns", "keeps no runs any more"),
        ("postgres://us@host/db", "did you mean postgresql://us@host/db?"),
        ("mysql:host/db", "did you mean mysql://host/db?"),
        ("ftp://host", "no stores of the kind 'ftp'"),
    ],
)
def test_what_is_no_store_is_refused_with_what_was_meant(asked: str, meant: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tracking_address(asked, asked="--store")
    assert str(refused.value).startswith("--store ")
    assert meant in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("asked", ["mlruns", "./mlruns", "file:mlruns"])
def test_a_folder_of_runs_is_absolute_where_mlflow_is_allowed_folders(
    asked: str, here: Path
) -> None:
    allowed = {"MLFLOW_ALLOW_FILE_STORE": "true"}
    assert tracking_address(asked, environment=allowed) == (here / "mlruns").as_uri()


@pytest.mark.parametrize(
    "asked", ["postgres://us:canary@host/db", "http//us:canary@host", "http://us:canary@host:99999"]
)
def test_a_password_is_in_no_refusal(asked: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tracking_address(asked)
    assert "canary" not in str(refused.value)
    assert "canary" not in shown("postgresql://host/db?password=canary&x=1")


def test_the_settings_name_where_an_address_came_from(here: Path) -> None:
    def resolve(asked: str | None, **environment: str) -> str:
        where = Settings.resolve(
            output=here / "runs", tracking_uri=asked, address="local", environment=environment
        )
        return where.tracking_uri

    assert resolve("sqlite:///mlflow.db") == f"sqlite:///{here / 'mlflow.db'}"
    assert resolve(None, MLFLOW_TRACKING_URI="sqlite:///a.db") == f"sqlite:///{here / 'a.db'}"
    assert resolve(None) == f"sqlite:///{here / 'runs' / 'mlflow.db'}"
    with pytest.raises(ConfigError, match=r"^--tracking-uri 'localhost:5000'"):
        resolve("localhost:5000")
    with pytest.raises(ConfigError, match=r"^MLFLOW_TRACKING_URI 'localhost:5000'"):
        resolve(None, MLFLOW_TRACKING_URI="localhost:5000")
    with pytest.raises(ConfigError, match=r"^--output "):
        Settings.resolve(output=here / "why?", address="local", environment={})
