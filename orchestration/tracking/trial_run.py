"""What MLflow has of one trial, and sending what it lacks: epochs, test, state, files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean.records.trial_record import TrialRecord
from orchestration.tracking.runs import STATE_TAG, STATUS, Runs, start_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

CONFIG = "config.toml"
_FILE_TAG = "cpfean.file."  # and the name; the value is the file's SHA-256
_IN_A_BATCH = 1000  # metrics; MLflow takes no more


class TrialRun:
    """The run of a trial; what it holds is asked once, and again after a failure.

    Attributes:
        is_known: whether what it holds is.
        last_step: the last epoch that it was known to have.
    """

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
        self._start = start_of(run)
        # Tag and status are two calls, and a driver may be killed between them.
        state = run.data.tags.get(STATE_TAG, "")
        self._state = state if run.info.status == STATUS.get(state) else ""
        self._is_tested = any(name.startswith("test/") for name in run.data.metrics)
        self._is_described = "seed" in run.data.params
        self._has_config = _FILE_TAG + CONFIG in run.data.tags
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
            runs.log(self._id, tags=_tags(record, before=before))
            runs.set_status(self._id, record.state)
            self._state = record.state
        # Last, since a run whose parameters somebody else has set refuses ours.
        if not self._is_described:
            runs.log(self._id, parameters=record.experiment.flat())
            self._is_described = True

    def send_files(self, paths: Sequence[Path], record: TrialRecord) -> dict[str, Exception]:
        """As the function of that name; the configuration is one of them."""
        self._look(record)
        if self._has_config and not paths:
            return {}
        config = "" if self._has_config else record.experiment.to_toml()
        left = send_files(self._runs.client, self._id, paths, config=config)
        self._has_config = CONFIG not in left
        return left

    def _send_epochs(self, record: TrialRecord) -> int:
        """Sends those that the run lacks; returns the time of the last one, in milliseconds."""
        # A point that is sent again because its answer was lost has the same time, and MLflow
        # takes the same point once.
        now = float(self._start)
        points = []
        for row in record.history:
            now += 1000 * row.get("train/seconds", 0.0)
            if int(row["epoch"]) > self.last_step:
                points.append([(name, row[name], int(row["epoch"]), int(now)) for name in row])
        each = max(1, _IN_A_BATCH // max(map(len, points), default=1))
        for first in range(0, len(points), each):
            # All metrics of an epoch are in one call: they arrive together or not at all.
            batch = [point for epoch in points[first : first + each] for point in epoch]
            self._runs.log(self._id, metrics=batch)
            self.last_step = batch[-1][2]
        return int(now)


def send_files(
    client: MlflowClient, run: str, paths: Sequence[Path], *, config: str = ""
) -> dict[str, Exception]:
    """Sends those of which the run's tags do not say that they are there; gone ones are left out.

    The run's tag `cpfean.file.NAME` is the file's SHA-256.

    Args:
        config: text of a further one, if it is not empty.

    Returns:
        What was not taken, by name, and why.
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

    if config:
        keep(CONFIG, config.encode, lambda: client.log_text(run, config, CONFIG))
    for path in paths:
        if path.is_file():
            keep(path.name, path.read_bytes, partial(client.log_artifact, run, str(path)))
    return left


def _tags(record: TrialRecord, *, before: str) -> dict[str, str]:
    """Those of a trial's state; `before` is the one that its run was in."""
    tags: dict[str, str] = {STATE_TAG: record.state}
    if record.drift:
        tags["cpfean.drift"] = record.drift
    if record.failure:
        tags |= {"cpfean.failure": record.failure, "cpfean.message": record.message[-4000:]}
    elif before == "failed":  # and is tried once more
        tags |= {"cpfean.failure": "", "cpfean.message": ""}
    return tags
