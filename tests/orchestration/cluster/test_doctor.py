"""Each check of the doctor, well and ill."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mlflow.entities import Run, ViewType

from cpfean import commands
from cpfean.errors import DataError, ServiceError
from cpfean.records.run_folder import RunFolder
from orchestration.cluster import doctor
from orchestration.cluster.doctor import Ill, examine
from orchestration.cluster.versions import Answer
from orchestration.settings import Settings
from orchestration.tracking.runs import HEARTBEAT_TAG, TrackedRun
from orchestration.tracking.stores import open_store
from orchestration.versions import versions
from tests.orchestration.samples import record
from tests.orchestration.tracking.tracked import track
from tests.orchestration.tracking_store import new_store


@pytest.fixture
def where(where: Settings, tmp_path: Path) -> Settings:
    """With a tracking store that is there already."""
    assert new_store(tmp_path / "mlflow.db") == where.tracking_uri
    return where


def test_one_ill_check_does_not_keep_the_others_from_being_run() -> None:
    def ill() -> str:
        raise Ill("broken", "mend it")

    def refused() -> str:
        raise DataError("row 3 is short\n  write it again")

    def falls_over() -> str:
        raise OSError("no such device")

    checks = {"a": ill, "b": refused, "c": falls_over, "d": lambda: "fine"}
    found = [(finding.ok, finding.text, finding.fix) for finding in examine(checks)]
    assert found == [
        (False, "broken", "mend it"),
        (False, "row 3 is short", "write it again"),
        (False, "no such device", "see the message"),
        (True, "fine", ""),
    ]


def test_the_token_is_there_and_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(Ill, match="does not exist") as ill:
        doctor.check_token()
    assert "ray get-auth-token --generate" in ill.value.fix
    file.write_text("secret")
    file.chmod(0o644)
    with pytest.raises(Ill, match="can be read by others") as ill:
        doctor.check_token()
    assert ill.value.fix == commands.for_owner_alone(file)
    file.chmod(0o600)
    assert doctor.check_token() == str(file)


def test_a_cluster_that_does_not_answer_is_named(where: Settings) -> None:
    assert "this machine" in doctor.check_cluster(where)
    with pytest.raises(ServiceError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        doctor.check_cluster(replace(where, address="127.0.0.1:9"))


def test_nodes_with_other_versions_or_another_storage_are_named(where: Settings) -> None:
    assert doctor.check_nodes(where) == "this machine alone"
    clustered = replace(where, address="127.0.0.1:6379")
    answers: dict[str, Answer] = {}

    def check() -> str:
        return doctor.check_nodes(clustered, ask=lambda storage: answers)

    with pytest.raises(Ill, match="no node answers"):
        check()
    answers |= {"one": versions(), "two": versions()}
    assert check().startswith("2 node(s)")
    answers["two"] = versions() | {"torch": "1.0", "code": "abc"}
    answers["three"] = "does not see /mnt"
    with pytest.raises(Ill) as ill:
        check()
    assert "two: code abc there" in str(ill.value)
    assert "torch 1.0 there" in str(ill.value)
    assert "three: does not see /mnt" in str(ill.value)
    assert "one" not in str(ill.value)


def test_workers_that_have_not_joined_are_counted_on_the_head_of_ray_up(
    where: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    clustered = replace(where, address="127.0.0.1:6379")
    nodes: dict[str, Answer] = {"head": versions()}

    def check() -> str:
        return doctor.check_nodes(clustered, ask=lambda storage: nodes)

    assert check().startswith("1 node(s)")  # started by hand
    types = {"head": {"max_workers": 0}, "gpu-worker": {"min_workers": 1}}
    config = tmp_path / "ray_bootstrap_config.yaml"
    config.write_text(json.dumps({"available_node_types": types}))
    with pytest.raises(Ill, match=r"0 of 1 worker\(s\) have joined") as ill:
        check()
    assert "ray monitor" in ill.value.fix
    nodes["worker"] = versions()
    assert check().startswith("2 node(s)")


def test_storage_takes_and_gives_back(where: Settings, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    assert doctor.check_storage(replace(where, storage=str(storage))) == str(storage)
    assert list(storage.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match=r"cannot be written.*\nrights, credentials, space"):
        doctor.check_storage(replace(where, storage=str(tmp_path / "file" / "below")))
    with pytest.raises(Ill, match="CPFEAN_STORAGE is not set"):
        doctor.check_storage(replace(where, address="127.0.0.1:6379"))


def test_a_disk_that_is_nearly_full_is_named(tmp_path: Path) -> None:
    assert "GB at" in doctor.check_disk([tmp_path / "not" / "there"], least_gb=0.0)
    with pytest.raises(Ill, match=r"GB free, 1000000000 GB are the least"):
        doctor.check_disk([tmp_path], least_gb=1e9)


def test_a_tracker_that_does_not_answer_is_named(where: Settings, tmp_path: Path) -> None:
    new = f"sqlite:///{tmp_path / 'new.db'}"
    found = doctor.check_tracking(replace(where, tracking_uri=new))
    assert found == f"{new} takes numbers and files"
    (tmp_path / "bad.db").write_text("not a database " * 1000)
    with pytest.raises(Ill, match=r"bad\.db") as ill:
        doctor.check_tracking(replace(where, tracking_uri=f"sqlite:///{tmp_path / 'bad.db'}"))
    assert "tracking_server.py" in ill.value.fix


def test_what_the_doctor_writes_into_a_tracker_is_removed_and_written_again_next_time(
    where: Settings,
) -> None:
    for _ in range(2):
        doctor.check_tracking(where)
    client, experiment = open_store(where.tracking_uri)
    assert client.search_runs([experiment]) == []
    (probe,) = client.search_runs([experiment], run_view_type=ViewType.DELETED_ONLY)
    assert (probe.info.run_name, probe.info.status) == ("doctor", "FINISHED")
    assert [p for p in where.output.parent.rglob("probe*") if p.is_file()] == []


def test_a_tracker_that_takes_numbers_and_no_files_is_ill(where: Settings, tmp_path: Path) -> None:
    open_store(where.tracking_uri)
    (tmp_path / "mlflow-artifacts").write_text("in the way")
    with pytest.raises(Ill, match=r"numbers are taken, files are not .*mlflow-artifacts"):
        doctor.check_tracking(where)
    assert (tmp_path / "mlflow-artifacts").read_text() == "in the way"


def test_a_deleted_experiment_is_ill_and_a_renamed_one_is_told(where: Settings) -> None:
    folder = begin(where, "old")
    client, experiment = open_store(where.tracking_uri)
    client.delete_experiment(experiment)
    with pytest.raises(Ill, match=r"'cpfean' of .* was deleted") as ill:
        doctor.check_tracking(where)
    assert commands.restore_experiment(where.tracking_uri, experiment) in ill.value.fix
    client.restore_experiment(experiment)
    client.rename_experiment(experiment, "thesis")
    assert doctor.check_tracking(where).endswith("; runs of ours are also in 'thesis'")
    with folder.lock():
        assert doctor.check_runs(where, repair=False) == "none is left without its driver"
    with pytest.raises(Ill, match=r"2 run\(s\) of old are RUNNING"):
        doctor.check_runs(where, repair=False)


def begin(where: Settings, name: str) -> RunFolder:
    """A study whose driver is gone: its runs are RUNNING."""
    folder = RunFolder(where.output / name)
    folder.create({"kind": "sweep"})
    run = TrackedRun(id=folder.id, name=name, kind="sweep")
    track(where.tracking_uri, record(0, 100.0, state="running"), run=run)
    return folder


def move(folder: RunFolder) -> None:
    """To another machine, for all that is known here."""
    shutil.rmtree(folder.path)


def beat(where: Settings, id: str, *, hours: float = 0.0, role: str = "parent") -> None:
    """A heartbeat by a clock that is so many hours ahead."""
    client, experiment = open_store(where.tracking_uri)
    when = datetime.now(UTC) + timedelta(hours=hours)
    query = f"tags.`cpfean.id` = '{id}' and tags.`cpfean.role` = '{role}'"
    for run in client.search_runs([experiment], query):
        client.set_tag(run.info.run_id, HEARTBEAT_TAG, when.isoformat(timespec="milliseconds"))


def runs(where: Settings, role: str = "trial") -> dict[str, Run]:
    client, experiment = open_store(where.tracking_uri)
    found = client.search_runs([experiment], f"tags.`cpfean.role` = '{role}'")
    return {run.data.tags["cpfean.sweep"]: run for run in found}


def states(where: Settings) -> dict[str, str]:
    return {name: run.info.status for name, run in runs(where).items()}


def not_at_all(seconds: float) -> None:
    """A wait that is over at once."""


def test_runs_that_nobody_runs_are_found_and_closed(where: Settings) -> None:
    lives, _, moved = begin(where, "lives"), begin(where, "lost"), begin(where, "moved")
    move(moved)
    with lives.lock():
        with pytest.raises(Ill, match=r"2 run\(s\) of lost are RUNNING") as ill:
            doctor.check_runs(where, repair=False)
        assert "doctor.py --repair" in ill.value.fix
        said: list[str] = []
        told = doctor.check_runs(where, repair=True, say=said.append, wait=not_at_all)
        assert said == ["watching 2 run(s) of lost for 180 s ..."]
        assert told == "2 of lost closed as KILLED; 2 have a driver elsewhere"
        assert states(where) == {"lives": "RUNNING", "lost": "KILLED", "moved": "RUNNING"}
        assert doctor.check_runs(where, repair=False) == "2 have a driver elsewhere"


def test_a_run_elsewhere_is_lost_when_its_heartbeat_is_old_and_runs_again_when_it_is_resumed(
    where: Settings,
) -> None:
    moved = begin(where, "moved")
    id = moved.id
    move(moved)
    for role in ("parent", "trial"):
        beat(where, id, hours=-3 / 60 - 0.01, role=role)
    client, experiment = open_store(where.tracking_uri)
    foreign = client.create_run(experiment)
    with pytest.raises(Ill, match=r"2 run\(s\) of moved are RUNNING"):
        doctor.check_runs(where, repair=False)
    told = doctor.check_runs(where, repair=True, wait=not_at_all)
    assert told == "2 of moved closed as KILLED"
    for role in ("parent", "trial"):
        closed = runs(where, role)["moved"]
        assert closed.info.status == "KILLED"
        assert closed.data.tags["cpfean.state"] == "interrupted"
        assert closed.data.tags["cpfean.reaped"].startswith("last heartbeat: 20")
    assert client.get_run(foreign.info.run_id).info.status == "RUNNING"
    run = TrackedRun(id=id, name="moved", kind="sweep")
    track(where.tracking_uri, record(0, 100.0, state="running"), run=run)
    assert runs(where, "parent")["moved"].info.status == states(where)["moved"] == "RUNNING"


@pytest.mark.parametrize("hours", [-1.0, 1.0])
def test_a_clock_that_is_wrong_closes_no_run_that_beats_and_keeps_none_that_does_not(
    where: Settings, hours: float
) -> None:
    lives, lost = begin(where, "lives"), begin(where, "lost")
    for folder in (lives, lost):
        for role in ("parent", "trial"):
            beat(where, folder.id, hours=hours, role=role)
    id = lives.id
    move(lives)
    move(lost)

    def beats(seconds: float) -> None:
        assert seconds == 3 * 60
        beat(where, id, hours=hours + seconds / 3600)

    told = doctor.check_runs(where, repair=True, wait=beats)
    assert told == "2 of lost closed as KILLED; 2 have a driver elsewhere"
    assert states(where) == {"lives": "RUNNING", "lost": "KILLED"}


def test_a_copied_folder_does_not_close_the_runs_of_the_driver_that_beats(where: Settings) -> None:
    folder = begin(where, "copied")  # nobody here holds it
    told = doctor.check_runs(where, repair=True, wait=lambda _: beat(where, folder.id, hours=0.05))
    assert told == "2 have a driver elsewhere"
    assert states(where) == {"copied": "RUNNING"}


def test_a_run_elsewhere_that_never_had_a_heartbeat_is_left_alone(where: Settings) -> None:
    moved = begin(where, "moved")
    move(moved)
    client, _ = open_store(where.tracking_uri)
    for role in ("parent", "trial"):
        client.delete_tag(runs(where, role)["moved"].info.run_id, HEARTBEAT_TAG)
    told = doctor.check_runs(where, repair=True, wait=not_at_all)
    assert told == "2 without a heartbeat belong to folders that are not here"
    assert states(where) == {"moved": "RUNNING"}
