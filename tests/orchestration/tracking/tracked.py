"""A study of a test's own that MLflow follows, and what MLflow has of it."""

import time
from collections.abc import Sequence

from mlflow import MlflowClient
from mlflow.entities import Run

from cpfean.records.trial_record import TrialRecord
from orchestration.study.follower import Follower, Pauses
from orchestration.tracking.mlflow_sink import MlflowSink
from orchestration.tracking.runs import TrackedRun
from orchestration.tracking.stores import open_store
from tests.lab.hosts import wait_until

SWEEP = TrackedRun(id="4711", name="my-sweep", kind="sweep", parameters={"study.trials": 2})


class Tracked:
    """A follower that has been started.

    Attributes:
        said: all lines.
        slowest: seconds that the longest update took.
    """

    def __init__(
        self,
        uri: str,
        run: TrackedRun = SWEEP,
        *,
        pauses: Pauses = Pauses(),  # noqa: B008
        beat_seconds: float = 60.0,
        client: type[MlflowClient] | None = None,
    ) -> None:
        def opens(address: str) -> tuple[MlflowClient, str]:
            opened, experiment = open_store(address)
            return opened if client is None else client(address), experiment

        self.said: list[str] = []
        self.slowest = 0.0
        self.run = run
        sink = MlflowSink(uri, run, say=self.said.append, beat_seconds=beat_seconds, opens=opens)
        self.follower = Follower([sink], say=self.said.append, pauses=pauses)
        self.follower.start()

    def update(self, *records: TrialRecord) -> None:
        for given in records:
            began = time.monotonic()
            self.follower.update(given)
            self.slowest = max(self.slowest, time.monotonic() - began)

    def end(self, state: str = "finished") -> bool:
        self.follower.update_study(state, {"best/val_rsum": 42.0})
        return self.follower.close()

    def runs(self, uri: str, **tags: str) -> list[Run]:
        return runs(uri, **tags | {"id": self.run.id})


def named(id: str) -> TrackedRun:
    return TrackedRun(id=id, name=f"s-{id}", kind="sweep", parameters={"study.trials": 2})


def track(uri: str, *records: TrialRecord, end: str = "", run: TrackedRun = SWEEP) -> list[str]:
    """What a driver says that sends these records and ends, or is killed when all is sent."""
    study = Tracked(uri, run)
    study.update(*records)
    assert study.end(end) if end else study.follower.close()
    return study.said


def runs(uri: str, **tags: str) -> list[Run]:
    client, experiment = open_store(uri)
    query = " and ".join(f"tags.`cpfean.{name}` = '{value}'" for name, value in tags.items())
    return list(client.search_runs([experiment], query))


def points(uri: str, run: Run, metric: str = "val/rsum") -> list[tuple[int, float]]:
    """Steps and values, sorted as they were sent."""
    history = MlflowClient(uri).get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in history]


def steps(uri: str, run: Run) -> list[int]:
    return [step for step, _ in points(uri, run)]


def files_of(uri: str, run: Run) -> set[str]:
    return {file.path for file in MlflowClient(uri).list_artifacts(run.info.run_id)}


def wait_for(uri: str, given: TrialRecord, *, id: str = SWEEP.id, files: Sequence[str] = ()) -> Run:
    """Waits until MLflow has all of a record, and these files with it."""
    marks = {f"cpfean.file.{name}" for name in ("config.toml", *files)}

    def sent() -> bool:
        found = runs(uri, id=id, trial=str(given.number))
        return (
            len(found) == 1
            and found[0].data.tags["cpfean.state"] == given.state
            and steps(uri, found[0]) == list(range(1, given.epochs + 1))
            and marks <= found[0].data.tags.keys()
        )

    wait_until(sent, seconds=30, what=f"all of {given.name}")
    return runs(uri, id=id, trial=str(given.number))[0]
