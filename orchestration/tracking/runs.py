"""The runs of a study in MLflow: found by their tags or made, closed in their states, kept alive.

A sweep is a parent run, each trial a child of it; a single training is one run without a parent.

MLflow knows RUNNING, FINISHED, FAILED and KILLED. A trial that was stopped because others were
better is FINISHED: it did what was asked of it. The tag `cpfean.state` tells the whole truth:
running, finished, pruned, failed or interrupted (KILLED, and run on by --resume). Of a run that is
RUNNING the tag `cpfean.heartbeat` tells when its driver last lived, by the driver's clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cpfean.errors import ServiceError, message_of
from cpfean.records.trial_record import TrialRecord
from orchestration.tracking.address import shown, without_password
from orchestration.tracking.stores import experiment_of, open_store
from orchestration.versions import version_tags

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

STATE_TAG = "cpfean.state"
HEARTBEAT_TAG = "cpfean.heartbeat"
HEARTBEAT_SECONDS = 60.0
STATUS = {
    "waiting": "RUNNING",
    "running": "RUNNING",
    "finished": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
_PARENT_TAG = "mlflow.parentRunId"
_NOT_NOW = (401, 403, 408, 429)  # answers that are about the server, not about the run


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What a sweep or a single training is to MLflow.

    Attributes:
        id: unique among the runs of one store, which may serve many machines.
        kind: "sweep", "ablations" or "train".
        tags: beside those of the program and libraries.
        parameters: of the parent run.
        has_parent: there is a run of the whole, whose children the trials are.
        register: the name that the best model is registered by; empty if it is not.
    """

    id: str
    name: str
    kind: str
    tags: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    has_parent: bool = True
    register: str = ""


