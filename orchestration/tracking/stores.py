"""Opening MLflow's stores, and what may be wrong with them.

A sqlite store is made beside its place under a name of its own, and linked to its name when it is
complete: whoever is killed meanwhile leaves nothing under that name, and a file that another
program has put there is never touched. It is used if it is a store, and left alone if it is not.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from cpfean import commands
from cpfean.errors import ServiceError, message_of
from cpfean.writing import link_first
from orchestration.tracking.address import is_web, shown, sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

EXPERIMENT = "cpfean"
PROBE_TAG = "cpfean.probe"
_LOOKED_AT = 20  # newest runs, in search of one whose files are here
_OF_A_STORE = {"alembic_version", "experiments", "runs"}  # tables that none is without


class ExperimentDeletedError(ServiceError):
    """Our experiment was deleted in MLflow's pages: it takes nothing until `line` restores it."""

    def __init__(self, experiment: Experiment, uri: str) -> None:
        self.line = commands.restore_experiment(uri, experiment.experiment_id)
        self.wrong = f"the experiment {experiment.name!r} of {shown(uri)} was deleted"
        self.fix = f"`{self.line}`; then --resume sends what is missing"
        super().__init__(f"{self.wrong}, and takes nothing until it is restored: `{self.line}`")


class FilesElsewhereError(ServiceError):
    """Files would land on this machine's disk, where nobody looks for them."""

    def __init__(self, why: str, fix: str = "") -> None:
        self.wrong = f"{why}: numbers are sent, files are not"
        self.fix = (
            f"{fix}rename the experiment {EXPERIMENT!r} in MLflow's pages, since one that exists "
            "keeps its place: the next study makes a new one"
        )
        super().__init__(f"{self.wrong}. What helps: {self.fix}")


def open_store(uri: str, *, lock_seconds: float = 30.0) -> tuple[MlflowClient, str]:
    """A client, and the id of our experiment; makes database and experiment when they are new.

    Two first openings of an empty sqlite file at once damage each other's schema: a lock beside it
    lets them in one by one.

    Raises:
        ServiceError: an address or a file that cannot be used, or ExperimentDeletedError.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    file = sqlite_file(uri)
    if file is None:
        client = MlflowClient(uri)
        return client, _experiment(client, uri, artifacts=None)
    # By whatever link it is called, there is one file, and one lock.
    real = Path(os.path.realpath(file))
    artifacts = (file.parent / f"{file.stem}-artifacts").as_uri()
    try:
        with _alone(real, seconds=lock_seconds):
            if not real.exists():
                _make(real, artifacts=artifacts)
            check_is_store(real)
            client = MlflowClient(f"sqlite:///{file}")
            experiment = _experiment(client, uri, artifacts=artifacts)
            _remove_old_mark(real)
            return client, experiment
    except OSError as error:
        raise ServiceError(f"{real}: cannot be written or opened: {error}") from None
    except MlflowException as error:
        raise ServiceError(f"{file}: cannot be used as a store: {message_of(error)}") from None


def _make(file: Path, *, artifacts: str) -> None:
    """Makes a store with our experiment in it; one that somebody else has made meanwhile stays."""
    from mlflow import MlflowClient

    pattern = re.compile(rf"\.{re.escape(file.name)}\.[0-9a-f]{{32}}\.new(-journal|-wal|-shm)?")
    # No other process of ours is making one now: who made these was killed.
    for left in file.parent.iterdir():
        if pattern.fullmatch(left.name) and left.is_file():
            left.unlink()
    new = file.with_name(f".{file.name}.{uuid.uuid4().hex}.new")
    try:
        _experiment(MlflowClient(f"sqlite:///{new}"), "", artifacts=artifacts)
        with suppress(FileExistsError):
            link_first(new, file)
    finally:
        new.unlink(missing_ok=True)


def check_is_store(file: Path) -> None:
    """Raises ServiceError for a database of another program, or one whose making was cut off."""
    try:
        if file.stat().st_size == 0:
            return
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in rows}
    except sqlite3.OperationalError:
        return  # it is locked, or has to be mended first: MLflow waits, or says so
    except sqlite3.DatabaseError as error:
        raise ServiceError(f"{file}: is no sqlite database ({error}); name another file.") from None
    except OSError as error:
        raise ServiceError(f"{file}: cannot be read: {error}") from None
    if tables and not tables >= _OF_A_STORE:
        names = ", ".join(sorted(tables)[:5])
        raise ServiceError(
            f"{file}: is no complete store of MLflow's (it has the tables {names}), and nothing in "
            "it was changed. Either it belongs to another program: name another file; or the "
            "process that made it was killed: move it away if nobody needs it, and a new one is "
            "made."
        )


def _remove_old_mark(file: Path) -> None:
    """Of releases that marked a database while they made it, and removed it where a mark was left.

    The database is whole; one of those must not take it away. The mark is empty, and ours by that.
    """
    mark = file.with_name(f".{file.name}.unfinished")
    with suppress(OSError):
        if mark.is_file() and not mark.is_symlink() and mark.stat().st_size == 0:
            mark.unlink()


@contextmanager
def _alone(file: Path, *, seconds: float) -> Iterator[None]:
    """Keeps other processes from opening a database at the same time."""
    beside = file.with_name(f".{file.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    # Nothing is written to it, whosever file it is.
    lock = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise ServiceError(
                        f"{file}: another process has been opening it for {seconds:.0f} s; "
                        f"see `{commands.holders(beside)}`."
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(lock)


def _experiment(client: MlflowClient, uri: str, *, artifacts: str | None) -> str:
    """The id of our experiment, which is made if there is none; raises as `check_lives`."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        except MlflowException:
            # Another driver was faster.
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    check_lives(found, uri)
    return found.experiment_id


