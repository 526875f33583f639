"""All that touches MLflow.

A sweep is a parent run, each trial a child of it; a single training is one run without a parent.
Runs are found by their tags, so that a restarted driver writes on instead of starting a second run.
One background thread of the driver is the only writer. It is handed records, and from the record
and from what MLflow already has it works out what is missing: no step and no file is sent twice,
and a server that is away neither stalls nor stops the training.

MLflow knows RUNNING, FINISHED, FAILED and KILLED. A trial that was stopped because others were
better is FINISHED: it did what was asked of it. The tag `cpfean.state` tells the whole truth:
running, finished, pruned, failed or interrupted (KILLED, and run on by --resume).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean.config import ExperimentConfig
from orchestration.records import TrialRecord
from orchestration.settings import ServiceError

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "cpfean"
_STATUS = {
    "waiting": "RUNNING",
    "running": "RUNNING",
    "finished": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_LIBRARIES = ("torch", "transformers", "ray", "optuna", "mlflow", "numpy", "cpfean")
_RETRY_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a sweep or a single training is to the tracker.

    Attributes:
        id: unique among the runs of one store, which may serve many machines.
        name: for people.
        kind: "sweep", "ablations" or "train".
        tags: beside those of the program and libraries.
        parameters: of the parent run.
    """

    id: str
    name: str
    kind: str
    tags: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_parent(self) -> bool:
        return self.kind != "train"


