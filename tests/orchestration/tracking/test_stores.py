"""Stores on sqlite: what is made, and what of other programs stays as it is."""

import errno
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from cpfean import commands
from cpfean.errors import ServiceError
from orchestration.tracking.stores import (
    ExperimentDeletedError,
    FilesElsewhereError,
    check_keeps_files,
    experiment_of,
    open_store,
)

# For each line "URI, WORD, NUMBER, DEED" a fork of this process, which has imported MLflow once,
# opens a store, and does something at the NUMBERth statement that has the WORD in it.
_OPENER = """
import json, os, shutil, signal, sys
import mlflow, sqlalchemy
from orchestration.tracking.stores import open_store

def opens(uri, word, number, deed):
    seen = 0

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "after_cursor_execute")
    def act(connection, cursor, statement, *_):
        nonlocal seen
        if word not in statement:
            return
        seen += 1
        if seen == number and deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif seen == number:
            shutil.copy(deed, uri.removeprefix("sqlite:///"))

    open_store(uri)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            opens(*json.loads(line))
            os._exit(0)
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Opener:
    """Another process that opens stores, and may be killed while it does."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OPENER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def opens(self, uri: str, word: str, number: int, deed: str) -> int:
        """How it ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([uri, word, number, deed]), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def opener() -> Iterator[Opener]:
    opener = Opener()
    yield opener
    opener.end()


@pytest.fixture(scope="module")
def thesis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another program keeps in its store."""
    file = tmp_path_factory.mktemp("thesis") / "thesis.db"
    client = MlflowClient(f"sqlite:///{file}")
    client.create_run(client.create_experiment("thesis"), run_name="a month of work")
    return file


def work_of(file: Path) -> list[str | None]:
    """The runs of the other program that are in a store."""
    client = MlflowClient(f"sqlite:///{file}")
    found = client.get_experiment_by_name("thesis")
    ids = [found.experiment_id] if found else []
    return [run.info.run_name for run in client.search_runs(ids)] if ids else []


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("CREATE TABLE", 1),
        pytest.param("CREATE TABLE experiment_tags", 1, marks=pytest.mark.long),
        pytest.param("UPDATE alembic_version", 20, marks=pytest.mark.long),
        pytest.param("INSERT INTO experiments", 1, marks=pytest.mark.long),
        ("INSERT INTO experiments", 2),
    ],
)
def test_whoever_is_killed_while_making_a_store_leaves_nothing_under_its_name(
    word: str, number: int, tmp_path: Path, thesis: Path, opener: Opener
) -> None:
    file = tmp_path / "mlflow.db"
    assert opener.opens(f"sqlite:///{file}", word, number, "die") == -signal.SIGKILL
    assert not file.exists()
    # Whatever another program puts there meanwhile is used and stays.
    file.write_bytes(thesis.read_bytes())
    client, experiment = open_store(f"sqlite:///{file}")
    client.create_run(experiment, run_name="ours")
    assert work_of(file) == ["a month of work"]


def test_what_a_killed_maker_has_left_is_tidied_up_and_nothing_else(
    tmp_path: Path, opener: Opener
) -> None:
    file = tmp_path / "mlflow.db"
    assert opener.opens(f"sqlite:///{file}", "CREATE TABLE", 3, "die") == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".new")] != []
    others = [".mlflow.db.unfinished", ".mlflow.db.new", ".other.db.new", "mlflow.db-journal.old"]
    for name in others:
        (tmp_path / name).write_text(name)
    client, experiment = open_store(f"sqlite:///{file}")
    assert client.search_runs([experiment]) == []
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock", *others}
    assert all((tmp_path / name).read_text() == name for name in others)


def test_a_store_that_appears_while_ours_is_made_is_used(
    tmp_path: Path, thesis: Path, opener: Opener
) -> None:
    file = tmp_path / "mlflow.db"
    assert opener.opens(f"sqlite:///{file}", "INSERT INTO experiments", 1, str(thesis)) == 0
    assert work_of(file) == ["a month of work"]
    client, experiment = open_store(f"sqlite:///{file}")
    client.create_run(experiment)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]


@pytest.mark.parametrize("mark", ["", "of a stranger"])
def test_a_mark_of_an_earlier_release_removes_nothing(
    mark: str, tmp_path: Path, thesis: Path
) -> None:
    file, beside = tmp_path / "mlflow.db", tmp_path / ".mlflow.db.unfinished"
    file.write_bytes(thesis.read_bytes())
    beside.write_text(mark)
    for _ in range(2):
        open_store(f"sqlite:///{file}")
    assert work_of(file) == ["a month of work"]
    # That release would remove the file; the mark is empty, by which it is known.
    assert beside.exists() == bool(mark)