def check_lives(experiment: Experiment, uri: str) -> None:
    """Raises ExperimentDeletedError if an experiment was deleted."""
    if experiment.lifecycle_stage == "deleted":
        raise ExperimentDeletedError(experiment, uri)


def experiment_of(client: MlflowClient, experiment: str, study: str) -> Experiment | None:
    """The experiment other than ours that has the runs of a study: ours under an earlier name."""
    query = f"tags.`cpfean.id` = '{study}'"
    if client.search_runs([experiment], query, max_results=1):
        return None
    others = _others(client)
    runs = client.search_runs(list(others), query, max_results=1) if others else []
    return others[runs[0].info.experiment_id] if runs else None


def experiments_of_ours(client: MlflowClient, experiment: str) -> dict[str, str]:
    """Names, by id, of our experiment and of others that have runs of ours: it was renamed, say."""
    others = _others(client)
    query = "tags.`cpfean.id` LIKE '%'"
    runs = client.search_runs(list(others), query, max_results=1000) if others else []
    found = sorted({run.info.experiment_id for run in runs})
    return {experiment: EXPERIMENT} | {id: others[id].name for id in found}


def _others(client: MlflowClient) -> dict[str, Experiment]:
    """All experiments that live, by id, but for ours."""
    found: dict[str, Experiment] = {}
    token = None
    while True:
        page = client.search_experiments(filter_string=f"name != '{EXPERIMENT}'", page_token=token)
        found |= {experiment.experiment_id: experiment for experiment in page}
        token = page.token
        if not token:
            return found


def check_keeps_files(client: MlflowClient, uri: str, experiment: str) -> None:
    """Raises FilesElsewhereError if files would be written where nobody looks for them.

    Those of a server are where it looks for them if it shares this machine's disk, which is taken
    for granted only if both see the same files of an earlier run. Those of a database that was
    moved would go to where it was made.
    """
    location = client.get_experiment(experiment).artifact_location or ""
    if urlsplit(location).scheme not in ("", "file"):
        return
    if not is_web(uri):
        folder = Path(unquote(urlsplit(location).path))
        if sqlite_file(uri) is not None and not folder.parent.is_dir():
            raise FilesElsewhereError(
                f"{shown(uri)} was made elsewhere, and has its files in {folder}, which is no more"
            )
        return
    for run in client.search_runs([experiment], max_results=_LOOKED_AT):
        folder = Path(unquote(urlsplit(run.info.artifact_uri or "").path))
        files = folder.iterdir() if folder.is_absolute() and folder.is_dir() else ()
        if here := {file.name: file.stat().st_size for file in files if file.is_file()}:
            if here == _listed(uri, run.info.run_id):
                return
            break
    raise FilesElsewhereError(
        f"{shown(uri)} has its files in {location}, a folder of the server's own disk, "
        "which cannot be reached from here",
        "start the server with --serve-artifacts and --artifacts-destination FOLDER "
        "(experiments/tracking_server.py does), and ",
    )


def _listed(uri: str, run: str) -> dict[str, int]:
    """The sizes of a run's files, by name, as its server sees them."""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    path = "/api/2.0/mlflow/artifacts/list"
    answer = http_request(get_default_host_creds(uri), path, "GET", params={"run_id": run})
    files = answer.json().get("files", []) if answer.ok else []
    return {file["path"]: int(file.get("file_size", 0)) for file in files if not file["is_dir"]}


def try_out(uri: str) -> tuple[MlflowClient, str]:
    """Writes a run with a number, a tag and a file, reads them, and removes them again.

    MLflow keeps what is deleted until `mlflow gc`: each machine has one deleted run of this kind,
    which is taken again the next time. Client and experiment are given, as by `open_store`.

    Raises:
        ServiceError: what is not taken; as one of the kinds above, with what mends it.
    """
    client, experiment = open_store(uri)
    run = _probe(client, experiment)
    try:
        client.log_metric(run.info.run_id, "probe", 1.0, step=int(time.time()))
        client.set_tag(run.info.run_id, "cpfean.state", "finished")
        check_keeps_files(client, uri, experiment)
        _try_file(client, run)
        client.set_terminated(run.info.run_id, "FINISHED")
    finally:
        client.delete_run(run.info.run_id)
    return client, experiment


def _probe(client: MlflowClient, experiment: str) -> Run:
    """The run of this machine that writing is tried with, brought back or made."""
    from mlflow.entities import ViewType

    host = re.sub(r"[^A-Za-z0-9._-]", "-", os.uname().nodename)
    query = f"tags.`{PROBE_TAG}` = '{host}'"
    for found in client.search_runs([experiment], query, run_view_type=ViewType.ALL, max_results=1):
        if found.info.lifecycle_stage == "deleted":
            client.restore_run(found.info.run_id)
        return found
    return client.create_run(experiment, tags={PROBE_TAG: host}, run_name="doctor")


def _try_file(client: MlflowClient, run: Run) -> None:
    """Sends a file and takes it away; raises ServiceError if it is not taken or given back."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    name, text = "probe.txt", uuid.uuid4().hex
    try:
        client.log_text(run.info.run_id, text, name)
        with tempfile.TemporaryDirectory() as folder:
            back = client.download_artifacts(run.info.run_id, name, folder)
            same = Path(back).read_text(encoding="utf-8") == text
    # Every kind of storage raises its own.
    except Exception as error:
        where = run.info.artifact_uri
        raise ServiceError(
            f"numbers are taken, files are not ({message_of(error)}); they go to {where}"
        ) from None
    # Some kinds of storage remove nothing: the next probe writes over it.
    with suppress(Exception):
        get_artifact_repository(run.info.artifact_uri).delete_artifacts(name)
    if not same:
        raise ServiceError(f"{run.info.artifact_uri} does not give back the file that was sent")