class Tracker:
    """Brings MLflow up to date with the records, in the background.

    Args:
        uri: of MLflow; sqlite:/// keeps artifacts beside the database.
        run: what is tracked.
        say: shows the user a line.
    """

    def __init__(self, uri: str, run: TrackedRun, *, say: Callable[[str], None]) -> None:
        self.uri = uri
        self._run = run
        self._say = say
        self._changed = threading.Condition()
        self._pending: dict[int, TrialRecord] = {}
        self._parent: _Update | None = _Update("running", {}, {}) if run.has_parent else None
        self._files: list[_Files] = []
        self._closing = False
        self._warned = False
        self._idle = True
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._parent_id = ""
        self._runs: dict[int, _Known] = {}
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        """Starts the writer. MLflow is imported here: importing it beside Ray can deadlock.

        Raises:
            ServiceError: MLflow is not installed.
        """
        try:
            import mlflow  # noqa: F401
        except ModuleNotFoundError as error:
            raise ServiceError(f"MLflow is not installed ({error}): pip install mlflow.") from None

        for library in ("mlflow", "alembic", "sqlalchemy"):
            logging.getLogger(library).setLevel(logging.ERROR)
        self._thread.start()

    def update(self, record: TrialRecord) -> None:
        """Takes note of a trial; returns at once."""
        with self._changed:
            self._pending[record.number] = _copy(record)
            self._changed.notify_all()

    def update_parent(
        self, state: str, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None
    ) -> None:
        """Takes note of the state of the whole, and of what to show on it; returns at once."""
        if self._run.has_parent:
            with self._changed:
                self._parent = _Update(state, dict(metrics), dict(tags or {}))
                self._changed.notify_all()

    def keep_files(self, files: Sequence[Path], record: TrialRecord | None = None) -> None:
        """Takes note of files to be kept with a trial, or with the whole; returns at once.

        The run's tag `cpfean.file.NAME` is the file's SHA-256: what is there is not sent again.

        Args:
            files: they stay where they are; one that is gone when its turn comes is left out.
            record: of the trial; None for the parent run, if there is one.
        """
        if files and (record is not None or self._run.has_parent):
            with self._changed:
                self._files.append(_Files(tuple(files), None if record is None else _copy(record)))
                self._changed.notify_all()

    def close(self, *, seconds: float = 60.0) -> bool:
        """Waits until all is sent, but no longer than this.

        Returns:
            Whether all is sent. What is not is in the records and goes out with the next resume.
        """
        end = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while not self._done() and self._thread.is_alive():
                left = end - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return self._done()

    def _done(self) -> bool:
        return not self._owed() and self._idle

    def _owed(self) -> bool:
        return bool(self._pending or self._files or self._parent is not None)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle = True
                self._changed.notify_all()
                while not self._owed():
                    if self._closing:
                        return
                    self._changed.wait()
                self._idle = False
                parent, self._parent = self._parent, None
                number = next(iter(self._pending), None)
                record = None if parent or number is None else self._pending.pop(number)
                # Last of all: numbers are small, and their runs exist then.
                files = self._files.pop(0) if not parent and record is None else None
            try:
                self._connect()
                if parent is not None:
                    self._send_parent(parent)
                if record is not None:
                    self._send(record)
                if files is not None:
                    self._send_files(files)
            # Whatever a tracker, its database or the network raises must not end the training.
            except Exception as error:
                self._give_back(parent, record, files)
                self._warn(error)
                with self._changed:
                    if self._closing:
                        self._idle = True
                        self._changed.notify_all()
                        return
                    self._changed.wait_for(lambda: self._closing, timeout=_RETRY_SECONDS)

    def _give_back(
        self, parent: _Update | None, record: TrialRecord | None, files: _Files | None
    ) -> None:
        # It may have arrived although it raised: ask what is there before sending more.
        self._runs.clear()
        with self._changed:
            if parent is not None and self._parent is None:
                self._parent = parent
            if record is not None:
                self._pending.setdefault(record.number, record)
            if files is not None:
                self._files.insert(0, files)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._say(
                f"tracking: {self.uri} does not take our numbers ({line[:200]}); training goes on, "
                "and they are sent when it answers, or by a later --resume."
            )

    def _connect(self) -> None:
        if self._client is not None and (self._parent_id or not self._run.has_parent):
            return
        self._client, self._experiment_id = open_store(self.uri)
        if self._run.has_parent:
            tags = {"cpfean.kind": self._run.kind, "cpfean.role": "parent"}
            found = self._find({"cpfean.id": self._run.id} | tags)
            self._parent_id = found or self._create(self._run.name, tags | dict(self._run.tags))
            self._log(self._parent_id, parameters=self._run.parameters)

    def _send_parent(self, update: _Update) -> None:
        metrics = {(name, 0): value for name, value in update.metrics.items()}
        tags = {"cpfean.state": update.state} | update.tags
        self._log(self._parent_id, metrics=metrics, tags=tags)
        self._set_status(self._parent_id, update.state)
        if update.state != "running":
            self._reap()

    def _send(self, record: TrialRecord) -> None:
        known = self._runs.get(record.number) or self._open(record)
        self._runs[record.number] = known
        if known.state != record.state and record.state == "running":
            self._set_status(known.run_id, record.state)
        for row in record.history:
            step = int(row["epoch"])
            if step > known.last_step:
                # One call for all metrics of an epoch: they arrive together or not at all.
                self._log(known.run_id, metrics={(name, step): row[name] for name in row})
                known.last_step = step
        if record.test and not known.tested:
            step = record.epochs
            test = {(f"test/{name}", step): value for name, value in record.test.items()}
            self._log(known.run_id, metrics=test)
            known.tested = True
        if known.state != record.state:
            tags: dict[str, str] = {"cpfean.state": record.state}
            if record.drift:
                tags["cpfean.drift"] = record.drift
            if record.failure:
                tags |= {"cpfean.failure": record.failure, "cpfean.message": record.message[-4000:]}
            self._log(known.run_id, tags=tags)
            self._set_status(known.run_id, record.state)
            known.state = record.state

    def _send_files(self, files: _Files) -> None:
        run_id = self._parent_id
        if files.record is not None:
            number = files.record.number
            self._runs[number] = self._runs.get(number) or self._open(files.record)
            run_id = self._runs[number].run_id
        client = self._need_client()
        tags = client.get_run(run_id).data.tags
        for file in files.paths:
            if not file.is_file():
                continue
            tag = f"cpfean.file.{file.name}"
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            if tags.get(tag) != digest:
                client.log_artifact(run_id, str(file))
                client.set_tag(run_id, tag, digest)

    def _open(self, record: TrialRecord) -> _Known:
        """The trial's run, found or made, and what it holds."""
        client = self._need_client()
        key = {"cpfean.id": self._run.id, "cpfean.trial": str(record.number)}
        run_id = self._find(key)
        if run_id is None:
            tags = dict(self._run.tags) | {
                "cpfean.kind": self._run.kind,
                "cpfean.role": "trial",
                "cpfean.trial": str(record.number),
                "cpfean.config": record.experiment.fingerprint(),
            }
            if self._parent_id:
                tags["mlflow.parentRunId"] = self._parent_id
            name = record.name if self._run.has_parent else self._run.name
            run_id = self._create(name, tags)
        data = client.get_run(run_id).data
        if "seed" not in data.params:
            self._log(run_id, parameters=record.experiment.flat())
            self._log_config(run_id, record.experiment)
        steps = client.get_metric_history(run_id, "val/rsum")
        return _Known(
            run_id=run_id,
            last_step=max((point.step for point in steps), default=0),
            state=data.tags.get("cpfean.state", ""),
            tested=any(name.startswith("test/") for name in data.metrics),
        )

    def _reap(self) -> None:
        """Closes children that no record speaks for any more."""
        client = self._need_client()
        for run in client.search_runs(
            [self._experiment_id],
            f"tags.`cpfean.id` = '{self._run.id}' and attributes.status = 'RUNNING'",
        ):
            known = {state.run_id for state in self._runs.values()}
            if run.info.run_id not in known | {self._parent_id}:
                client.set_tag(run.info.run_id, "cpfean.state", "interrupted")
                client.set_terminated(run.info.run_id, "KILLED")

    def _find(self, tags: Mapping[str, str]) -> str | None:
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        runs = self._need_client().search_runs(
            [self._experiment_id], query, max_results=1, order_by=["attributes.start_time ASC"]
        )
        return runs[0].info.run_id if runs else None

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        # The key tags go in with the creation: a run that exists can always be found again.
        key = {"cpfean.id": self._run.id, "cpfean.sweep": self._run.name}
        tags = key | {"cpfean.state": "running"} | dict(tags)
        tags |= {"mlflow.source.name": "cpfean", "mlflow.source.type": "LOCAL", **versions()}
        run = self._need_client().create_run(self._experiment_id, tags=tags, run_name=name)
        return run.info.run_id

    def _set_status(self, run_id: str, state: str) -> None:
        status = _STATUS[state]
        if status == "RUNNING":
            self._need_client().update_run(run_id, status=status)
        else:
            self._need_client().set_terminated(run_id, status)

    def _log(
        self,
        run_id: str,
        *,
        metrics: Mapping[tuple[str, int], float] | None = None,
        parameters: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        self._need_client().log_batch(
            run_id,
            metrics=[
                Metric(name, float(value), now, step)
                for (name, step), value in (metrics or {}).items()
                if name != "epoch"
            ],
            params=[Param(name, str(value)) for name, value in (parameters or {}).items()],
            tags=[RunTag(name, str(value)) for name, value in (tags or {}).items()],
        )

    def _log_config(self, run_id: str, config: ExperimentConfig) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.toml"
            file.write_text(config.to_toml(), encoding="utf-8")
            self._need_client().log_artifact(run_id, str(file))

    def _need_client(self) -> MlflowClient:
        assert self._client is not None
        return self._client


@dataclass(slots=True)
class _Known:
    """What MLflow is known to have of a trial."""

    run_id: str
    last_step: int
    state: str
    tested: bool


@dataclass(frozen=True, slots=True)
class _Update:
    """News of the parent run."""

    state: str
    metrics: dict[str, float]
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Files:
    """Files for the run of a trial, or for the parent run."""

    paths: tuple[Path, ...]
    record: TrialRecord | None


def _copy(record: TrialRecord) -> TrialRecord:
    # The record goes on changing while the writer reads.
    fields = {name: getattr(record, name) for name in TrialRecord.__slots__}
    return TrialRecord(**fields | {"history": list(record.history)})


def open_store(uri: str) -> tuple[MlflowClient, str]:
    """A client, and the id of our experiment; makes database and experiment when they are new.

    Two first openings of an empty sqlite file at once damage each other's schema: a lock beside it
    lets them in one by one. Nor can MLflow go on where a process was killed that made the tables: a
    file whose making was not completed, of which a mark tells, is made anew.

    Raises:
        ServiceError: an address that MLflow cannot use.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    file = sqlite_file(uri)
    if file is None:
        client = MlflowClient(uri)
        return client, _experiment(client, artifacts=None)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unfinished = file.with_name(f".{file.name}.unfinished")
        if unfinished.exists():
            for part in (file, file.with_name(f"{file.name}-journal")):
                part.unlink(missing_ok=True)
        if not file.exists():
            unfinished.touch()
        try:
            client = MlflowClient(uri)
            artifacts = (file.parent / f"{file.stem}-artifacts").as_uri()
            experiment = _experiment(client, artifacts=artifacts)
            unfinished.unlink(missing_ok=True)
            return client, experiment
        except MlflowException as error:
            raise ServiceError(f"{file}: cannot be used as a tracking store: {error}") from None


def tag_parent(uri: str, id: str, tags: Mapping[str, str]) -> None:
    """Adds tags to the parent run of a study that has ended.

    Args:
        id: of the study.

    Raises:
        ServiceError: the tracker does not take them.
    """
    try:
        client, experiment = open_store(uri)
        query = f"tags.`cpfean.id` = '{id}' and tags.`cpfean.role` = 'parent'"
        for run in client.search_runs([experiment], query):
            for name, value in tags.items():
                client.set_tag(run.info.run_id, name, value)
    # Whatever a tracker, its database or the network raises.
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ServiceError(f"{uri} does not take our tags: {line[:200]}") from None


def _experiment(client: MlflowClient, *, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    try:
        return client.create_experiment(EXPERIMENT, artifact_location=artifacts)
    except MlflowException:
        # Another driver was faster.
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            raise
        return found.experiment_id


def sqlite_file(uri: str) -> Path | None:
    """The file behind a sqlite address, or None for any other address."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def ui_command(uri: str) -> str:
    """What to type to look at the runs."""
    if uri.startswith(("http://", "https://")):
        return f"open {uri}"
    return f"mlflow ui --backend-store-uri {uri}"


@functools.cache
def versions() -> Mapping[str, str]:
    """Tags: the libraries' versions, and the commit if this is a checkout.

    Found out once: what a process runs does not change with the checkout.
    """
    tags = {}
    for library in _LIBRARIES:
        try:
            tags[f"version.{library}"] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    commit = git_commit()
    return tags | ({"mlflow.source.git.commit": commit} if commit else {})


def git_commit() -> str | None:
    """The commit that is checked out, with "-dirty" if files differ from it."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None
