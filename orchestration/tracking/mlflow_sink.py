"""What MLflow gets of a study: a sink that compares each record with what the run has already.

No step and no file is sent twice, by whichever driver. Runs are found by their tags, so that a
restarted driver writes on instead of starting a second run. What a server refuses for one run is
told with the reason and what mends it. So are files that are not taken, without their numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean import commands
from cpfean.errors import ServiceError, message_of
from cpfean.records.trial_record import TrialRecord
from orchestration.study.follower import RefusedError, ShutError, StudyNews
from orchestration.tracking.address import shown, sqlite_file, without_password
from orchestration.tracking.runs import (
    HEARTBEAT_SECONDS,
    STATE_TAG,
    Runs,
    TrackedRun,
    is_refusal,
    start_of,
)
from orchestration.tracking.stores import (
    ExperimentDeletedError,
    FilesElsewhereError,
    check_keeps_files,
    check_lives,
    experiment_of,
    open_store,
)
from orchestration.tracking.trial_run import CONFIG, TrialRun, send_files

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PLACES = {"data.path", "model.text.encoder"}  # may change between two drivers of a study


class MlflowSink:
    """Brings MLflow up to date with the records; a `Sink`.

    Args:
        uri: of MLflow; sqlite:/// keeps artifacts beside the database.
        study: what is tracked.
        say: shows the user a line.
        beat_seconds: between two heartbeats of a run that is RUNNING.
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
        opens: Callable[[str], tuple[MlflowClient, str]] = open_store,
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
        self._trials: dict[int, TrialRun] = {}
        self._not_taken: dict[int | None, list[str]] = {}

    def load(self) -> None:
        """Imports MLflow here: importing it beside Ray can deadlock."""
        try:
            import mlflow  # noqa: F401
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
            self._runs = self._runs or self._connected()
            self._runs.open_parent()
            check_keeps_files(self._runs.client, self.uri, self._runs.experiment)
        except ExperimentDeletedError as error:
            raise self._shut(error) from None
        except FilesElsewhereError as error:
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
                runs.log(parent, parameters=own)
                self._is_described = True

    def send_trial(self, record: TrialRecord) -> None:
        with self._judged(record) as runs:
            self._trial(runs, record.number).send(record)

    def send_files(self, paths: Sequence[Path], record: TrialRecord | None) -> None:
        """Sends those of which the run's tags do not say that they are there.

        Raises:
            RefusedError: some were not taken; the others are sent.
        """
        number = None if record is None else record.number
        if not self._keeps_files or (record is None and not self._study.has_parent):
            return
        names = [path.name for path in paths] or [CONFIG]
        with self._judged(record, names) as runs:
            if record is not None:
                left = self._trial(runs, record.number).send_files(paths, record)
            else:
                left = send_files(runs.client, runs.id_of(None), paths)
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

    def _connected(self) -> Runs:
        client, experiment = self._opens(self.uri)
        if renamed := experiment_of(client, experiment, self._study.id):
            experiment = renamed.experiment_id
            self._say(
                f"tracking: the runs of {self._study.name} are in the experiment "
                f"{renamed.name!r}, and go on there."
            )
        return Runs(client, experiment, self._study, beat_seconds=self._beat_seconds)

    def _trial(self, runs: Runs, number: int) -> TrialRun:
        return self._trials.setdefault(number, TrialRun(runs))

    def _forget(self) -> None:
        """What is there is asked anew before more is sent."""
        for trial in self._trials.values():
            trial.is_known = False

    @contextmanager
    def _judged(self, record: TrialRecord | None, files: Sequence[str] = ()) -> Iterator[Runs]:
        """Tells a server that refuses something of a trial, or of the whole, from one that is away.

        Args:
            files: their names, if it is files that are sent.
        """
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
            check_lives(runs.client.get_experiment(runs.experiment), self.uri)
        except ExperimentDeletedError as error:
            self._forget()
            raise self._shut(error) from None
        except Exception:  # it is not known, then
            return

    def _shut(self, error: ExperimentDeletedError) -> ShutError:
        return ShutError(
            f"tracking: {self._line(error)}; training goes on, and all is sent within a minute "
            "after that, or by a later --resume."
        )

    def _refused(
        self, record: TrialRecord | None, files: Sequence[str], error: Exception
    ) -> RefusedError:
        is_child = record is not None and self._study.has_parent
        name = record.name if record is not None and is_child else self._study.name
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
        try:
            if self._runs.client.get_run(run_id).info.lifecycle_stage != "deleted":
                return ""
        except Exception:  # gone for good
            return ""
        return (
            f"; it was deleted: `{commands.restore_run(self.uri, run_id)}` brings it back, and a "
            "later --resume makes a new one with all numbers"
        )

    def _line(self, error: Exception) -> str:
        line = message_of(error)
        if "database is locked" in line and (file := sqlite_file(self.uri)):
            line = f"locked by another process, see `{commands.holders(file)}`"
        return without_password(line, self.uri)
