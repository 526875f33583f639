"""Against a real MLflow on sqlite; a server that is away is a closed port."""

import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cpfean import commands
from orchestration.study.records import TrialRecord
from orchestration.tracking.tracker import (
    HEARTBEAT_TAG,
    TrackedRun,
    Tracker,
    open_store,
    tag_parent,
)
from tests.lab.hosts import wait_until
from tests.orchestration.samples import TINY, record

SWEEP = TrackedRun(id="4711", name="my-sweep", kind="sweep", parameters={"study.trials": 2})


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store with its schema: making one takes seconds."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_store(f"sqlite:///{file}")
    return file.read_bytes()


@pytest.fixture
def uri(tmp_path: Path, empty_store: bytes) -> str:
    (tmp_path / "mlflow.db").write_bytes(empty_store)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def track(uri: str, *records: TrialRecord, end: str = "", run: TrackedRun = SWEEP) -> list[str]:
    said: list[str] = []
    tracker = Tracker(uri, run, say=said.append)
    tracker.start()
    for given in records:
        tracker.update(given)
    if end:
        tracker.update_parent(end, {"best/val_rsum": 42.0})
    assert tracker.close()
    return said


def runs(uri: str, **tags: str) -> list[Run]:
    client, experiment = open_store(uri)
    query = " and ".join(f"tags.`cpfean.{name}` = '{value}'" for name, value in tags.items())
    return list(client.search_runs([experiment], query))


def steps(uri: str, run: Run, metric: str = "val/rsum") -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(run.info.run_id, metric)
    return [(point.step, point.value) for point in points]


def test_a_trial_is_a_child_with_its_parameters_metrics_and_true_state(uri: str) -> None:
    track(uri, record(0, 10.0, 30.0, state="finished", test={"rsum": 25.0}), end="finished")
    (parent,) = runs(uri, role="parent")
    (child,) = runs(uri, role="trial")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.params["loss.margin"] == str(TINY.loss.margin)
    assert set(TINY.flat()) <= set(child.data.params)
    assert steps(uri, child) == [(1, 10.0), (2, 30.0)]
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
    assert steps(uri, by_number["0"]) == [(1, 10.0), (2, 20.0)]
    assert steps(uri, by_number["1"]) == [(1, 5.0), (2, 6.0), (3, 7.0), (4, 8.0)]
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
    assert steps(uri, child) == [(1, 10.0), (2, 20.0)]


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
    alone = TrackedRun(id="1", name="my-training", kind="train")
    track(uri, record(0, 10.0, state="finished"), end="finished", run=alone)
    (run,) = runs(uri, id="1")
    assert run.info.run_name == "my-training"
    assert "mlflow.parentRunId" not in run.data.tags


