"""Against a real MLflow on sqlite; a server that is away is a closed port."""

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient
from mlflow.data import get_source

from cpfean import commands
from orchestration.study.follower import Pauses
from orchestration.tracking.runs import HEARTBEAT_TAG, TrackedRun, tag_parent
from orchestration.tracking.stores import open_store
from tests.lab.hosts import wait_until
from tests.orchestration.samples import TINY, record
from tests.orchestration.tracking.tracked import (
    Tracked,
    files_of,
    points,
    runs,
    steps,
    track,
    wait_for,
)

SOON = Pauses(retry=0.05, refused=0.05)


def test_a_trial_is_a_child_with_its_parameters_metrics_and_true_state(uri: str) -> None:
    track(uri, record(0, 10.0, 30.0, state="finished", test={"rsum": 25.0}), end="finished")
    (parent,) = runs(uri, role="parent")
    (child,) = runs(uri, role="trial")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["loss.margin"] == str(TINY.loss.margin)
    assert set(TINY.flat()) <= set(child.data.params)
    assert points(uri, child) == [(1, 10.0), (2, 30.0)]
    assert child.data.metrics["test/rsum"] == 25.0
    assert (child.info.status, parent.info.status) == ("FINISHED", "FINISHED")
    assert parent.data.metrics["best/val_rsum"] == 42.0
    artifacts = MlflowClient(uri).list_artifacts(child.info.run_id)
    assert [artifact.path for artifact in artifacts] == ["config.toml"]
    assert "version.torch" in child.data.tags


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("running", "RUNNING"),
        ("finished", "FINISHED"),
        ("pruned", "FINISHED"),
        ("failed", "FAILED"),
        ("interrupted", "KILLED"),
    ],
)
def test_the_tag_tells_the_state_that_mlflow_has_no_word_for(
    uri: str, state: Any, status: str
) -> None:
    track(uri, record(0, 10.0, state=state, failure="oom" if state == "failed" else ""))
    (child,) = runs(uri, role="trial")
    assert (child.info.status, child.data.tags["cpfean.state"]) == (status, state)
    assert ("cpfean.failure" in child.data.tags) == (state == "failed")


def test_a_restarted_driver_writes_on_in_the_same_runs_and_sends_no_step_twice(uri: str) -> None:
    track(uri, record(0, 10.0, 20.0, state="running"), record(1, 5.0, state="running"))
    track(uri, record(0, 10.0, 20.0, state="finished"), record(1, 5.0, 6.0, 7.0, state="running"))
    track(uri, record(1, 5.0, 6.0, 7.0, 8.0, state="finished"), end="finished")
    assert len(runs(uri, role="parent")) == 1
    by_number = {run.data.tags["cpfean.trial"]: run for run in runs(uri, role="trial")}
    assert set(by_number) == {"0", "1"}
    assert points(uri, by_number["0"]) == [(1, 10.0), (2, 20.0)]
    assert points(uri, by_number["1"]) == [(1, 5.0), (2, 6.0), (3, 7.0), (4, 8.0)]
    assert {run.info.status for run in by_number.values()} == {"FINISHED"}


@pytest.mark.parametrize("state", ["finished", "failed", "interrupted"])
def test_a_driver_killed_between_tag_and_status_leaves_no_run_running(uri: str, state: Any) -> None:
    track(uri, record(0, 10.0, state=state), end="finished")
    (child,) = runs(uri, role="trial")
    MlflowClient(uri).update_run(child.info.run_id, status="RUNNING")  # as it was before that call
    track(uri, record(0, 10.0, state=state), end="finished")
    (again,) = runs(uri, role="trial")
    assert again.info.status == child.info.status != "RUNNING"


def test_an_interrupted_trial_is_running_again_when_it_goes_on(uri: str) -> None:
    track(uri, record(0, 10.0, state="interrupted"), end="interrupted")
    track(uri, record(0, 10.0, state="running"))
    (child,) = runs(uri, role="trial")
    assert child.info.status == "RUNNING"


def test_of_a_trial_that_failed_and_was_run_once_more_the_failure_is_not_told(uri: str) -> None:
    track(uri, record(0, 10.0, state="failed", failure="infra", message="disk full"))
    track(uri, record(0, 10.0, state="running"), record(0, 10.0, 20.0, state="finished"))
    (child,) = runs(uri, role="trial")
    assert child.info.status == "FINISHED"
    assert {child.data.tags["cpfean.failure"], child.data.tags["cpfean.message"]} == {""}
    assert points(uri, child) == [(1, 10.0), (2, 20.0)]


