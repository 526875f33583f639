"""doctor.py as a user calls it, each of its lines red in turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cpfean.data.synthetic import write_synthetic
from cpfean.errors import ServiceError
from experiments import command_line
from experiments import doctor as command
from orchestration.cluster import connection, doctor
from orchestration.cluster.capacity import Cluster
from tests.experiments.conftest import Run
from tests.orchestration.samples import TINY

LINES = ("token", "cluster", "nodes", "storage", "disk", "data", "tracking", "runs")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For data and records that are made once."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def examined(
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, dict[str, str]]]:
    """Runs the command against a cluster that is well; the state and text of each line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("CPFEAN_CACHE", str(shared / "cache"))
    monkeypatch.setenv("CPFEAN_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared / 'mlflow.db'}")
    well = Cluster(cpus=8, gpus=2, is_local=False)
    monkeypatch.setattr(connection, "connect", lambda settings: well)
    same = {"head": doctor.versions(), "worker": doctor.versions()}
    monkeypatch.setattr(doctor, "ask_nodes", lambda storage: same)
    monkeypatch.chdir(tmp_path)

    def examine(*words: str) -> tuple[int, dict[str, str]]:
        monkeypatch.setattr("sys.argv", ["doctor.py", "--address", "10.0.0.1:6379", *words])
        with pytest.raises(SystemExit) as ended:
            command.main()
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        lines = [line for line in printed.out.splitlines() if line[:4] in ("ok  ", "FAIL")]
        names = {line[6:16].strip(): line[:4].strip() + " " + line[16:] for line in lines}
        fixes = printed.out.count("fix: ")
        assert fixes == sum(text.startswith("FAIL") for text in names.values())
        return int(ended.value.code or 0), names

    return examine


def test_a_cluster_that_is_well_has_a_line_for_each_thing_and_ends_with_0(
    examined: Callable[..., tuple[int, dict[str, str]]],
) -> None:
    code, lines = examined()
    assert tuple(lines) == LINES
    assert all(text.startswith("ok") for text in lines.values()), lines
    assert code == 0


def no_token(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.delenv("RAY_AUTH_TOKEN")
    patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "none"))


def silent_cluster(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def refuse(settings: command_line.Settings) -> Cluster:
        raise ServiceError("no Ray cluster answers at 10.0.0.1:6379")

    patch.setattr(connection, "connect", refuse)


def drift(patch: pytest.MonkeyPatch, folder: Path) -> None:
    other = {"worker": doctor.versions() | {"torch": "1.0"}}
    patch.setattr(doctor, "ask_nodes", lambda storage: other)


def storage_of_one_machine(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.delenv("CPFEAN_STORAGE")


def full_disk(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr("shutil.disk_usage", lambda at: type("Usage", (), {"free": 1e9}))


def half_the_data(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "train_caps.txt").write_text("a dog\n")


def broken_tracker(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "bad.db").write_text("not a database " * 1000)
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'bad.db'}")


def lost_run(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def lost(settings: command_line.Settings, *, repair: bool, **_: object) -> str:
        raise doctor.Ill("1 run(s) of lost are RUNNING and nobody runs them", "--repair")

    patch.setattr(doctor, "check_runs", lost)


ILLS: dict[str, tuple[Callable[[pytest.MonkeyPatch, Path], None], str, set[str]]] = {
    "token": (no_token, "does not exist", set()),
    "cluster": (silent_cluster, "no Ray cluster answers", set()),
    "nodes": (drift, "worker: torch 1.0 there", set()),
    "storage": (storage_of_one_machine, "CPFEAN_STORAGE is not set", set()),
    "disk": (full_disk, "1.0 GB free", set()),
    "data": (half_the_data, "faults in the data", set()),
    "tracking": (broken_tracker, "bad.db", {"runs"}),  # whoever runs is written there
    "runs": (lost_run, "nobody runs them", set()),
}


@pytest.mark.parametrize("name", LINES)
def test_each_line_turns_red_alone(
    name: str,
    examined: Callable[..., tuple[int, dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    spoil, says, follows = ILLS[name]
    spoil(monkeypatch, tmp_path)
    words = ["--data", str(tmp_path / "data")] if name == "data" else []
    code, lines = examined(*words)
    assert tuple(lines) == LINES
    red = {line for line, text in lines.items() if text.startswith("FAIL")}
    assert red == {name} | follows, lines
    assert says in lines[name]
    assert code == 5


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://127.0.0.1:8265", "job server"),
        ("ray://127.0.0.1:10001", "client server"),
        ("127.0.0.1", "127.0.0.1:6379"),
        ("auto", 'is "auto"'),
    ],
)
def test_an_address_that_is_none_is_named_and_the_rest_is_looked_at(
    address: str, told: str, run: Run, tmp_path: Path
) -> None:
    write_synthetic(tmp_path / "data", TINY.data.synthetic)
    answer = run("doctor.py", "--data", "data", environment={"RAY_ADDRESS": address})
    assert answer.returncode == 5
    lines = answer.stdout.splitlines()
    (failed,) = [line for line in lines if line.startswith("FAIL")]
    assert "RAY_ADDRESS" in failed
    assert told in failed
    looked_at = [line[6:16].strip() for line in lines if line.startswith("ok")]
    assert looked_at == ["storage", "disk", "data", "tracking", "runs"]