class Runs:
    """The runs of one study, in one experiment; open ones have a heartbeat every so often."""

    def __init__(
        self, client: MlflowClient, experiment: str, study: TrackedRun, *, beat_seconds: float
    ) -> None:
        self.client = client
        self.experiment = experiment
        self._study = study
        self._beat_seconds = beat_seconds
        self._ids: dict[int | None, str] = {}
        self._with_data: set[str] = set()
        self._beats: dict[str, float] = {}  # when the next one of each open run is due

    def id_of(self, number: int | None) -> str:
        """The run of a trial, or the parent run; empty if it has not been looked for."""
        return self._ids.get(number, "")

    def open_parent(self) -> None:
        """Finds or makes the parent run, if there is to be one."""
        if self._study.has_parent and None not in self._ids:
            role = {"cpfean.kind": self._study.kind, "cpfean.role": "parent"}
            self._ids[None] = self._sole(self._study.name, role, dict(self._study.tags))

    def open_trial(self, record: TrialRecord) -> Run:
        """A trial's run, found or made, as it is now."""
        parent = self.id_of(None)
        if record.number not in self._ids:
            tags = {
                **self._study.tags,
                "cpfean.kind": self._study.kind,
                "cpfean.role": "trial",
                "cpfean.config": record.experiment.fingerprint(),
                **({_PARENT_TAG: parent} if parent else {}),
            }
            name = record.name if self._study.has_parent else self._study.name
            self._ids[record.number] = self._sole(name, {"cpfean.trial": str(record.number)}, tags)
        run = self.client.get_run(self._ids[record.number])
        # Of a study whose parent run was deleted the children follow the new one.
        if parent and run.data.tags.get(_PARENT_TAG) != parent:
            self.client.set_tag(run.info.run_id, _PARENT_TAG, parent)
        return run

    def set_status(self, run_id: str, state: str) -> None:
        status = STATUS[state]
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status)
        self.watch(run_id, state)

    def watch(self, run_id: str, state: str) -> None:
        """Gives a run that is in this state a heartbeat from now on, or none."""
        if STATUS[state] != "RUNNING":
            self._beats.pop(run_id, None)
        else:
            self._beats.setdefault(run_id, 0.0)  # at once: its last driver may be long gone

    @property
    def beat_due(self) -> float:
        """When the next heartbeat is due, by the monotonic clock."""
        return min(self._beats.values(), default=float("inf"))

    def beat(self) -> None:
        """Tells of one open run, whose turn it is, that its driver lives."""
        run_id = min(self._beats, key=self._beats.__getitem__)
        later = time.monotonic() + self._beat_seconds
        self._beats[run_id] = later
        try:
            self.client.set_tag(run_id, HEARTBEAT_TAG, _now())
        except Exception as error:
            if not is_refusal(error):
                self._beats = dict.fromkeys(self._beats, later)
                raise

    def reap(self) -> None:
        """Closes children that no record speaks for any more."""
        known = set(self._ids.values())
        query = f"tags.`cpfean.id` = '{self._study.id}' and attributes.status = 'RUNNING'"
        for run in self.client.search_runs([self.experiment], query):
            if run.info.run_id not in known:
                close_run(self.client, run)

    def log_data(self, run: Run) -> None:
        """Makes the study's data an input of a run, unless it is one already."""
        data, there = _data_of(self._study.tags), run.inputs.dataset_inputs if run.inputs else []
        if data is None or run.info.run_id in self._with_data:
            return
        if data.dataset.digest not in {one.dataset.digest for one in there}:
            self.client.log_inputs(run.info.run_id, [data])
        self._with_data.add(run.info.run_id)

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[tuple[str, float, int, int]] = (),
        parameters: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Sends what there is in one call; metrics are name, value, step and time."""
        from mlflow.entities import Metric, Param, RunTag

        self.client.log_batch(
            run_id,
            metrics=[Metric(name, float(value), at, step) for name, value, step, at in metrics],
            params=[Param(name, str(value)) for name, value in (parameters or {}).items()],
            tags=[RunTag(name, str(value)) for name, value in (tags or {}).items()],
        )

    def _sole(self, name: str, key: Mapping[str, str], tags: Mapping[str, str]) -> str:
        """The run of this study that has the key, made if there is none."""
        # The key goes in with the creation: a run that exists can always be found again.
        key = {"cpfean.id": self._study.id, **key}
        runs = self._find(key)
        if not runs:
            state = {STATE_TAG: "running", HEARTBEAT_TAG: _now()}
            ours = {"mlflow.source.name": "cpfean", "mlflow.source.type": "LOCAL", **version_tags()}
            tags = {"cpfean.sweep": self._study.name, **state, **key, **tags, **ours}
            made = self.client.create_run(self.experiment, tags=tags, run_name=name)
            # MLflow sends a request again whose answer was lost, and then there are two.
            runs = self._find(key) or [made]
        for twin in runs[1:]:
            if not twin.data.metrics:
                self.client.delete_run(twin.info.run_id)
        return runs[0].info.run_id

    def _find(self, key: Mapping[str, str]) -> list[Run]:
        """The one that holds numbers first."""
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in key.items())
        runs = self.client.search_runs([self.experiment], query)
        return sorted(runs, key=lambda r: (not r.data.metrics, start_of(r), r.info.run_id))


def _data_of(tags: Mapping[str, str]) -> DatasetInput | None:
    """What the tags tell of the data, and no more, for MLflow; None if they tell nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if "cpfean.data" not in tags:
        return None
    place, features = tags["cpfean.data_path"], tags.get("cpfean.features")
    kind = "s3" if place.startswith("s3://") else "code" if place == "synthetic" else "local"
    name = place.rstrip("/").rpartition("/")[2] or "data"
    profile = json.dumps({"features": features}) if features else None
    data = Dataset(name, tags["cpfean.data"], kind, json.dumps({"uri": place}), profile=profile)
    return DatasetInput(data, [InputTag("mlflow.data.context", "training")])


def close_run(client: MlflowClient, run: Run) -> None:
    """Closes a run that nobody runs any more, as interrupted."""
    client.set_tag(run.info.run_id, STATE_TAG, "interrupted")
    client.set_terminated(run.info.run_id, STATUS["interrupted"])


def start_of(run: Run) -> int:
    """Milliseconds."""
    return int(run.info.start_time or 0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def status_of(error: Exception) -> int:
    """The HTTP status that a tracker has answered with; 0 if it has not answered."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code
    return 0


def is_refusal(error: Exception) -> bool:
    """Whether the tracker has answered that it does not take this, rather than not at all."""
    status = status_of(error)
    return 400 <= status < 500 and status not in _NOT_NOW


def tag_parent(uri: str, id: str, tags: Mapping[str, str]) -> None:
    """Adds tags to the parent run of a study that has ended; raises ServiceError if that fails."""
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