def test_the_end_closes_children_that_no_record_speaks_for(uri: str) -> None:
    track(uri, record(7, 1.0, state="running"))
    other = TrackedRun(id="0815", name="my-sweep", kind="sweep")
    track(uri, record(0, 1.0, state="running"), run=other)
    track(uri, record(0, 10.0, state="finished"), end="finished")
    assert [run.data.tags["cpfean.trial"] for run in runs(uri, id="4711", state="interrupted")] == [
        "7"
    ]
    # A sweep of the same name on another machine is not ours to close.
    assert [run.info.status for run in runs(uri, id="0815", role="trial")] == ["RUNNING"]


def test_a_training_by_itself_is_one_run_without_a_parent(uri: str) -> None:
    alone = TrackedRun(id="1", name="my-training", kind="train", has_parent=False)
    track(uri, record(0, 10.0, state="finished"), end="finished", run=alone)
    (run,) = runs(uri, id="1")
    assert run.info.run_name == "my-training"
    assert "mlflow.parentRunId" not in run.data.tags


def on_data(path: str, *, parent: bool = True, **more: str) -> TrackedRun:
    tags = {"cpfean.data": "0123456789abcdef", "cpfean.data_path": path} | more
    return TrackedRun(id="4711", name="my-sweep", kind="sweep", tags=tags, has_parent=parent)


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("synthetic", "synthetic", "code"),
        ("s3://bucket/cpfean/flickr30k/", "flickr30k", "s3"),
        ("/data/f30k_precomp", "f30k_precomp", "local"),
        ("/", "data", "local"),
    ],
)
def test_the_data_is_an_input_of_the_parent_and_of_each_trial(
    uri: str, path: str, name: str, kind: str
) -> None:
    trials = [record(n, 10.0, state="finished") for n in range(2)]
    track(uri, *trials, end="finished", run=on_data(path))
    found = runs(uri, id="4711")
    assert len(found) == 3
    for run in found:
        (given,) = run.inputs.dataset_inputs
        data = given.dataset
        assert (data.name, data.digest, data.source_type) == (name, "0123456789abcdef", kind)
        assert json.loads(data.source) == {"uri": path}  # as the tag has it, and nothing else
        assert (data.schema, data.profile) == (None, None)
        assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
        assert get_source(data).to_dict() is not None  # MLflow knows sources of this kind


def test_what_made_the_features_is_told_with_the_data(uri: str) -> None:
    told = {"cpfean.features": "regions by DETR, features of the detector"}
    alone = on_data("/data/photos", parent=False, **told)
    track(uri, record(0, 10.0, state="finished"), end="finished", run=alone)
    (run,) = runs(uri, id="4711")
    (given,) = run.inputs.dataset_inputs
    assert json.loads(given.dataset.profile) == {"features": told["cpfean.features"]}


def test_data_is_an_input_once_however_often_the_driver_comes_back(uri: str) -> None:
    sent = []

    class Counting(MlflowClient):
        def log_inputs(self, run_id: str, *given: Any, **more: Any) -> None:
            sent.append(run_id)
            super().log_inputs(run_id, *given, **more)

    # A run of a release that told MLflow nothing of the data gets it when it is gone on with.
    before = TrackedRun(id="4711", name="my-sweep", kind="sweep")
    track(uri, record(0, 10.0, state="running"), run=before)
    assert {len(run.inputs.dataset_inputs) for run in runs(uri, id="4711")} == {0}
    for place in ("/data/f30k", "/data/f30k", "/moved/to/here"):
        study = Tracked(uri, on_data(place), client=Counting)
        study.update(record(0, 10.0, state="running"))
        study.update(record(0, 10.0, 20.0, state="finished"))
        assert study.end()
    found = runs(uri, id="4711")
    assert sorted(sent) == sorted(run.info.run_id for run in found)
    inputs = [run.inputs.dataset_inputs for run in found]
    assert [[one.dataset.name for one in of] for of in inputs] == [["f30k"], ["f30k"]]


def test_data_whose_answer_was_lost_is_an_input_once(uri: str) -> None:
    lost = []

    class Losing(MlflowClient):
        def log_inputs(self, run_id: str, *given: Any, **more: Any) -> None:
            super().log_inputs(run_id, *given, **more)
            if run_id not in lost:
                lost.append(run_id)
                raise ConnectionError("the answer was lost")

    study = Tracked(uri, on_data("/data/f30k"), client=Losing, pauses=SOON)
    study.update(record(0, 10.0, state="finished"))
    wait_until(lambda: len(lost) == 2, seconds=30, what="both answers are lost")
    wait_for(uri, record(0, 10.0, state="finished"))
    assert study.end()
    assert {len(run.inputs.dataset_inputs) for run in runs(uri, id="4711")} == {1}
    assert all("loss.margin" in run.data.params for run in runs(uri, role="trial"))