@pytest.mark.parametrize("tables", [["photos"], ["experiments", "runs"], ["alembic_version"]])
def test_a_database_that_is_no_whole_store_is_refused_and_left_alone(
    tables: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(file)) as database:
        for table in tables:
            database.execute(f"CREATE TABLE {table} (name)")
    (tmp_path / ".mlflow.db.unfinished").touch()
    before = digest(file)
    with pytest.raises(ServiceError, match=r"no complete store of MLflow's.*move it away"):
        open_store(f"sqlite:///{file}")
    assert digest(file) == before


def test_what_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_text("my notes\n" * 1000)
    with pytest.raises(ServiceError, match="is no sqlite database"):
        open_store(f"sqlite:///{file}")
    assert file.read_text() == "my notes\n" * 1000


def test_an_empty_file_becomes_a_store_and_stays_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.touch(mode=0o600)
    inode = file.stat().st_ino
    open_store(f"sqlite:///{file}")
    assert (file.stat().st_ino, file.stat().st_mode & 0o777) == (inode, 0o600)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_leads_to_one_store_and_stays_a_link(
    exists: bool, tmp_path: Path, thesis: Path
) -> None:
    real, link = tmp_path / "disk" / "real.db", tmp_path / "mlflow.db"
    real.parent.mkdir()
    if exists:
        real.write_bytes(thesis.read_bytes())
    link.symlink_to(real)
    client, experiment = open_store(f"sqlite:///{link}")
    run = client.create_run(experiment)
    assert link.is_symlink()
    client, experiment = open_store(f"sqlite:///{real}")
    assert [found.info.run_id for found in client.search_runs([experiment])] == [run.info.run_id]
    assert work_of(real) == (["a month of work"] if exists else [])
    assert (real.parent / ".real.db.lock").exists()


def test_a_file_with_the_name_of_the_lock_keeps_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.lock").write_text("a stranger's")
    open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert (tmp_path / ".mlflow.db.lock").read_text() == "a stranger's"


def test_a_disk_without_hard_links_gets_a_store_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    client, experiment = open_store(f"sqlite:///{tmp_path / 'mlflow.db'}")
    client.create_run(experiment)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def test_a_store_may_have_any_name(tmp_path: Path) -> None:
    file = tmp_path / "a folder's 5%" / "my runs, 100% done: it's `x` of Ümläut #1.db"
    client, experiment = open_store(f"sqlite:///{file}")
    client.create_run(experiment)
    assert file.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"a folder's 5%"}


def test_a_relative_store_is_one_of_the_folder_that_we_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client, experiment = open_store("sqlite:///mlflow.db")
    location = client.get_experiment(experiment).artifact_location
    assert location == (tmp_path / "mlflow-artifacts").as_uri()
    assert (tmp_path / "mlflow.db").is_file()


@pytest.mark.long
def test_a_deleted_experiment_is_brought_back_by_the_line_that_is_told(
    tmp_path: Path, empty_store: bytes
) -> None:
    (tmp_path / "my runs.db").write_bytes(empty_store)
    uri = f"sqlite:///{tmp_path / 'my runs.db'}"
    client, experiment = open_store(uri)
    run = client.create_run(experiment)
    client.delete_experiment(experiment)
    with pytest.raises(ExperimentDeletedError, match="was deleted") as deleted:
        open_store(uri)
    assert deleted.value.line == commands.restore_experiment(uri, experiment)
    assert deleted.value.line in str(deleted.value)
    subprocess.run(["bash", "-c", deleted.value.line], check=True, capture_output=True)
    client, again = open_store(uri)
    assert again == experiment
    assert [found.info.run_id for found in client.search_runs([again])] == [run.info.run_id]


def test_the_runs_of_a_study_are_found_under_another_name_of_their_experiment(uri: str) -> None:
    client, first = open_store(uri)
    client.create_run(first, tags={"cpfean.id": "4711"})
    assert experiment_of(client, first, "4711") is None
    client.rename_experiment(first, "thesis")
    client, second = open_store(uri)
    assert second != first
    found = experiment_of(client, second, "4711")
    assert found is not None
    assert (found.experiment_id, found.name) == (first, "thesis")
    assert experiment_of(client, second, "0815") is None
    assert len(client.search_experiments(view_type=ViewType.ALL)) == 3  # and MLflow's own


def test_files_of_a_store_that_was_moved_are_not_sent_to_where_it_was(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'old' / 'mlflow.db'}"
    client, experiment = open_store(uri)
    check_keeps_files(client, uri, experiment)
    (tmp_path / "old").rename(tmp_path / "new")
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    client, experiment = open_store(uri)
    with pytest.raises(FilesElsewhereError, match="old/mlflow-artifacts, which is no more"):
        check_keeps_files(client, uri, experiment)
    # What helps.
    client.rename_experiment(experiment, "old")
    client, experiment = open_store(uri)
    check_keeps_files(client, uri, experiment)
    assert not (tmp_path / "old").exists()
