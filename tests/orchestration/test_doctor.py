"""Each check of the doctor, well and ill."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from cpfean.errors import DataError
from orchestration import doctor
from orchestration.doctor import Ill, examine, versions
from orchestration.records import RunFolder
from orchestration.settings import ServiceError, Settings
from orchestration.tracking import TrackedRun, Tracker, open_store
from tests.orchestration.samples import record


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
    assert ill.value.fix == f"chmod 600 {file}"
    file.chmod(0o600)
    assert doctor.check_token() == str(file)


def test_a_cluster_that_does_not_answer_is_named(where: Settings) -> None:
    assert "this machine" in doctor.check_cluster(where)
    with pytest.raises(ServiceError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        doctor.check_cluster(replace(where, address="127.0.0.1:9"))


def test_nodes_with_other_versions_or_another_storage_are_named(
    where: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_nodes(where) == "this machine alone"
    clustered = replace(where, address="127.0.0.1:6379")
    answers: dict[str, dict[str, str] | str] = {}
    monkeypatch.setattr(doctor, "ask_nodes", lambda storage: answers)
    with pytest.raises(Ill, match="no node answers"):
        doctor.check_nodes(clustered)
    answers |= {"one": versions(), "two": versions()}
    assert doctor.check_nodes(clustered).startswith("2 node(s)")
    answers["two"] = versions() | {"torch": "1.0", "code": "abc"}
    answers["three"] = "does not see /mnt"
    with pytest.raises(Ill) as ill:
        doctor.check_nodes(clustered)
    assert "two: code abc there" in str(ill.value)
    assert "torch 1.0 there" in str(ill.value)
    assert "three: does not see /mnt" in str(ill.value)
    assert "one" not in str(ill.value)


def test_workers_that_have_not_joined_are_counted_on_the_head_of_ray_up(
    where: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    clustered = replace(where, address="127.0.0.1:6379")
    nodes = {"head": versions()}
    monkeypatch.setattr(doctor, "ask_nodes", lambda storage: nodes)
    assert doctor.check_nodes(clustered).startswith("1 node(s)")  # started by hand
    types = {"head": {"max_workers": 0}, "gpu-worker": {"min_workers": 1}}
    config = tmp_path / "ray_bootstrap_config.yaml"
    config.write_text(json.dumps({"available_node_types": types}))
    with pytest.raises(Ill, match=r"0 of 1 worker\(s\) have joined") as ill:
        doctor.check_nodes(clustered)
    assert "ray monitor" in ill.value.fix
    nodes["worker"] = versions()
    assert doctor.check_nodes(clustered).startswith("2 node(s)")


def test_storage_takes_and_gives_back(where: Settings, tmp_path: Path) -> None:
    storage = tmp_path / "shared"
    assert doctor.check_storage(replace(where, storage=str(storage))) == str(storage)
    assert list(storage.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(Ill, match="cannot be written"):
        doctor.check_storage(replace(where, storage=str(tmp_path / "file" / "below")))
    with pytest.raises(Ill, match="CPFEAN_STORAGE is not set"):
        doctor.check_storage(replace(where, address="127.0.0.1:6379"))


def test_a_disk_that_is_nearly_full_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(7.2e9))
    assert "7 GB at" in doctor.check_disk([tmp_path / "not" / "there"])
    with pytest.raises(Ill, match=r"7\.2 GB free, 10 GB are the least"):
        doctor.check_disk([tmp_path], least_gb=10)


def test_a_tracker_that_does_not_answer_is_named(where: Settings, tmp_path: Path) -> None:
    assert doctor.check_tracking(where) == where.tracking_uri
    (tmp_path / "bad.db").write_text("not a database " * 1000)
    with pytest.raises(Ill, match=r"bad\.db") as ill:
        doctor.check_tracking(replace(where, tracking_uri=f"sqlite:///{tmp_path / 'bad.db'}"))
    assert "tracking_server.py" in ill.value.fix


def test_runs_that_nobody_runs_are_found_and_closed(where: Settings) -> None:
    def begin(name: str) -> RunFolder:
        folder = RunFolder(where.output / name)
        folder.create({"kind": "sweep"})
        run = TrackedRun(id=folder.id, name=name, kind="sweep")
        tracker = Tracker(where.tracking_uri, run, say=print)
        tracker.start()
        tracker.update(record(0, 100.0, state="running"))
        assert tracker.close()
        return folder

    def states() -> dict[str, str]:
        client, experiment = open_store(where.tracking_uri)
        runs = client.search_runs([experiment], "tags.`cpfean.role` = 'trial'")
        return {run.data.tags["cpfean.sweep"]: run.info.status for run in runs}

    lives, _, moved = begin("lives"), begin("lost"), begin("moved")
    shutil.rmtree(moved.path)
    with lives.lock():
        with pytest.raises(Ill, match=r"2 run\(s\) of lost are RUNNING") as ill:
            doctor.check_runs(where, repair=False)
        assert "doctor.py --repair" in ill.value.fix
        told = doctor.check_runs(where, repair=True)
        assert told == "2 of lost closed as KILLED; 2 belong to folders that are not here"
        assert states() == {"lives": "RUNNING", "lost": "KILLED", "moved": "RUNNING"}
        assert doctor.check_runs(where, repair=False).startswith("2 belong to folders")
