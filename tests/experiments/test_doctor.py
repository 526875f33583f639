"""doctor.py as a user calls it, each of its lines red in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cpfean.data.synthetic import write_synthetic
from cpfean.errors import ServiceError
from experiments import doctor as command
from orchestration.cluster.capacity import Cluster
from orchestration.cluster.versions import Answer
from orchestration.settings import Settings
from orchestration.versions import versions
from tests.experiments.conftest import Run
from tests.orchestration.cluster.test_doctor import begin
from tests.orchestration.samples import TINY
from tests.orchestration.tracking_store import new_store

Connect = Callable[[Settings], Cluster]
Ask = Callable[[str | None], Mapping[str, Answer]]
LINES = ("token", "cluster", "nodes", "storage", "disk", "data", "tracking", "runs")


def well(settings: Settings) -> Cluster:
    return Cluster(cpus=8, gpus=2, is_local=False)


def all_the_same(storage: str | None) -> dict[str, Answer]:
    return {"head": versions(), "worker": versions()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For data and records that are made once."""
    folder = tmp_path_factory.mktemp("shared")
    new_store(folder / "mlflow.db")
    return folder


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
    monkeypatch.chdir(tmp_path)

    def examine(
        *words: str, connect: Connect = well, ask: Ask = all_the_same
    ) -> tuple[int, dict[str, str]]:
        arguments = command.make_parser().parse_args(["--address", "10.0.0.1:6379", *words])
        code = command.body(arguments, connect=connect, ask=ask)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        lines = [line for line in printed.out.splitlines() if line[:4] in ("ok  ", "FAIL")]
        names = {line[6:16].strip(): line[:4].strip() + " " + line[16:] for line in lines}
        fixes = printed.out.count("fix: ")
        assert fixes == sum(text.startswith("FAIL") for text in names.values())
        return code, names

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


def silent_cluster(settings: Settings) -> Cluster:
    raise ServiceError("no Ray cluster answers at 10.0.0.1:6379")


def an_older_worker(storage: str | None) -> dict[str, Answer]:
    return {"worker": versions() | {"torch": "1.0"}}


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
    uri = new_store(folder / "mlflow.db")
    begin(Settings(output=folder / "runs", cache_dir=folder, tracking_uri=uri), "lost")
    patch.setenv("MLFLOW_TRACKING_URI", uri)


def as_it_is(patch: pytest.MonkeyPatch, folder: Path) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is wrong, what the line says of it, and which others turn red for it."""

    spoil: Callable[[pytest.MonkeyPatch, Path], None] = as_it_is
    says: str
    follows: frozenset[str] = frozenset()
    asked: Mapping[str, Any] = field(default_factory=dict)
    words: Sequence[str] = ()


FAULTS = {
    "token": Fault(spoil=no_token, says="does not exist"),
    "cluster": Fault(says="no Ray cluster answers", asked={"connect": silent_cluster}),
    "nodes": Fault(says="worker: torch 1.0 there", asked={"ask": an_older_worker}),
    "storage": Fault(spoil=storage_of_one_machine, says="CPFEAN_STORAGE is not set"),
    "disk": Fault(spoil=full_disk, says="1.0 GB free"),
    "data": Fault(spoil=half_the_data, says="faults in the data", words=("--data", "data")),
    # Whoever runs is written there.
    "tracking": Fault(spoil=broken_tracker, says="bad.db", follows=frozenset({"runs"})),
    "runs": Fault(spoil=lost_run, says="2 run(s) of lost are RUNNING"),
}


@pytest.mark.parametrize("name", LINES)
def test_each_line_turns_red_alone(
    name: str,
    examined: Callable[..., tuple[int, dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fault = FAULTS[name]
    fault.spoil(monkeypatch, tmp_path)
    code, lines = examined(*fault.words, **fault.asked)
    assert tuple(lines) == LINES
    red = {line for line, text in lines.items() if text.startswith("FAIL")}
    assert red == {name} | fault.follows, lines
    assert fault.says in lines[name]
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
