"""All that touches MLflow.

A sweep is a parent run, each trial a child of it; a single training is one run without a parent.
Runs are found by their tags, so that a restarted driver writes on instead of starting a second run.
One background thread of the driver is the only writer. It is handed records, and from the record
and from what MLflow already has it works out what is missing: no step and no file is sent twice,
and a server that is away neither stalls nor stops the training. What a server refuses for one run
is told with the reason, put aside and asked again later; the other runs go on. So do numbers where
files are not taken.

MLflow knows RUNNING, FINISHED, FAILED and KILLED. A trial that was stopped because others were
better is FINISHED: it did what was asked of it. The tag `cpfean.state` tells the whole truth:
running, finished, pruned, failed or interrupted (KILLED, and run on by --resume). Of a run that is
RUNNING the tag `cpfean.heartbeat` tells when its driver last lived, by the driver's clock.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean import commands
from cpfean.errors import message_of
from orchestration.settings import ServiceError
from orchestration.study.records import TrialRecord
from orchestration.tracking.address import shown, sqlite_file, without_password
from orchestration.tracking.stores import (
    ExperimentDeletedError,
    FilesElsewhereError,
    check_keeps_files,
    check_lives,
    experiment_of,
    open_store,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HEARTBEAT_TAG = "cpfean.heartbeat"
HEARTBEAT_SECONDS = 60.0
_STATUS = {
    "waiting": "RUNNING",
    "running": "RUNNING",
    "finished": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_PARENT_TAG = "mlflow.parentRunId"
_PLACES = {"data.path", "model.text.encoder"}  # may change between two drivers of a study
_CONFIG_TAG = "cpfean.file.config.toml"
_LIBRARIES = ("torch", "transformers", "ray", "optuna", "mlflow", "numpy", "cpfean")
_RETRY_SECONDS = 15.0
_REFUSED_SECONDS = 60.0  # what was refused may have been mended: a run restored, say
_AWAY_SECONDS = 5.0  # the end of a study waits no longer for a tracker that has not answered
_IN_A_BATCH = 1000  # metrics; MLflow takes no more
_NOT_NOW = (401, 403, 408, 429)  # answers that are about the server, not about the run


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
        self._with_config: set[int] = set()
        self._refused: dict[_Subject, float] = {}
        self._aside: list[_Task] = []
        self._asked_again = False
        self._greeted = self._has_met = False
        self._closing = False
        self._ended = False
        self._away = False
        self._told: set[object] = set()
        self._is_deleted = False
        self._files_kept: bool | None = None
        self._current: _Task | None = None
        self._last_try = False
        self._client: MlflowClient | None = None
        self._experiment_id = ""
        self._parent_id = ""
        self._described = False
        self._run_ids: dict[int, str] = {}
        self._runs: dict[int, _Known] = {}
        self._last_steps: dict[int, int] = {}
        self._open_runs: set[str] = set()
        self._next_beat = 0.0
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def start(self) -> None:
        """Starts the writer. MLflow is imported here: importing it beside Ray can deadlock.

        Raises:
            ServiceError: MLflow is not installed.
        """
        try:
            import mlflow  # noqa: F401
        except ModuleNotFoundError as error:
            line = commands.pip_install("mlflow[auth]")
            raise ServiceError(f"MLflow is not installed ({error}): `{line}`") from None

        # What they log as errors reaches us as exceptions.
        for library in ("mlflow", "alembic", "sqlalchemy"):
            logging.getLogger(library).setLevel(logging.CRITICAL)
        self._thread.start()

    def meet(self, *, seconds: float) -> None:
        """Waits until the tracker has answered for the first time, or not; no longer than this.

        What is wrong with it is told by then, before hours are spent on a training.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has_met, timeout=seconds)

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
        """Waits until all is sent, but no longer than this; not for a tracker that is away.

        Tells the user what is not sent.

        Returns:
            Whether all is sent. What is not is in the records and goes out with the next resume.
        """
        began = time.monotonic()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            # A heartbeat that hangs is not waited for.
            while self._thread.is_alive() and not self._ended and not self._done():
                patience = min(seconds, _AWAY_SECONDS) if self._away else seconds
                left = began + patience - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            done = self._done()
            unsent = self._unsent()
        if unsent:
            self._say(f"tracking: {unsent} are not sent; they are kept in the records.")
        return done

    @property
    def first(self) -> str:
        """What has to come before a resume that sends the rest; empty if it needs nothing."""
        return "once that is mended, " if self._refused or self._is_deleted else ""

    def _done(self) -> bool:
        return self._current is None and not (
            self._pending or self._files or self._parent is not None or self._aside
        )

    def _unsent(self) -> str:
        """Epochs and files of the records that MLflow is not known to have; empty if it has all."""
        held = [*self._aside, *self._files, self._current]
        records = {task.number: task for task in held if isinstance(task, TrialRecord)}
        epochs = sum(
            max(0, record.epochs - self._last_steps.get(number, 0))
            for number, record in (records | self._pending).items()
        )
        files = [name for task in held if isinstance(task, _Files) for name in task.names]
        parts = [f"{epochs} epoch(s)"] if epochs else []
        if files:
            named = ", ".join(dict.fromkeys(files[:3]))
            parts.append(f"{len(files)} file(s) ({named}{', ...' if len(files) > 3 else ''})")
        return " and ".join(parts)

    def _work(self) -> None:
        while (task := self._wait()) is not None:
            try:
                self._connect()
                self._deliver(task)
                self._is_deleted = False
                self._tell_away(False)
            except _FilesError as error:
                self._put_aside(error.left, error.cause)
            # Whatever a tracker, its database or the network raises must not end the training.
            except Exception as error:
                if self._is_connected() and _is_refusal(error):
                    error = self._deleted() or error
                if self._is_connected() and _is_refusal(error):
                    self._put_aside(task, error)
                elif not self._retry(task, error):
                    break
            self._tell_met()
        with self._changed:
            self._current, self._ended, self._has_met = None, True, True
            self._changed.notify_all()

    def _deleted(self) -> ExperimentDeletedError | None:
        """What to say if our experiment was deleted, by which all is refused."""
        try:
            check_lives(self._need_client().get_experiment(self._experiment_id), self.uri)
        except ExperimentDeletedError as error:
            return error
        except Exception:  # it is not known, then
            return None
        return None

    def _tell_met(self) -> None:
        with self._changed:
            self._has_met = True
            self._changed.notify_all()

    def _wait(self) -> _Task | None:
        """The next thing to send; None when there is no more to come."""
        with self._changed:
            self._current = None
            self._changed.notify_all()
        while True:
            self._beat()
            with self._changed:
                if (task := self._next()) is not None:
                    self._current, self._last_try = task, self._closing
                    return task
                if self._closing:
                    return None
                due = min([self._next_beat, *self._refused.values()])
                self._changed.wait(max(0.0, due - time.monotonic()))

    def _beat(self) -> None:
        """Tells of each open run that its driver lives, if it is time to.

        One that does not arrive is not sent again: a minute later there is the next.
        """
        if time.monotonic() < self._next_beat:
            return
        self._next_beat = time.monotonic() + HEARTBEAT_SECONDS
        for run_id in self._open_runs:
            if self._closing:
                return
            try:
                self._need_client().set_tag(run_id, HEARTBEAT_TAG, _now())
                self._tell_away(False)
            # Whatever a tracker, its database or the network raises must not end the training.
            except Exception as error:
                if not _is_refusal(error):
                    self._tell_away(True)
                    return

    def _next(self) -> _Task | None:
        now = time.monotonic()
        self._recall({subject for subject, due in self._refused.items() if due <= now})
        while (task := self._take()) is not None:
            if _subject(task) not in self._refused:
                return task
            self._aside.append(task)
        if not (self._closing and self._aside) or self._asked_again:
            return None
        # Once more at the end, and that is all.
        self._asked_again = True
        self._recall(set(self._refused))
        return self._take()

    def _recall(self, subjects: set[_Subject]) -> None:
        """Lets what was put aside be asked once more."""
        recalled = [task for task in self._aside if _subject(task) in subjects]
        self._aside = [task for task in self._aside if _subject(task) not in subjects]
        for subject in subjects:
            del self._refused[subject]
        for task in reversed(recalled):  # of one trial's records the last is put back
            self._put_back(task)

    def _take(self) -> _Task | None:
        """Numbers before files, which are large; the end of the whole after that of its trials."""
        task: _Task
        beginning = self._parent is not None and self._parent.state == "running"
        if not self._greeted:
            self._greeted = True
            task = _Greeting()
        elif self._parent is not None and (beginning or not self._pending):
            task, self._parent = self._parent, None
        elif self._pending:
            task = self._pending.pop(next(iter(self._pending)))
        elif self._files:
            task = self._files.pop(0)
        else:
            return None
        return task

    def _put_back(self, task: _Task) -> None:
        """Unless there is later news."""
        if isinstance(task, _Greeting):
            return  # what comes next connects
        if isinstance(task, _Update):
            self._parent = self._parent or task
        elif isinstance(task, _Files):
            self._files.insert(0, task)
        else:
            self._pending.setdefault(task.number, task)

    def _put_aside(self, task: _Task, error: Exception) -> None:
        """Keeps what is refused, tells of it once, and goes on with the rest."""
        if isinstance(task, _Greeting):
            return  # what comes next is refused as well, and says so
        subject = _subject(task)
        files, number = subject
        name = self._run.name
        if not isinstance(task, _Update) and number is not None:
            record = task.record if isinstance(task, _Files) else task
            name = record.name if record is not None and self._run.has_parent else name
        seconds = _RETRY_SECONDS if files else _REFUSED_SECONDS
        with self._changed:
            self._refused[subject] = time.monotonic() + seconds
            self._aside.append(task)
            is_news = subject not in self._told
            self._told.add(subject)
        if not is_news:
            return
        if isinstance(task, _Files):
            self._say(
                f"tracking: {shown(self.uri)} does not take {', '.join(task.names)} of {name} "
                f"({self._line(error)}); numbers go on, and files are tried again meanwhile."
            )
        else:
            self._say(
                f"tracking: {shown(self.uri)} refuses {name} ({self._line(error)}"
                f"{self._remedy(number)})."
            )

    def _remedy(self, number: int | None) -> str:
        """What brings a run back that was deleted; empty if it was not."""
        run_id = self._parent_id if number is None else self._run_ids.get(number, "")
        try:
            if self._need_client().get_run(run_id).info.lifecycle_stage != "deleted":
                return ""
        except Exception:  # gone for good
            return ""
        return (
            f"; it was deleted: `{commands.restore_run(self.uri, run_id)}` brings it back, and a "
            "later --resume makes a new one with all numbers"
        )

    def _retry(self, task: _Task, error: Exception) -> bool:
        """Waits before the next try; False if there is to be none."""
        # It may have arrived although it raised: ask what is there before sending more.
        self._runs.clear()
        deleted = isinstance(error, ExperimentDeletedError)
        with self._changed:
            self._put_back(task)
            self._is_deleted = deleted
            is_news = (kind := "deleted" if deleted else "away") not in self._told
            self._told.add(kind)
        if is_news and deleted:
            self._say(
                f"tracking: {self._line(error)}; training goes on, and all is sent within a minute "
                "after that, or by a later --resume."
            )
        elif is_news:
            self._say(
                f"tracking: {shown(self.uri)} does not take our numbers ({self._line(error)}); "
                "training goes on, and they are sent when it answers, or by a later --resume."
            )
        self._tell_met()
        self._tell_away(True)
        if self._last_try:
            return False
        with self._changed:
            self._changed.wait_for(lambda: self._closing, timeout=_RETRY_SECONDS)
        return True

    def _tell_away(self, away: bool) -> None:
        with self._changed:
            self._away = away
            self._changed.notify_all()

    def _line(self, error: Exception) -> str:
        line = message_of(error)
        if "database is locked" in line and (file := sqlite_file(self.uri)):
            line = f"locked by another process, see `{commands.holders(file)}`"
        return without_password(line, self.uri)

    def _is_connected(self) -> bool:
        return self._client is not None and bool(self._parent_id or not self._run.has_parent)

    def _connect(self) -> None:
        if self._client is None:
            client, self._experiment_id = open_store(self.uri)
            if renamed := experiment_of(client, self._experiment_id, self._run.id):
                self._experiment_id = renamed.experiment_id
                self._say(
                    f"tracking: the runs of {self._run.name} are in the experiment "
                    f"{renamed.name!r}, and go on there."
                )
            self._client = client
        if self._run.has_parent and not self._parent_id:
            role = {"cpfean.kind": self._run.kind, "cpfean.role": "parent"}
            self._parent_id = self._sole_run(self._run.name, role, dict(self._run.tags))

    def _deliver(self, task: _Task) -> None:
        if isinstance(task, _Greeting):
            self._keeps_files()
        elif isinstance(task, _Update):
            self._send_parent(task)
        elif isinstance(task, _Files):
            self._send_files(task)
        else:
            self._send(task)

    def _keeps_files(self) -> bool:
        """Whether files can be sent; tells of it, once, if they cannot."""
        if self._files_kept is None:
            try:
                check_keeps_files(self._need_client(), self.uri, self._experiment_id)
                self._files_kept = True
            except FilesElsewhereError as error:
                self._files_kept = False
                self._say(f"tracking: {self._line(error)}.")
        return self._files_kept

    def _send_parent(self, update: _Update) -> None:
        client = self._need_client()
        run = client.get_run(self._parent_id)
        metrics = [
            # A number that has changed since the last driver is a further point, not a second one.
            (name, value, len(client.get_metric_history(self._parent_id, name)), _start(run))
            for name, value in update.metrics.items()
            if run.data.metrics.get(name) != value
        ]
        tags = {"cpfean.state": update.state} | update.tags
        self._log(self._parent_id, metrics=metrics, tags=tags)
        self._set_status(self._parent_id, update.state)
        self._note(self._parent_id, update.state)
        if update.state != "running":
            self._reap()
        if not self._described:
            # Where data and encoder were at first stays: MLflow takes no second value.
            told = run.data.params.keys() & _PLACES
            parameters = {n: v for n, v in self._run.parameters.items() if n not in told}
            self._log(self._parent_id, parameters=parameters)
            self._described = True

    def _send(self, record: TrialRecord) -> None:
        known = self._runs.get(record.number) or self._open(record)
        self._runs[record.number] = known
        if known.state != record.state and record.state == "running":
            self._set_status(known.run_id, record.state)
        self._note(known.run_id, record.state)
        # A point that is sent again because its answer was lost has the same time, and MLflow
        # takes the same point once.
        now = float(known.start)
        points = []
        for row in record.history:
            now += 1000 * row.get("train/seconds", 0.0)
            if int(row["epoch"]) > known.last_step:
                points.append([(name, row[name], int(row["epoch"]), int(now)) for name in row])
        size = max(map(len, points), default=1)
        each = max(1, _IN_A_BATCH // size)
        for first in range(0, len(points), each):
            # All metrics of an epoch are in one call: they arrive together or not at all.
            batch = [point for epoch in points[first : first + each] for point in epoch]
            self._log(known.run_id, metrics=batch)
            known.last_step = batch[-1][2]
            self._last_steps[record.number] = known.last_step
        if record.test and not known.tested:
            tested = [(f"test/{n}", v, record.epochs, int(now)) for n, v in record.test.items()]
            self._log(known.run_id, metrics=tested)
            known.tested = True
        if known.state != record.state:
            tags: dict[str, str] = {"cpfean.state": record.state}
            if record.drift:
                tags["cpfean.drift"] = record.drift
            if record.failure:
                tags |= {"cpfean.failure": record.failure, "cpfean.message": record.message[-4000:]}
            elif known.state == "failed":  # and is tried once more
                tags |= {"cpfean.failure": "", "cpfean.message": ""}
            self._log(known.run_id, tags=tags)
            self._set_status(known.run_id, record.state)
            known.state = record.state
        if not known.has_config and record.number not in self._with_config:
            self._with_config.add(record.number)
            with self._changed:
                self._files.insert(0, _Files((), _copy(record), with_config=True))
        # Last, since a run whose parameters somebody else has set refuses ours.
        if not known.described:
            self._log(known.run_id, parameters=record.experiment.flat())
            known.described = True

    def _send_files(self, files: _Files) -> None:
        """Sends those of which the run's tags do not say that they are there.

        Raises:
            _FilesError: some were not taken; the others are sent.
        """
        run_id = self._parent_id
        record = files.record
        if record is not None:
            self._runs[record.number] = self._runs.get(record.number) or self._open(record)
            run_id = self._runs[record.number].run_id
        client = self._need_client()
        if not self._keeps_files():
            return
        run = client.get_run(run_id)
        left: list[Path] = []
        failure: Exception | None = None
        with_config = False
        if files.with_config and record is not None and _CONFIG_TAG not in run.data.tags:
            text = record.experiment.to_toml()
            try:
                client.log_text(run_id, text, "config.toml")
            # Every kind of storage raises its own.
            except Exception as error:
                failure, with_config = error, True
            else:
                client.set_tag(run_id, _CONFIG_TAG, hashlib.sha256(text.encode()).hexdigest())
        for file in files.paths:
            if not file.is_file():
                continue
            tag = f"cpfean.file.{file.name}"
            try:
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                if run.data.tags.get(tag) == digest:
                    continue
                client.log_artifact(run_id, str(file))
            # Every kind of storage raises its own.
            except Exception as error:
                failure = failure or error
                left.append(file)
            else:
                client.set_tag(run_id, tag, digest)
        if failure is not None:
            raise _FilesError(replace(files, paths=tuple(left), with_config=with_config), failure)

    def _open(self, record: TrialRecord) -> _Known:
        """The trial's run, found or made, and what it holds."""
        client = self._need_client()
        number = record.number
        if number not in self._run_ids:
            tags = dict(self._run.tags) | {
                "cpfean.kind": self._run.kind,
                "cpfean.role": "trial",
                "cpfean.config": record.experiment.fingerprint(),
            }
            name = record.name if self._run.has_parent else self._run.name
            self._run_ids[number] = self._sole_run(name, {"cpfean.trial": str(number)}, tags)
        run_id = self._run_ids[number]
        run = client.get_run(run_id)
        # Of a study whose parent run was deleted the children follow the new one.
        if self._parent_id and run.data.tags.get(_PARENT_TAG) != self._parent_id:
            client.set_tag(run_id, _PARENT_TAG, self._parent_id)
        steps = client.get_metric_history(run_id, "val/rsum")
        # Tag and status are two calls, and a driver may be killed between them.
        state = run.data.tags.get("cpfean.state", "")
        return _Known(
            run_id=run_id,
            start=_start(run),
            last_step=max((point.step for point in steps), default=0),
            state=state if run.info.status == _STATUS.get(state) else "",
            tested=any(name.startswith("test/") for name in run.data.metrics),
            described="seed" in run.data.params,
            has_config=_CONFIG_TAG in run.data.tags,
        )

    def _reap(self) -> None:
        """Closes children that no record speaks for any more."""
        client = self._need_client()
        known = {self._parent_id, *self._run_ids.values()}
        for run in client.search_runs(
            [self._experiment_id],
            f"tags.`cpfean.id` = '{self._run.id}' and attributes.status = 'RUNNING'",
        ):
            if run.info.run_id not in known:
                client.set_tag(run.info.run_id, "cpfean.state", "interrupted")
                client.set_terminated(run.info.run_id, "KILLED")

    def _sole_run(self, name: str, key: Mapping[str, str], tags: Mapping[str, str]) -> str:
        """The run of this study that has the key, made if there is none."""
        runs = self._find(key)
        if not runs:
            made = self._create(name, dict(key) | dict(tags))
            # MLflow sends a request again whose answer was lost, and then there are two.
            runs = self._find(key)
            if not runs:
                return made
        for twin in runs[1:]:
            if not twin.data.metrics:
                self._need_client().delete_run(twin.info.run_id)
        return runs[0].info.run_id

    def _find(self, key: Mapping[str, str]) -> list[Run]:
        """The one that holds numbers first."""
        key = {"cpfean.id": self._run.id} | dict(key)
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in key.items())
        runs = self._need_client().search_runs([self._experiment_id], query)
        return sorted(runs, key=lambda r: (not r.data.metrics, _start(r), r.info.run_id))

    def _create(self, name: str, tags: Mapping[str, str]) -> str:
        # The key tags go in with the creation: a run that exists can always be found again.
        key = {"cpfean.id": self._run.id, "cpfean.sweep": self._run.name}
        tags = key | {"cpfean.state": "running", HEARTBEAT_TAG: _now()} | dict(tags)
        tags |= {"mlflow.source.name": "cpfean", "mlflow.source.type": "LOCAL", **versions()}
        if tags.get("cpfean.role") == "trial" and self._parent_id:
            tags[_PARENT_TAG] = self._parent_id
        run = self._need_client().create_run(self._experiment_id, tags=tags, run_name=name)
        return run.info.run_id

    def _set_status(self, run_id: str, state: str) -> None:
        status = _STATUS[state]
        if status == "RUNNING":
            self._need_client().update_run(run_id, status=status)
        else:
            self._need_client().set_terminated(run_id, status)

    def _note(self, run_id: str, state: str) -> None:
        """Whether the run has a heartbeat from now on."""
        if _STATUS[state] != "RUNNING":
            self._open_runs.discard(run_id)
        elif run_id not in self._open_runs:
            self._open_runs.add(run_id)
            self._next_beat = 0.0  # its last driver may be long gone

    def _log(
        self,
        run_id: str,
        *,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        parameters: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Sends what there is in one call; metrics are name, value, step and time."""
        from mlflow.entities import Metric, Param, RunTag

        self._need_client().log_batch(
            run_id,
            metrics=[
                Metric(name, float(value), when, step)
                for name, value, step, when in metrics
                if name != "epoch"
            ],
            params=[Param(name, str(value)) for name, value in (parameters or {}).items()],
            tags=[RunTag(name, str(value)) for name, value in (tags or {}).items()],
        )

    def _need_client(self) -> MlflowClient:
        assert self._client is not None
        return self._client


@dataclass(slots=True)
class _Known:
    """What MLflow is known to have of a trial."""

    run_id: str
    start: int
    last_step: int
    state: str
    tested: bool
    described: bool
    has_config: bool


@dataclass(frozen=True, slots=True)
class _Update:
    """News of the parent run."""

    state: str
    metrics: dict[str, float]
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Files:
    """Files for the run of a trial, or for the parent run; its configuration is one of them."""

    paths: tuple[Path, ...]
    record: TrialRecord | None
    with_config: bool = False

    @property
    def names(self) -> list[str]:
        return [*(["config.toml"] if self.with_config else []), *(path.name for path in self.paths)]


@dataclass(frozen=True, slots=True)
class _Greeting:
    """The first thing of all: to see whether the tracker is there."""


_Task = _Greeting | _Update | TrialRecord | _Files
_Subject = tuple[bool, int | None]


class _FilesError(Exception):
    """Files that were not taken, and why."""

    def __init__(self, left: _Files, cause: Exception) -> None:
        super().__init__(str(cause))
        self.left = left
        self.cause = cause


def _subject(task: _Task) -> _Subject:
    """Whether it is of files, and the number of the trial that it is about; None for the whole."""
    if isinstance(task, (_Greeting, _Update)):
        return False, None
    if isinstance(task, _Files):
        return True, None if task.record is None else task.record.number
    return False, task.number


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _start(run: Run) -> int:
    return int(run.info.start_time or 0)


def _copy(record: TrialRecord) -> TrialRecord:
    # The record goes on changing while the writer reads.
    fields = {name: getattr(record, name) for name in TrialRecord.__slots__}
    return TrialRecord(**fields | {"history": list(record.history)})


def _is_refusal(error: Exception) -> bool:
    """Whether the tracker has answered that it does not take this, rather than not at all."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    elif isinstance(error, HTTPError) and error.response is not None:
        status = error.response.status_code
    else:
        return False
    return 400 <= status < 500 and status not in _NOT_NOW


def tag_parent(uri: str, id: str, tags: Mapping[str, str]) -> None:
    """Adds tags to the parent run of a study that has ended.

    Args:
        id: of the study.

    Raises:
        ServiceError: the tracker does not take them.
    """
    try:
        client, experiment = open_store(uri)
        if renamed := experiment_of(client, experiment, id):
            experiment = renamed.experiment_id
        query = f"tags.`cpfean.id` = '{id}' and tags.`cpfean.role` = 'parent'"
        for run in client.search_runs([experiment], query):
            for name, value in tags.items():
                client.set_tag(run.info.run_id, name, value)
    # Whatever a tracker, its database or the network raises.
    except Exception as error:
        line = without_password(message_of(error), uri)
        raise ServiceError(f"{shown(uri)} does not take our tags: {line}") from None


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
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-c", f"safe.directory={root}", "-C", str(root), *words],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=10,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None
