"""A real MLflow server that goes away, comes back, and answers wrongly; a store that is locked."""

import fcntl
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus

from cpfean.errors import ServiceError
from cpfean.records.run_folder import RunFolder
from orchestration.cluster import doctor
from orchestration.runners.on_ray import OnRay
from orchestration.settings import Settings
from orchestration.study.follower import Pauses
from orchestration.study.plan import StudyPlan
from orchestration.study.study import run_study
from orchestration.tracking.stores import open_store
from tests.faults import Fault, Postgres, Proxy, TrackingServer, small_disk
from tests.lab.hosts import wait_until
from tests.orchestration.runners.test_in_process import plan_of
from tests.orchestration.samples import TINY, record, run_here
from tests.orchestration.study.scripted import SPACE
from tests.orchestration.tracking.test_models import send, write_model
from tests.orchestration.tracking.tracked import (
    Tracked,
    named,
    points,
    runs,
    steps,
    track,
    wait_for,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    server = TrackingServer(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def proxy(server: TrackingServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")


SOON = Pauses(retry=0.2, away=2.0)


def follow(uri: str, id: str) -> Tracked:
    return Tracked(uri, named(id), pauses=SOON)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("refuse", marks=pytest.mark.long),
        "hang",
        "lose",
        500,
        404,
        *(pytest.param(more, marks=pytest.mark.drill) for more in ("reset", 400, 403)),
    ],
)
def test_whatever_a_server_does_nothing_waits_for_it_and_every_point_is_there_once(
    proxy: Proxy, server: TrackingServer, fault: Fault
) -> None:
    proxy.fault = fault
    study = follow(proxy.url, f"whole-{fault}")
    for epochs in range(1, 6):
        study.update(record(0, *range(epochs), state="running"))
    second_record = record(1, 1.0, 2.0, state="finished", test={"rsum": 3.0})
    study.update(second_record)
    if fault == "refuse":
        wait_until(lambda: study.said != [], seconds=20, what="the warning")
    else:
        wait_until(lambda: proxy.met >= 2, seconds=20, what="two tries")
    proxy.fault = "none"
    for waiting in (record(0, *range(5), state="running"), second_record):
        wait_for(server.url, waiting, id=study.run.id)
    study.update(record(0, *range(6), state="finished"))
    assert study.end(), study.said
    assert study.slowest < 0.05
    assert len(study.said) == 1
    assert "training goes on" in study.said[0]
    (parent,) = study.runs(server.url, role="parent")
    first, second = (study.runs(server.url, trial=str(number))[0] for number in (0, 1))
    assert len(study.runs(server.url)) == 3
    assert steps(server.url, first) == [1, 2, 3, 4, 5, 6]
    assert steps(server.url, second) == [1, 2]
    assert second.data.metrics["test/rsum"] == 3.0
    assert {run.info.status for run in (parent, first, second)} == {"FINISHED"}
    assert "config.toml" in {
        file.path for file in MlflowClient(server.url).list_artifacts(first.info.run_id)
    }


@pytest.mark.parametrize("verb", [b"runs/create", b"runs/log-batch", b"runs/set-tag"])
def test_a_request_whose_answer_is_lost_counts_once(
    proxy: Proxy, server: TrackingServer, verb: bytes
) -> None:
    study = follow(proxy.url, f"lost-{verb.decode().replace('/', '-')}")
    proxy.only = lambda head: verb in head.split(b"\r\n")[0]
    proxy.fault = "lose"
    study.update(record(0, 1.0, 2.0, 3.0, state="running"))
    wait_until(lambda: proxy.met >= 2, seconds=30, what="two lost answers")
    proxy.fault = "none"
    study.update(record(0, 1.0, 2.0, 3.0, 4.0, state="finished"))
    assert study.end(), study.said
    (parent,) = study.runs(server.url, role="parent")
    (child,) = study.runs(server.url, role="trial")
    assert points(server.url, child) == [(n, float(n)) for n in range(1, 5)]
    assert {run.info.status for run in (parent, child)} == {"FINISHED"}


def test_a_slow_server_slows_nobody_down(proxy: Proxy, server: TrackingServer) -> None:
    proxy.delay = 0.1
    study = follow(proxy.url, "slow")
    for epochs in range(1, 40):
        study.update(record(0, *range(epochs), state="running"))
    assert study.slowest < 0.05
    assert study.end()
    (child,) = study.runs(server.url, role="trial")
    assert steps(server.url, child) == list(range(1, 40))


@pytest.mark.parametrize("fault", ["refuse", pytest.param("hang", marks=pytest.mark.long)])
def test_the_end_does_not_wait_for_a_server_that_is_known_to_be_away(
    proxy: Proxy, server: TrackingServer, fault: Fault
) -> None:
    proxy.fault = fault
    study = follow(proxy.url, f"end-{fault}")
    study.update(record(0, 1.0, 2.0, state="finished"))
    wait_until(lambda: study.said != [], seconds=20, what="the warning")
    began = time.monotonic()
    assert not study.end()
    assert time.monotonic() - began < 4.0
    assert study.said[1:] == ["tracking: 2 epoch(s) are not sent; they are kept in the records."]
    proxy.fault = "none"
    again = follow(proxy.url, f"end-{fault}")
    again.update(record(0, 1.0, 2.0, state="finished"))
    assert again.end()
    assert again.said == []
    (child,) = again.runs(server.url, role="trial")
    assert steps(server.url, child) == [1, 2]


@pytest.mark.long
def test_a_deleted_run_is_told_of_once_and_the_others_are_sent(
    proxy: Proxy, server: TrackingServer
) -> None:
    study = follow(proxy.url, "deleted")
    begun = [record(number, 1.0, state="running") for number in (0, 1)]
    study.update(*begun)
    for trial in begun:
        wait_for(server.url, trial, id="deleted")
    (gone,) = study.runs(server.url, trial="0")
    MlflowClient(server.url).delete_run(gone.info.run_id)
    requests = 0

    def counted(head: bytes) -> bool:
        nonlocal requests
        requests += b"log-batch" in head.split(b"\r\n")[0]
        return False

    proxy.only, proxy.fault = counted, 500
    study.update(record(0, 1.0, 2.0, state="running"))
    wait_until(lambda: study.said != [], seconds=30, what="the refusal")
    for epochs in range(3, 30):
        study.update(record(0, *range(epochs), state="running"))
        time.sleep(0.02)
    study.update(other_record := record(1, 1.0, 2.0, state="finished"))
    wait_for(server.url, other_record, id="deleted")
    # It is asked once, and not again for every epoch; the other's epoch and state are two more.
    assert requests <= 4
    study.update(record(0, *range(30), state="finished"))
    assert not study.end()
    assert len(study.said) == 2
    assert "refuses trial-000" in study.said[0]
    assert "deleted" in study.said[0]
    assert study.said[1].startswith("tracking: 29 epoch(s) are not sent")
    (other,) = study.runs(server.url, role="trial")
    assert (other.info.status, steps(server.url, other)) == ("FINISHED", [1, 2])
    # Who asks for the rest gets a new run with all of it.
    again = follow(proxy.url, "deleted")
    again.update(record(0, *range(30), state="finished"))
    assert again.end()
    (new,) = again.runs(server.url, trial="0")
    assert steps(server.url, new) == list(range(1, 31))


def test_a_parameter_that_somebody_else_has_set_costs_no_number(
    proxy: Proxy, server: TrackingServer
) -> None:
    client, experiment = open_store(server.url)
    tags = {"cpfean.id": "conflict", "cpfean.trial": "0", "cpfean.role": "trial"}
    run = client.create_run(experiment, tags=tags)
    client.log_param(run.info.run_id, "loss.margin", "17")
    study = follow(proxy.url, "conflict")
    study.update(record(0, 1.0, 2.0, state="finished"))
    study.update(record(1, 1.0, state="finished"))
    assert not study.end()
    (said,) = study.said
    assert "refuses trial-000" in said
    assert "loss.margin" in said
    children = {r.data.tags["cpfean.trial"]: r for r in study.runs(server.url, role="trial")}
    assert steps(server.url, children["0"]) == [1, 2]
    assert {child.info.status for child in children.values()} == {"FINISHED"}
    assert children["1"].data.params["loss.margin"] == str(TINY.loss.margin)


@pytest.mark.long
def test_a_server_that_is_killed_and_started_again_has_all_of_a_training(
    where: Settings, server: TrackingServer
) -> None:
    where = replace(where, tracking_uri=server.url)
    said: list[str] = []
    back: list[threading.Thread] = []

    def disturb(line: str) -> None:
        """Called between epochs: the server is away for the middle third."""
        said.append(line)
        if "epoch 2/" in line:
            server.kill()
        elif "epoch 4/" in line:
            back.append(threading.Thread(target=server.start))
            back[0].start()
        elif "epoch 6/" in line:
            back[0].join()

    config = TINY.with_overrides({"optim.epochs": 6})
    result = run_here(plan_of(config, where, "killed"), where, resume=False, say=disturb)
    (run,) = [run for run in runs(server.url, kind="train") if run.info.run_name == "killed"]
    assert points(server.url, run) == [
        (row["epoch"], row["val/rsum"]) for row in result.records[0].history
    ]
    assert run.info.status == "FINISHED"
    assert sum(line.startswith("tracking:") for line in said) == 1


def test_what_was_not_sent_is_sent_by_a_resume_that_trains_nothing(
    where: Settings, proxy: Proxy, server: TrackingServer
) -> None:
    proxy.fault = "refuse"
    where = Settings(output=where.output, cache_dir=where.cache_dir, tracking_uri=proxy.url)
    plan = plan_of(TINY, where, "later")
    said: list[str] = []
    result = run_here(plan, where, resume=False, say=said.append)
    assert said[-1].startswith("tracking: not everything is sent; the rest is sent by:\n")
    assert said[-1].endswith("train.py --resume --name later")
    proxy.fault = "none"
    said.clear()
    again = run_here(plan, where, resume=True, say=said.append)
    assert again.records == result.records
    assert not any("  epoch " in line for line in said)
    (run,) = [r for r in runs(server.url, kind="train") if r.info.run_name == "later"]
    assert (run.info.status, steps(server.url, run)) == ("FINISHED", [1, 2])


def test_a_sweep_that_is_settled_is_sent_by_a_resume_without_ray(
    where: Settings, proxy: Proxy, server: TrackingServer
) -> None:
    where = replace(where, address="127.0.0.1:1")  # whoever asked for a cluster would get none
    plan = StudyPlan(
        kind="sweep",
        name="settled",
        base=TINY,
        trials=2,
        workers=1,
        space=SPACE,
        data_folder=where.cache_dir,
        data_fingerprint="0",
    )
    folder = RunFolder(where.output / "settled")
    folder.create(plan.identity())
    best = record(0, 1.0, 2.0, state="finished", overrides={"loss.margin": 0.2}, test={"rsum": 2.0})
    folder.write(best)
    folder.write(record(1, 1.0, state="pruned", overrides={"loss.margin": 0.3}))
    where = replace(where, tracking_uri=proxy.url)
    proxy.fault = "refuse"
    said: list[str] = []
    assert run_study(plan, where, runner=OnRay(where), resume=True, say=said.append).exit_code == 0
    assert said[-1].startswith("tracking: not everything is sent; the rest is sent by:\n")
    assert said[-1].endswith("sweep.py --resume --name settled")
    proxy.fault = "none"
    said.clear()
    run_study(plan, where, runner=OnRay(where), resume=True, say=said.append)
    assert not any("tracking" in line for line in said)
    assert {run.info.status for run in runs(server.url, id=folder.id)} == {"FINISHED"}
    trials = runs(server.url, id=folder.id, role="trial")
    children = {run.data.tags["cpfean.trial"]: steps(server.url, run) for run in trials}
    assert children == {"0": [1, 2], "1": [1]}


@pytest.mark.drill
def test_a_server_may_keep_its_runs_in_postgresql(tmp_path: Path) -> None:
    database = Postgres(tmp_path)
    own = TrackingServer(tmp_path, store=database.uri)
    try:
        own.start()
        for id in ("first", "second"):
            study = follow(own.url, id)
            study.update(record(0, 1.0, 2.0, state="running"))
            study.update(record(0, 1.0, 2.0, 3.0, state="finished", test={"rsum": 2.5}))
            study.update(record(1, 1.0, state="pruned"))
            assert study.end(), study.said
            children = {r.data.tags["cpfean.trial"]: r for r in study.runs(own.url, role="trial")}
            assert steps(own.url, children["0"]) == [1, 2, 3]
            assert steps(own.url, children["1"]) == [1]
            assert {r.info.status for r in study.runs(own.url)} == {"FINISHED"}
            assert len(study.runs(own.url)) == 3
    finally:
        own.kill()
        database.stop()


@pytest.mark.drill
def test_a_locked_database_is_named_and_stalls_nobody(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    uri = f"sqlite:///{file}"
    open_store(uri)
    held = sqlite3.connect(file, isolation_level=None, timeout=30)
    held.execute("BEGIN EXCLUSIVE")
    study = follow(uri, "locked")
    study.update(record(0, 1.0, 2.0, state="finished"))
    wait_until(lambda: study.said != [], seconds=40, what="the warning")
    assert study.slowest < 0.05
    assert str(file) in study.said[0]
    assert f"locked by another process, see `fuser {file}`" in study.said[0]
    began = time.monotonic()
    held.execute("ROLLBACK")
    held.close()
    assert study.end()
    assert time.monotonic() - began < 30
    (child,) = study.runs(uri, role="trial")
    assert steps(uri, child) == [1, 2]


def test_a_database_that_is_read_only_is_named(tmp_path: Path, empty_store: bytes) -> None:
    with small_disk(tmp_path / "disk", kilobytes=4096) as disk:
        uri = f"sqlite:///{disk / 'mlflow.db'}"
        (disk / "mlflow.db").write_bytes(empty_store)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        study = follow(uri, "read-only")
        study.update(record(0, 1.0, state="finished"))
        assert not study.end()
    assert "mlflow.db: cannot be written" in study.said[0]
    assert "Read-only file system" in study.said[0]


def test_who_opens_a_database_for_too_long_is_not_waited_for(tmp_path: Path) -> None:
    with (tmp_path / ".mlflow.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ServiceError, match=r"mlflow\.db: another process has been opening"):
            open_store(f"sqlite:///{tmp_path / 'mlflow.db'}", lock_seconds=0.3)


_OPEN_TOGETHER = """
import multiprocessing, sys, tempfile
from pathlib import Path
import mlflow
from orchestration.tracking.stores import open_store

def open_one(barrier, uri, failures):
    barrier.wait()
    try:
        client, experiment = open_store(uri, lock_seconds=300)
        run = client.create_run(experiment)
        client.log_metric(run.info.run_id, "x", 1.0)
    except Exception as error:
        failures.put(repr(error))

fork = multiprocessing.get_context("fork")
for number in range(int(sys.argv[2])):
    uri = f"sqlite:///{Path(sys.argv[1]) / f'{number}.db'}"
    barrier, failures = fork.Barrier(8), fork.Queue()
    openers = [
        fork.Process(target=open_one, args=(barrier, uri, failures)) for _ in range(8)
    ]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert failures.empty(), failures.get()
    client, experiment = open_store(uri)
    assert len(client.search_runs([experiment])) == 8
print("all opened")
"""


@pytest.mark.parametrize(
    "rounds",
    [pytest.param(1, marks=pytest.mark.long), pytest.param(20, marks=pytest.mark.drill)],
)
def test_eight_processes_may_open_an_empty_database_at_once(tmp_path: Path, rounds: int) -> None:
    done: Any = subprocess.run(
        [sys.executable, "-c", _OPEN_TOGETHER, str(tmp_path), str(rounds)],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.stdout.strip() == "all opened", done.stderr


@pytest.mark.long
def test_files_of_a_server_that_has_them_on_its_own_disk_are_not_written_to_ours(
    tmp_path: Path,
) -> None:
    files_at = tmp_path / "server's disk"
    own = TrackingServer(tmp_path, files_at=files_at)
    own.start()
    report = tmp_path / "report.md"
    report.write_text("a report")

    def send(id: str) -> Tracked:
        study = follow(own.url, id)
        study.update(record(0, 1.0, 2.0, state="finished"))
        study.follower.keep_files([report])
        assert study.end()
        return study

    try:
        study = send("elsewhere")
        (said,) = study.said
        assert "numbers are sent, files are not" in said
        assert "--artifacts-destination" in said
        assert not files_at.exists()
        (child,) = study.runs(own.url, role="trial")
        assert steps(own.url, child) == [1, 2]
        tags = [tag for run in study.runs(own.url) for tag in run.data.tags]
        assert not [tag for tag in tags if tag.startswith("cpfean.file.")]
        where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri=own.url)
        with pytest.raises(doctor.Ill, match="numbers are sent, files are not") as ill:
            doctor.check_tracking(where)
        assert "rename the experiment" in ill.value.fix
        assert not files_at.exists()
        # Where both see the same files the disk is one that they share.
        (files_at / "1" / child.info.run_id / "artifacts").mkdir(parents=True)
        (files_at / "1" / child.info.run_id / "artifacts" / "seen.txt").write_text("by both")
        assert send("shared").said == []
        assert len(list(files_at.rglob("report.md"))) == 1
        assert "takes numbers and files" in doctor.check_tracking(where)
    finally:
        own.kill()


@pytest.mark.parametrize(
    ("fault", "helps"),
    [
        (401, "MLFLOW_TRACKING_PASSWORD"),
        (403, "MLFLOW_TRACKING_PASSWORD"),
        (404, "it answers"),
        ("refuse", "tracking_server.py"),
    ],
)
def test_the_doctor_says_what_helps_a_tracker_that_does_not_take_what_it_sends(
    proxy: Proxy, tmp_path: Path, fault: Fault, helps: str
) -> None:
    where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri=proxy.url)
    proxy.only = lambda head: b"runs/" in head.split(b"\r\n")[0]
    proxy.body = b"Permission denied"  # as MLflow's own, without JSON
    proxy.fault = fault
    with pytest.raises(doctor.Ill, match=re.escape(proxy.url)) as ill:
        doctor.check_tracking(where)
    assert helps in ill.value.fix


def test_the_doctor_names_a_database_that_is_read_only(tmp_path: Path, empty_store: bytes) -> None:
    with small_disk(tmp_path / "disk", kilobytes=4096) as disk:
        (disk / "mlflow.db").write_bytes(empty_store)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        uri = f"sqlite:///{disk / 'mlflow.db'}"
        where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri=uri)
        with pytest.raises(doctor.Ill, match=r"mlflow\.db.*[Rr]ead-?only"):
            doctor.check_tracking(where)


@pytest.mark.long
@pytest.mark.parametrize("fault", ["lose", "refuse", 500])
def test_a_model_that_a_server_did_not_take_is_there_once_after_the_next_driver(
    proxy: Proxy, server: TrackingServer, tmp_path: Path, fault: Fault
) -> None:
    """Whatever was lost: the request, or only its answer."""
    run = replace(named(f"model-{fault}"), register=f"model-{fault}")
    model, best = write_model(tmp_path / "best_model"), record(0, 1.0, state="finished")
    track(proxy.url, best, run=run)
    (sent,) = runs(server.url, id=run.id, trial="0")
    proxy.only = lambda head: any(
        part in head for part in (b"logged-models", b"registered-models", b"model-versions")
    )
    proxy.fault = fault
    done, said = send(proxy.url, best, model, run=run)
    assert not done
    assert [line for line in said if "best_model" in line]
    proxy.fault = "none"
    done, said = send(proxy.url, best, model, run=run)
    assert done, said
    client = MlflowClient(server.url)
    found = client.search_logged_models([sent.info.experiment_id])
    (one,) = [each for each in found if each.source_run_id == sent.info.run_id]
    assert one.status == LoggedModelStatus.READY
    (version,) = client.search_model_versions(f"name = '{run.register}'")
    assert version.source == one.artifact_location
    assert send(proxy.url, best, model, run=run) == (True, [])