def test_a_server_that_is_away_neither_stalls_nor_raises_and_gets_everything_later(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        said: list[str] = []
        tracker = Tracker(f"http://127.0.0.1:{taken.getsockname()[1]}", SWEEP, say=said.append)
        tracker.start()
        began = time.monotonic()
        for epochs in range(1, 50):
            tracker.update(record(0, *range(epochs), state="running"))
        assert time.monotonic() - began < 0.5
        assert not tracker.close(seconds=20)
    assert "training goes on" in said[0]
    assert said[1:] == ["tracking: 49 epoch(s) are not sent; they are kept in the records."]
    track(uri, record(0, *range(49), state="finished"))
    (child,) = runs(uri, role="trial")
    assert len(steps(uri, child)) == 49


def beats_of(monkeypatch: pytest.MonkeyPatch, *, beat: Any = MlflowClient.set_tag) -> list[str]:
    """The runs of all heartbeats from now on, of which there are many; `beat` sends them."""
    monkeypatch.setattr("orchestration.tracking.tracker.HEARTBEAT_SECONDS", 0.05)
    beats: list[str] = []
    set_tag = MlflowClient.set_tag

    def noted(client: MlflowClient, run_id: str, name: str, value: str) -> None:
        if name == HEARTBEAT_TAG:
            beats.append(run_id)
            beat(client, run_id, name, value)
        else:
            set_tag(client, run_id, name, value)

    monkeypatch.setattr(MlflowClient, "set_tag", noted)
    return beats


def test_open_runs_have_a_heartbeat_and_no_others(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    track(uri, record(0, 1.0, state="running"), record(1, 1.0, state="running"))  # and is killed
    for run in runs(uri, id="4711"):
        MlflowClient(uri).set_tag(run.info.run_id, HEARTBEAT_TAG, "long ago")
    beats = beats_of(monkeypatch)
    tracker = Tracker(uri, SWEEP, say=print)
    tracker.start()
    tracker.update(record(0, 1.0, 2.0, state="finished"))
    tracker.update(record(1, 1.0, state="running"))
    (parent,) = runs(uri, role="parent")
    ended, goes_on = (runs(uri, trial=str(number))[0].info.run_id for number in (0, 1))
    wait_until(lambda: beats.count(goes_on) > 2, seconds=30, what="three heartbeats")
    assert set(beats) == {parent.info.run_id, goes_on}
    tracker.update(record(1, 1.0, 2.0, state="finished"))
    wait_until(tracker._done, seconds=30, what="it is sent")
    before = beats.count(goes_on)
    total = len(beats)
    wait_until(lambda: len(beats) > total + 2, seconds=30, what="three more of the parent")
    assert beats.count(goes_on) == before
    tracker.update_parent("finished", {})
    assert tracker.close()
    tags = {run.info.run_id: run.data.tags[HEARTBEAT_TAG] for run in runs(uri, id="4711")}
    assert {id for id, beat in tags.items() if beat == "long ago"} == {ended}


def test_a_run_that_goes_on_has_a_heartbeat_at_once(uri: str) -> None:
    track(uri, record(0, 1.0, state="running"))
    (child,) = runs(uri, role="trial")
    MlflowClient(uri).set_tag(child.info.run_id, HEARTBEAT_TAG, "long ago")
    tracker = Tracker(uri, SWEEP, say=print)
    tracker.start()
    tracker.update(record(0, 1.0, state="running"))

    def beats() -> bool:
        (child,) = runs(uri, role="trial")
        return child.data.tags[HEARTBEAT_TAG] != "long ago"

    wait_until(beats, seconds=30, what="the first heartbeat")
    assert tracker.close()


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_heartbeat_that_does_not_arrive_holds_nothing_up_and_is_not_told(
    uri: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    came, over = threading.Event(), threading.Event()

    def beat(*_: Any) -> None:
        came.set()
        if fault == "hangs":
            over.wait(60)
        raise OSError("nobody answers")

    beats_of(monkeypatch, beat=beat)
    said: list[str] = []
    tracker = Tracker(uri, SWEEP, say=said.append)
    tracker.start()
    assert came.wait(30)
    try:
        if fault == "raises":
            tracker.update(record(0, 1.0, state="finished"))
        began = time.monotonic()
        assert tracker.close()
        assert time.monotonic() - began < 5
        assert said == []
        assert len(runs(uri, role="trial")) == (fault == "raises")
    finally:
        over.set()
        tracker._thread.join()


def artifacts_of(uri: str) -> Path:
    """The folder of a store's files; the copies that tests work on share it."""
    client, experiment = open_store(uri)
    return Path(urlsplit(client.get_experiment(experiment).artifact_location).path)


def files_of(uri: str, run: Run) -> set[str]:
    return {file.path for file in MlflowClient(uri).list_artifacts(run.info.run_id)}


def test_files_are_kept_with_their_trial_or_with_the_whole_and_sent_once(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, table = tmp_path / "picture.png", tmp_path / "table.csv"
    picture.write_bytes(b"a picture")
    table.write_text("a,b")
    sent: list[str] = []
    send = MlflowClient.log_artifact

    def noted(client: MlflowClient, run_id: str, file: str, *more: Any) -> None:
        sent.append(Path(file).name)
        send(client, run_id, file, *more)

    monkeypatch.setattr(MlflowClient, "log_artifact", noted)
    trial = record(0, 10.0, state="finished")

    def keep() -> None:
        tracker = Tracker(uri, SWEEP, say=print)
        tracker.start()
        # A file may be gone by the time it is sent: it is left out, and what follows is not.
        tracker.keep_files([tmp_path / "gone.png", picture], trial)
        tracker.keep_files([table])
        tracker.update(trial)
        assert tracker.close()

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
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"a picture")
    monkeypatch.setattr("orchestration.tracking.tracker._RETRY_SECONDS", 0.05)
    failures = [OSError("the store is full")] * 2
    send = MlflowClient.log_artifact

    def failing(client: MlflowClient, run_id: str, file: str, *more: Any) -> None:
        if file == str(picture) and failures:
            raise failures.pop()
        send(client, run_id, file, *more)

    monkeypatch.setattr(MlflowClient, "log_artifact", failing)
    said: list[str] = []
    tracker = Tracker(uri, SWEEP, say=said.append)
    tracker.start()
    began = time.monotonic()
    tracker.keep_files([picture], record(0, 10.0, state="running"))
    assert time.monotonic() - began < 0.5
    tracker.update(record(0, 10.0, 20.0, state="finished"))
    end = time.monotonic() + 30
    while not tracker._done():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert tracker.close()
    assert len(said) == 1
    (child,) = runs(uri, role="trial")
    assert "picture.png" in files_of(uri, child)
    assert steps(uri, child) == [(1, 10.0), (2, 20.0)]


def test_a_store_whose_maker_was_killed_is_made_anew_and_a_whole_one_is_not(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    script = f"""
import os, signal, sqlalchemy
from orchestration.tracking.tracker import open_store

@sqlalchemy.event.listens_for(sqlalchemy.Engine, "after_cursor_execute")
def die(connection, cursor, statement, *_):
    if "CREATE TABLE experiment_tags" in statement:
        os.kill(os.getpid(), signal.SIGKILL)

open_store({uri!r})
"""
    maker = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert maker.returncode == -signal.SIGKILL
    client, experiment = open_store(uri)
    run = client.create_run(experiment)
    client, experiment = open_store(uri)
    assert client.search_runs([experiment])[0].info.run_id == run.info.run_id


def test_a_deleted_experiment_is_told_before_the_first_number_and_gets_all_once_it_is_restored(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.tracking.tracker._RETRY_SECONDS", 0.05)
    client, experiment = open_store(uri)
    client.delete_experiment(experiment)
    said: list[str] = []
    tracker = Tracker(uri, SWEEP, say=said.append)
    tracker.start()
    tracker.meet(seconds=30)
    assert len(said) == 1
    assert commands.restore_experiment(uri, experiment) in said[0]
    tracker.update(record(0, 1.0, state="running"))
    client.restore_experiment(experiment)
    tracker.update(record(0, 1.0, 2.0, state="finished"))
    wait_until(tracker._done, seconds=30, what="all is sent")
    # And once more while it runs.
    client.delete_experiment(experiment)
    tracker.update(record(1, 1.0, 2.0, state="finished"))
    tracker.update_parent("finished", {})
    time.sleep(0.3)
    assert not tracker._done()
    client.restore_experiment(experiment)
    assert tracker.close()
    assert tracker.first == ""
    assert [line for line in said if "was deleted" in line] == said[:1]  # told once
    assert [steps(uri, run) for run in sorted(runs(uri, role="trial"), key=str)] == [
        [(1, 1.0), (2, 2.0)]
    ] * 2
    assert {run.info.status for run in runs(uri, id="4711")} == {"FINISHED"}


def tracked_for_an_epoch(uri: str) -> tuple[Tracker, list[str]]:
    """A tracker that has sent the first epoch of a trial, and what it says."""
    said: list[str] = []
    tracker = Tracker(uri, SWEEP, say=said.append)
    tracker.start()
    tracker.update(record(0, 1.0, state="running"))
    wait_until(lambda: runs(uri, role="trial") != [], seconds=30, what="the trial")
    wait_until(tracker._done, seconds=30, what="the first epoch")
    return tracker, said


def test_what_a_deleted_experiment_lacks_is_told_with_what_comes_before_a_resume(uri: str) -> None:
    client, experiment = open_store(uri)
    tracker, said = tracked_for_an_epoch(uri)
    client.delete_experiment(experiment)
    tracker.update(record(0, 1.0, 2.0, 3.0, state="finished"))
    assert not tracker.close()
    assert "was deleted" in said[0]
    assert said[1:] == ["tracking: 2 epoch(s) are not sent; they are kept in the records."]
    assert tracker.first == "once that is mended, "
    client.restore_experiment(experiment)
    assert track(uri, record(0, 1.0, 2.0, 3.0, state="finished"), end="finished") == []
    (child,) = runs(uri, role="trial")
    assert steps(uri, child) == [(1, 1.0), (2, 2.0), (3, 3.0)]


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
    assert [steps(uri, run) for run in found] == [[(1, 1.0), (2, 2.0)]]
    assert runs(uri, id="4711") == []  # none in the experiment that has the name now
    assert track(uri, record(0, 1.0), run=TrackedRun(id="0815", name="new", kind="train")) == []
    assert len(runs(uri, id="0815")) == 1
    tag_parent(uri, "4711", {"cpfean.change": "none"})
    (parent,) = client.search_runs([experiment], "tags.`cpfean.role` = 'parent'")
    assert parent.data.tags["cpfean.change"] == "none"


def test_a_deleted_run_is_told_at_once_with_what_brings_it_back_and_then_goes_on(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestration.tracking.tracker._REFUSED_SECONDS", 0.05)
    tracker, said = tracked_for_an_epoch(uri)
    (child,) = runs(uri, role="trial")
    client = MlflowClient(uri)
    client.delete_run(child.info.run_id)
    tracker.update(record(0, 1.0, 2.0, state="running"))
    wait_until(lambda: said != [], seconds=30, what="it is told")
    assert "refuses trial-000" in said[0]
    assert commands.restore_run(uri, child.info.run_id) in said[0]
    client.restore_run(child.info.run_id)
    wait_until(tracker._done, seconds=30, what="the second epoch is sent")
    tracker.update_parent("finished", {})
    assert tracker.close()
    assert len(said) == 1
    assert steps(uri, child) == [(1, 1.0), (2, 2.0)]


def test_each_file_is_sent_by_its_own_mark(uri: str, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        file.write_text(file.name)
    trial = record(0, 1.0, state="finished")

    def keep() -> list[str]:
        said: list[str] = []
        tracker = Tracker(uri, SWEEP, say=said.append)
        tracker.start()
        tracker.update(trial)
        tracker.keep_files(files, trial)
        tracker.keep_files(files)
        assert tracker.close()
        return said

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
        said: list[str] = []
        tracker = Tracker(uri, SWEEP, say=said.append)
        tracker.start()
        for trial in trials:
            tracker.update(trial)
        tracker.keep_files([report])
        tracker.update_parent("finished", {"best/val_rsum": 2.0})
        return tracker.close(), said

    done, said = send()
    assert not done
    assert not [line for line in said if "numbers" in line and "numbers go on" not in line]
    assert len([line for line in said if "does not take config.toml of trial-000" in line]) == 1
    assert len([line for line in said if "does not take report.md of my-sweep" in line]) == 1
    assert said[-1].startswith("tracking: 3 file(s) (config.toml, report.md) are not sent")
    assert [steps(uri, run) for run in runs(uri, role="trial")] == [[(1, 1.0), (2, 2.0)]] * 2
    assert {run.info.status for run in runs(uri, id="4711")} == {"FINISHED"}
    assert not any("cpfean.file." in tag for run in runs(uri) for tag in run.data.tags)
    folder.unlink()
    assert send() == (True, [])
    (parent,) = runs(uri, role="parent")
    assert files_of(uri, parent) == {"report.md"}
    assert all(files_of(uri, run) == {"config.toml"} for run in runs(uri, role="trial"))


def test_a_library_s_message_is_told_with_its_remedy(uri: str) -> None:
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        database.execute("UPDATE alembic_version SET version_num = 'of-long-ago'")
        database.commit()
    said: list[str] = []
    tracker = Tracker(uri, SWEEP, say=said.append)
    tracker.start()
    tracker.meet(seconds=30)
    assert not tracker.close()
    assert "mlflow db upgrade" in said[0]
    assert "training goes on" in said[0]
