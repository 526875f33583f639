"""What MLflow gets of a study: a sink that compares each record with what the run has already.

No step and no file is sent twice, by whichever driver. Runs are found by their tags, so that a
restarted driver writes on instead of starting a second run. What a server refuses for one run is
told with the reason and what mends it. So are files that are not taken, without their numbers.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean import commands
from cpfean.errors import ServiceError, message_of
from cpfean.fingerprints import listing
from cpfean.records.trial_record import TrialRecord
from orchestration.study.follower import RefusedError, ShutError, StudyNews
from orchestration.tracking import models, stores
from orchestration.tracking.address import shown, sqlite_file, without_password
from orchestration.tracking.runs import (
    HEARTBEAT_SECONDS,
    STATE_TAG,
    STATUS,
    Runs,
    TrackedRun,
    is_refusal,
    start_of,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

_CONFIG = "config.toml"
_FILE_TAG = "cpfean.file."  # and the name; the value is the file's SHA-256
_IN_A_BATCH = 1000  # metrics; MLflow takes no more
_PLACES = {"data.path", "model.text.encoder"}  # may change between two drivers of a study


class MlflowSink:
    """Brings MLflow up to date with the records; a `Sink`.

    Args:
        uri: of MLflow; sqlite:/// keeps artifacts beside the database.
        opens: gives a client and the id of our experiment.
    """

    name = "tracking"
    names_resume = False

    def __init__(
        self,
        uri: str,
        study: TrackedRun,
        *,
        say: Callable[[str], None],
        beat_seconds: float = HEARTBEAT_SECONDS,
        opens: Callable[[str], tuple[MlflowClient, str]] = stores.open_store,
    ) -> None:
        self.uri = uri
        self._study = study
        self._say = say
        self._beat_seconds = beat_seconds
        self._opens = opens
        self._runs: Runs | None = None
        self._is_open = False
        self._keeps_files = True
        self._is_described = False
        self._trials: dict[int, _TrialRun] = {}
        self._not_taken: dict[int | None, list[str]] = {}

    def load(self) -> None:
        """Imports MLflow here: importing it beside Ray can deadlock."""
        try:
            import mlflow.pyfunc  # noqa: F401
        except ModuleNotFoundError as error:
            line = commands.pip_install("mlflow[auth]")
            raise ServiceError(f"MLflow is not installed ({error}): `{line}`") from None
        # What they log as errors reaches us as exceptions.
        for library in ("mlflow", "alembic", "sqlalchemy"):
            logging.getLogger(library).setLevel(logging.CRITICAL)

    def open(self) -> None:
        """Connects, and sees whether files can be sent."""
        if self._is_open:
            return
        try:
            if self._runs is None:
                client, experiment = self._opens(self.uri)
                if renamed := stores.experiment_of(client, experiment, self._study.id):
                    experiment = renamed.experiment_id
                    self._say(
                        f"tracking: the runs of {self._study.name} are in the experiment "
                        f"{renamed.name!r}, and go on there."
                    )
                self._runs = Runs(client, experiment, self._study, beat_seconds=self._beat_seconds)
            self._runs.open_parent()
            stores.check_keeps_files(self._runs.client, self.uri, self._runs.experiment)
        except stores.ExperimentDeletedError as error:
            raise self._shut(error) from None
        except stores.FilesElsewhereError as error:
            self._keeps_files = False
            self._say(f"tracking: {self._line(error)}.")
        self._is_open = True

    def send_study(self, news: StudyNews) -> None:
        if not self._study.has_parent:
            return
        with self._judged(None) as runs:
            parent = runs.id_of(None)
            run = runs.client.get_run(parent)
            metrics = [
                # A number that has changed since the last driver is a further point.
                (name, value, len(runs.client.get_metric_history(parent, name)), start_of(run))
                for name, value in news.metrics.items()
                if run.data.metrics.get(name) != value
            ]
            runs.log(parent, metrics=metrics, tags={STATE_TAG: news.state} | dict(news.tags))
            runs.set_status(parent, news.state)
            if news.state != "running":
                runs.reap()
            if not self._is_described:
                # Where data and encoder were at first stays: MLflow takes no second value.
                told = run.data.params.keys() & _PLACES
                own = {n: v for n, v in self._study.parameters.items() if n not in told}
                runs.log_data(run)
                runs.log(parent, parameters=own)
                self._is_described = True

    def send_trial(self, record: TrialRecord) -> None:
        with self._judged(record) as runs:
            self._trials.setdefault(record.number, _TrialRun(runs)).send(record)

    def send_files(self, paths: Sequence[Path], record: TrialRecord | None) -> None:
        """Sends those that the run lacks by its tags; a folder is a model.

        Raises:
            RefusedError: some are not taken.
        """
        number = None if record is None else record.number
        if not self._keeps_files or (record is None and not self._study.has_parent):
            return
        names = [path.name for path in paths] or [_CONFIG]
        with self._judged(record, names) as runs:
            if record is not None:
                trial = self._trials.setdefault(record.number, _TrialRun(runs))
                left = trial.send_files(paths, record, self._study.register, self._say)
            else:
                left = _send_files(runs.client, runs.id_of(None), paths)
        if left:
            self._not_taken[number] = list(left)
            raise self._refused(record, list(left), next(iter(left.values())))
        self._not_taken.pop(number, None)

    @property
    def beat_due(self) -> float:
        return float("inf") if self._runs is None else self._runs.beat_due

    def beat(self) -> bool:
        assert self._runs is not None
        self._runs.beat()
        return False

    def away(self, error: Exception) -> str:
        return (
            f"tracking: {shown(self.uri)} does not take our numbers ({self._line(error)}); "
            "training goes on, and they are sent when it answers, or by a later --resume."
        )

    def lacks(
        self, records: Sequence[TrialRecord], files: Mapping[int | None, Sequence[Path]]
    ) -> str:
        steps = {number: trial.last_step for number, trial in self._trials.items()}
        epochs = sum(max(0, one.epochs - steps.get(one.number, 0)) for one in records)
        names = [
            name
            for number, paths in files.items()
            if number is not None or self._study.has_parent
            for name in self._not_taken.get(number, [path.name for path in paths])
        ]
        parts = [f"{epochs} epoch(s)"] if epochs else []
        if names:
            named = ", ".join(dict.fromkeys(names[:3]))
            parts.append(f"{len(names)} file(s) ({named}{', ...' if len(names) > 3 else ''})")
        unsent = " and ".join(parts)
        return f"tracking: {unsent} are not sent; they are kept in the records." if unsent else ""

    def _forget(self) -> None:
        """What is there is asked anew before more is sent."""
        for trial in self._trials.values():
            trial.is_known = False

    @contextmanager
    def _judged(self, record: TrialRecord | None, files: Sequence[str] = ()) -> Iterator[Runs]:
        """Tells a server that refuses something (`files`, perhaps) from one that is away."""
        assert self._runs is not None
        try:
            yield self._runs
        except Exception as error:
            if not is_refusal(error):
                self._forget()  # it may have arrived although it raised
                raise
            self._check_lives(self._runs)
            raise self._refused(record, files, error) from error

    def _check_lives(self, runs: Runs) -> None:
        """Raises ShutError if our experiment was deleted, by which all is refused."""
        try:
            stores.check_lives(runs.client.get_experiment(runs.experiment), self.uri)
        except stores.ExperimentDeletedError as error:
            self._forget()
            raise self._shut(error) from None
        except Exception:  # it is not known, then
            return

    def _shut(self, error: stores.ExperimentDeletedError) -> ShutError:
        return ShutError(
            f"tracking: {self._line(error)}; training goes on, and all is sent within a minute "
            "after that, or by a later --resume."
        )

    def _refused(
        self, record: TrialRecord | None, files: Sequence[str], error: Exception
    ) -> RefusedError:
        study = self._study
        name = record.name if record is not None and study.has_parent else study.name
        who, why = f"tracking: {shown(self.uri)}", self._line(error)
        if files:
            return RefusedError(
                f"{who} does not take {', '.join(files)} of {name} ({why}); numbers go on, and "
                "files are tried again meanwhile."
            )
        remedy = self._remedy(None if record is None else record.number)
        return RefusedError(f"{who} refuses {name} ({why}{remedy}).")

    def _remedy(self, number: int | None) -> str:
        """What brings a run back that was deleted; empty if it was not."""
        assert self._runs is not None
        run_id = self._runs.id_of(number)
        with suppress(Exception):  # gone for good
            if self._runs.client.get_run(run_id).info.lifecycle_stage == "deleted":
                line = commands.restore_run(self.uri, run_id)
                return (
                    f"; it was deleted: `{line}` brings it back, and a later --resume makes a new "
                    "one with all numbers"
                )
        return ""

    def _line(self, error: Exception) -> str:
        line = message_of(error)
        if "database is locked" in line and (file := sqlite_file(self.uri)):
            line = f"locked by another process, see `{commands.holders(file)}`"
        return without_password(line, self.uri)


class _TrialRun:
    """The run of a trial; what it holds is asked once, and again when it `is_known` no more."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self.is_known = False
        self.last_step = 0

    def _look(self, record: TrialRecord) -> None:
        """Finds or makes the run, and asks what it holds."""
        if self.is_known:
            return
        run = self._runs.open_trial(record)
        self._id = run.info.run_id
        self._run, self._start = run, start_of(run)
        # Tag and status are two calls, and a driver may be killed between them.
        state = run.data.tags.get(STATE_TAG, "")
        self._state = state if run.info.status == STATUS.get(state) else ""
        self._is_tested = any(name.startswith("test/") for name in run.data.metrics)
        self._is_described = "seed" in run.data.params
        self._has_config = _FILE_TAG + _CONFIG in run.data.tags
        steps = self._runs.client.get_metric_history(self._id, "val/rsum")
        self.last_step = max((point.step for point in steps), default=0)
        self.is_known = True

    def send(self, record: TrialRecord) -> None:
        self._look(record)
        runs, before = self._runs, self._state
        if before != record.state and STATUS[record.state] == "RUNNING":
            runs.set_status(self._id, record.state)
        runs.watch(self._id, record.state)
        now = self._send_epochs(record)
        if record.test and not self._is_tested:
            tested = [(f"test/{n}", v, record.epochs, now) for n, v in record.test.items()]
            runs.log(self._id, metrics=tested)
            self._is_tested = True
        if before != record.state:
            tags: dict[str, str] = {STATE_TAG: record.state}
            if record.drift:
                tags["cpfean.drift"] = record.drift
            if record.failure or before == "failed":  # and is tried once more
                message = record.message[-4000:] if record.failure else ""
                tags |= {"cpfean.failure": record.failure, "cpfean.message": message}
            runs.log(self._id, tags=tags)
            runs.set_status(self._id, record.state)
            self._state = record.state
        runs.log_data(self._run)
        # Last, since a run whose parameters somebody else has set refuses ours.
        if not self._is_described:
            runs.log(self._id, parameters=record.experiment.flat())
            self._is_described = True

    def send_files(
        self,
        paths: Sequence[Path],
        record: TrialRecord,
        register: str,
        say: Callable[[str], None],
    ) -> dict[str, Exception]:
        """As the function of that name; the configuration is one of them."""
        self._look(record)
        if self._has_config and not paths:
            return {}
        config = "" if self._has_config else record.experiment.to_toml()
        client = self._runs.client
        left = _send_files(client, self._id, paths, config=config, register=register, say=say)
        self._has_config = _CONFIG not in left
        return left

    def _send_epochs(self, record: TrialRecord) -> int:
        """Sends those that the run lacks; returns the time of the last one, in milliseconds."""
        # A point that is sent again because its answer was lost has the same time, and MLflow
        # takes the same point once.
        now = float(self._start)
        points = []
        for row in record.history:
            now += 1000 * row.get("train/seconds", 0.0)
            step = int(row["epoch"])
            if step > self.last_step:
                points.append([(n, v, step, int(now)) for n, v in row.items() if n != "epoch"])
        each = max(1, _IN_A_BATCH // max(map(len, points), default=1))
        for first in range(0, len(points), each):
            # All metrics of an epoch are in one call: they arrive together or not at all.
            batch = [point for epoch in points[first : first + each] for point in epoch]
            self._runs.log(self._id, metrics=batch)
            self.last_step = batch[-1][2]
        return int(now)


def _send_files(
    client: MlflowClient,
    run: str,
    paths: Sequence[Path],
    *,
    config: str = "",
    register: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Exception]:
    """Sends those of which the run's tags do not say that they are there; gone ones are left out.

    Returns what was not taken, by name, with why. `config` is the text of one more, or empty;
    `register` the name that a model is registered by, or empty.
    """
    tags = client.get_run(run).data.tags
    left: dict[str, Exception] = {}

    def keep(name: str, read: Callable[[], bytes], send: Callable[[], object]) -> None:
        try:
            digest = hashlib.sha256(read()).hexdigest()
            if tags.get(_FILE_TAG + name) == digest:
                return
            send()
        # Every kind of storage raises its own.
        except Exception as error:
            left[name] = error
            return
        client.set_tag(run, _FILE_TAG + name, digest)

    def log(model: Path, *, name: str = "") -> None:
        address, how = models.log_model(client, run, model), "logged"
        if name:
            address, how = models.register(client, run, address, name), "registered"
        say(f"{model.name} is {how} in MLflow: {address}")

    if config:
        keep(_CONFIG, config.encode, lambda: client.log_text(run, config, _CONFIG))
    for path in paths:
        if path.is_file():
            keep(path.name, path.read_bytes, partial(client.log_artifact, run, str(path)))
        elif path.is_dir():
            content = partial(listing, path)
            keep(path.name, content, partial(log, path))
            if register and path.name not in left:
                keep(f"{path.name} as {register}", content, partial(log, path, name=register))
    return left