def test_a_server_that_is_away_neither_stalls_nor_raises_and_gets_everything_later(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        study = Tracked(f"http://127.0.0.1:{taken.getsockname()[1]}")
        study.update(*(record(0, *range(epochs), state="running") for epochs in range(1, 50)))
        assert study.slowest < 0.05
        assert not study.follower.close(seconds=20)
    assert "training goes on" in study.said[0]
    assert study.said[1:] == ["tracking: 49 epoch(s) are not sent; they are kept in the records."]
    track(uri, record(0, *range(49), state="finished"))
    (child,) = runs(uri, role="trial")
    assert len(steps(uri, child)) == 49


def client_that(
    *, beats: Callable[[str], None] | None = None, sends: Callable[[str], None] | None = None
) -> type[MlflowClient]:
    """A client that calls a function before each heartbeat of a run, or before each file."""

    class Client(MlflowClient):
        def set_tag(self, run_id: str, key: str, value: Any, **more: Any) -> None:
            if key == HEARTBEAT_TAG and beats is not None:
                beats(run_id)
            super().set_tag(run_id, key, value, **more)

        def log_artifact(self, run_id: str, local_path: str, *more: Any) -> None:
            if sends is not None:
                sends(Path(local_path).name)
            super().log_artifact(run_id, local_path, *more)

    return Client


def test_open_runs_have_a_heartbeat_and_no_others(uri: str) -> None:
    track(uri, record(0, 1.0, state="running"), record(1, 1.0, state="running"))  # and is killed
    for run in runs(uri, id="4711"):
        MlflowClient(uri).set_tag(run.info.run_id, HEARTBEAT_TAG, "long ago")
    beats: list[str] = []
    study = Tracked(uri, beat_seconds=0.05, client=client_that(beats=beats.append))
    study.update(record(0, 1.0, 2.0, state="finished"), record(1, 1.0, state="running"))
    (parent,) = runs(uri, role="parent")
    ended, goes_on = (runs(uri, trial=str(number))[0].info.run_id for number in (0, 1))
    wait_until(lambda: beats.count(goes_on) > 2, seconds=30, what="three heartbeats")
    assert set(beats) == {parent.info.run_id, goes_on}
    study.update(last := record(1, 1.0, 2.0, state="finished"))
    wait_for(uri, last)
    before = beats.count(goes_on)
    total = len(beats)
    wait_until(lambda: len(beats) > total + 2, seconds=30, what="three more of the parent")
    assert beats.count(goes_on) == before
    assert study.end()
    tags = {run.info.run_id: run.data.tags[HEARTBEAT_TAG] for run in runs(uri, id="4711")}
    assert {id for id, beat in tags.items() if beat == "long ago"} == {ended}


def test_a_run_that_goes_on_has_a_heartbeat_at_once(uri: str) -> None:
    track(uri, record(0, 1.0, state="running"))
    (child,) = runs(uri, role="trial")
    MlflowClient(uri).set_tag(child.info.run_id, HEARTBEAT_TAG, "long ago")
    study = Tracked(uri)
    study.update(record(0, 1.0, state="running"))

    def beats() -> bool:
        (child,) = runs(uri, role="trial")
        return child.data.tags[HEARTBEAT_TAG] != "long ago"

    wait_until(beats, seconds=30, what="the first heartbeat")
    assert study.follower.close()


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_heartbeat_that_does_not_arrive_holds_nothing_up_and_is_not_told(
    uri: str, fault: str
) -> None:
    came, over = threading.Event(), threading.Event()

    def beat(_: str) -> None:
        came.set()
        if fault == "hangs":
            over.wait(60)
        raise OSError("nobody answers")

    study = Tracked(uri, beat_seconds=0.05, client=client_that(beats=beat))
    assert came.wait(30)
    try:
        if fault == "raises":
            study.update(record(0, 1.0, state="finished"))
        began = time.monotonic()
        assert study.follower.close()
        assert time.monotonic() - began < 5
        assert study.said == []
        assert len(runs(uri, role="trial")) == (fault == "raises")
    finally:
        over.set()


def artifacts_of(uri: str) -> Path:
    """The folder of a store's files; the copies that tests work on share it."""
    client, experiment = open_store(uri)
    return Path(urlsplit(client.get_experiment(experiment).artifact_location).path)


def test_files_are_kept_with_their_trial_or_with_the_whole_and_sent_once(
    uri: str, tmp_path: Path
) -> None:
    picture, table = tmp_path / "picture.png", tmp_path / "table.csv"
    picture.write_bytes(b"a picture")
    table.write_text("a,b")
    sent: list[str] = []
    trial = record(0, 10.0, state="finished")

    def keep() -> None:
        study = Tracked(uri, client=client_that(sends=sent.append))
        # A file may be gone by the time it is sent: it is left out, and what follows is not.
        study.follower.keep_files([tmp_path / "gone.png", picture], trial)
        study.follower.keep_files([table])
        study.update(trial)
        assert study.follower.close()

    keep()
    (parent,), (child,) = runs(uri, role="parent"), runs(uri, role="trial")
    assert files_of(uri, child) == {"config.toml", "picture.png"}
    assert files_of(uri, parent) == {"table.csv"}
    keep()
    assert sent == ["config.toml", "picture.png", "table.csv"]
    table.write_text("b,a")
    keep()
    assert sent[3:] == ["table.csv"]


def test_files_neither_stall_nor_are_lost_when_they_cannot_be_stored(
    uri: str, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"a picture")
    failures = [OSError("the store is full")] * 2

    def send(name: str) -> None:
        if name == "picture.png" and failures:
            raise failures.pop()

    study = Tracked(uri, pauses=SOON, client=client_that(sends=send))
    began = time.monotonic()
    study.follower.keep_files([picture], record(0, 10.0, state="running"))
    assert time.monotonic() - began < 0.5
    study.update(last := record(0, 10.0, 20.0, state="finished"))
    child = wait_for(uri, last, files=["picture.png"])
    assert study.follower.close()
    assert len(study.said) == 1
    assert "picture.png" in files_of(uri, child)
    assert points(uri, child) == [(1, 10.0), (2, 20.0)]


def test_a_deleted_experiment_is_told_before_the_first_number_and_gets_all_once_it_is_restored(
    uri: str,
) -> None:
    client, experiment = open_store(uri)
    client.delete_experiment(experiment)
    study = Tracked(uri, pauses=SOON)
    study.follower.meet(seconds=30)
    assert len(study.said) == 1
    assert commands.restore_experiment(uri, experiment) in study.said[0]
    study.update(record(0, 1.0, state="running"))
    client.restore_experiment(experiment)
    study.update(last := record(0, 1.0, 2.0, state="finished"))
    wait_for(uri, last)
    # And once more while it runs.
    client.delete_experiment(experiment)
    study.update(record(1, 1.0, 2.0, state="finished"))
    study.follower.update_study("finished", {})
    wait_until(lambda: study.follower.first != "", seconds=30, what="it is known to be deleted")
    client.restore_experiment(experiment)
    assert study.follower.close()
    assert study.follower.first == ""
    assert [line for line in study.said if "was deleted" in line] == study.said[:1]  # told once
    assert [points(uri, run) for run in runs(uri, role="trial")] == [[(1, 1.0), (2, 2.0)]] * 2
    assert {run.info.status for run in runs(uri, id="4711")} == {"FINISHED"}


def tracked_for_an_epoch(uri: str, pauses: Pauses) -> Tracked:
    """A study that has sent the first epoch of a trial."""
    study = Tracked(uri, pauses=pauses)
    study.update(first := record(0, 1.0, state="running"))
    wait_for(uri, first)
    return study


def test_what_a_deleted_experiment_lacks_is_told_with_what_comes_before_a_resume(uri: str) -> None:
    client, experiment = open_store(uri)
    study = tracked_for_an_epoch(uri, Pauses())
    client.delete_experiment(experiment)
    study.update(record(0, 1.0, 2.0, 3.0, state="finished"))
    assert not study.follower.close()
    assert "was deleted" in study.said[0]
    assert study.said[1:] == ["tracking: 2 epoch(s) are not sent; they are kept in the records."]
    assert study.follower.first == "once that is mended, "
    client.restore_experiment(experiment)
    assert track(uri, record(0, 1.0, 2.0, 3.0, state="finished"), end="finished") == []
    (child,) = runs(uri, role="trial")
    assert points(uri, child) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_study_goes_on_in_an_experiment_that_was_renamed_and_a_new_one_does_not(
    uri: str,
) -> None:
    track(uri, record(0, 1.0, state="interrupted"), end="interrupted")
    client, experiment = open_store(uri)
    client.rename_experiment(experiment, "thesis")
    said = track(uri, record(0, 1.0, 2.0, state="finished"), end="finished")
    assert said == [
        "tracking: the runs of my-sweep are in the experiment 'thesis', and go on there."
    ]
    found = client.search_runs([experiment], "tags.`cpfean.role` = 'trial'")
    assert [points(uri, run) for run in found] == [[(1, 1.0), (2, 2.0)]]
    assert runs(uri, id="4711") == []  # none in the experiment that has the name now
    assert (
        track(
            uri,
            record(0, 1.0),
            run=TrackedRun(id="0815", name="new", kind="train", has_parent=False),
        )
        == []
    )
    assert len(runs(uri, id="0815")) == 1
    tag_parent(uri, "4711", {"cpfean.change": "none"})
    (parent,) = client.search_runs([experiment], "tags.`cpfean.role` = 'parent'")
    assert parent.data.tags["cpfean.change"] == "none"


def test_a_deleted_run_is_told_at_once_with_what_brings_it_back_and_then_goes_on(uri: str) -> None:
    study = tracked_for_an_epoch(uri, SOON)
    (child,) = runs(uri, role="trial")
    client = MlflowClient(uri)
    client.delete_run(child.info.run_id)
    study.update(second := record(0, 1.0, 2.0, state="running"))
    wait_until(lambda: study.said != [], seconds=30, what="it is told")
    assert "refuses trial-000" in study.said[0]
    assert commands.restore_run(uri, child.info.run_id) in study.said[0]
    client.restore_run(child.info.run_id)
    wait_for(uri, second)
    assert study.end()
    assert len(study.said) == 1
    assert points(uri, child) == [(1, 1.0), (2, 2.0)]


def test_each_file_is_sent_by_its_own_mark(uri: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_text(file.name)
    trial = record(0, 1.0, state="finished")

    def keep() -> list[str]:
        study = Tracked(uri)
        study.update(trial)
        study.follower.keep_files(files, trial)
        study.follower.keep_files(files)
        assert study.follower.close()
        return study.said

    keep()
    (parent,), (child,) = runs(uri, role="parent"), runs(uri, role="trial")
    folder = artifacts_of(uri)
    for run, name in ((child, "config.toml"), (child, "b.png"), (parent, "a.png")):
        MlflowClient(uri).delete_tag(run.info.run_id, f"cpfean.file.{name}")
        (folder / run.info.run_id / "artifacts" / name).unlink()
    assert keep() == []
    assert files_of(uri, child) == {"config.toml", "a.png", "b.png"}
    assert files_of(uri, parent) == {"a.png", "b.png"}


def test_files_that_could_not_be_kept_hold_up_no_number_and_are_sent_by_the_next_driver(
    uri: str, tmp_path: Path
) -> None:
    folder = artifacts_of(uri)
    if folder.exists():  # that of an earlier test with a copy of the same store
        folder.rename(tmp_path / "earlier")
    folder.write_text("in the way of the folder")
    report = tmp_path / "report.md"
    report.write_text("a report")
    trials = [record(number, 1.0, 2.0, state="finished") for number in (0, 1)]

    def send() -> tuple[bool, list[str]]:
        study = Tracked(uri)
        study.update(*trials)
        study.follower.keep_files([report])
        return study.end(), study.said

    try:
        done, said = send()
    finally:
        folder.unlink()
    assert not done
    assert not [line for line in said if "numbers" in line and "numbers go on" not in line]
    assert len([line for line in said if "does not take config.toml of trial-000" in line]) == 1
    assert len([line for line in said if "does not take report.md of my-sweep" in line]) == 1
    assert said[-1].startswith("tracking: 3 file(s) (config.toml, report.md) are not sent")
    assert [points(uri, run) for run in runs(uri, role="trial")] == [[(1, 1.0), (2, 2.0)]] * 2
    assert {run.info.status for run in runs(uri, id="4711")} == {"FINISHED"}
    assert not any("cpfean.file." in tag for run in runs(uri) for tag in run.data.tags)
    assert send() == (True, [])
    (parent,) = runs(uri, role="parent")
    assert files_of(uri, parent) == {"report.md"}
    assert all(files_of(uri, run) == {"config.toml"} for run in runs(uri, role="trial"))


def test_a_library_s_message_is_told_with_its_remedy(uri: str) -> None:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        database.execute("UPDATE alembic_version SET version_num = 'of-long-ago'")
        database.commit()
    study = Tracked(uri)
    study.follower.meet(seconds=30)
    assert not study.follower.close()
    assert "mlflow db upgrade" in study.said[0]
    assert "training goes on" in study.said[0]
