"""Our own files, damaged or of another release: named, left as they are, put aside by a line."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpfean.errors import ConfigError
from cpfean.json_files import RecordError
from cpfean.records.budget import SPENT, Meter
from cpfean.records.results import Results
from cpfean.records.run_folder import RunFolder, newest_unfinished
from cpfean.writing import write_json
from orchestration.cluster.doctor import check_runs
from orchestration.settings import Settings
from tests.orchestration.samples import TINY, record

DEEP = "[" * 1000 + "]" * 1000


def text(content: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(content, encoding="utf-8")


def dangling(file: Path) -> None:
    file.symlink_to(file.with_name("nowhere"))


def sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(5 * 10**12)


# What may stand in the place of any of them.
ANYWHERE: dict[str, Callable[[Path], None]] = {
    "null": text("null"),
    "a list": text("[1, 2]"),
    "a number": text("3"),
    "a text": text('"words"'),
    "nothing": text(""),
    "torn": text('{"number": 0, "na'),
    "two values": text("{} {}"),
    "1,000 brackets": text(DEEP),
    "1,000 brackets inside": text(f'{{"used_up": {DEEP}}}'),
    "100 brackets inside": text('{"config": ' + "[" * 100 + "]" * 100 + "}"),
    "half a character": text('{"name": "\\ud800"}'),
    "a number of 5,000 digits": text('{"number": ' + "9" * 5000 + "}"),
    "not UTF-8": lambda file: file.write_bytes(b'{"name": "\xff\xfe"}') and None,
    "zeros": lambda file: file.write_bytes(bytes(4096)) and None,
    "a folder": lambda file: file.mkdir(),
    "a named pipe": lambda file: os.mkfifo(file),
    "a link that leads nowhere": dangling,
    "terabytes": sparse,
}
# Of the fields of each kind of file.
FIELDS: dict[str, list[dict[str, Any]]] = {
    "sweep.json": [
        {"id": None},
        {"id": 3},
        {"id": "../.."},
        {"name": "../elsewhere"},
        {"name": ""},
        {"versions": []},
        {"versions": {"torch": 2}},
        {"commit": {}},
        {"kind": ["sweep"]},
    ],
    "trials/000/record.json": [
        {"unknown": 1},
        {"number": "0"},
        {"number": 1},
        {"number": 10**30},
        {"number": None},
        {"name": ["a"]},
        {"name": "../../a"},
        {"name": "/a"},
        {"name": "a\nb"},
        {"overrides": []},
        {"overrides": {"loss.margin": None}},
        {"config": None},
        {"config": {"loss": {"margn": 0.2}}},
        {"config": {"loss": {"margin": "0.2"}}},
        {"config": {"loss": 0.2}},
        {"state": "done"},
        {"state": ["finished"]},
        {"history": {}},
        {"history": [1]},
        {"history": [{"epoch": 1}]},
        {"history": [{"epoch": 2, "val/rsum": 1.0}]},
        {"history": [{"epoch": 1, "val/rsum": "high"}]},
        {"seconds": "long"},
        {"seconds": float("nan")},
        {"seconds": -1.0},
        {"seconds": 10**400},
        {"seconds": True},
        {"checkpoint": None},
        {"complete": "yes"},
        {"complete": 1},
        {"failure": 5},
        {"message": None},
        {"test": [1.0]},
        {"test": {"i2t_r1": 1.0}},
        {"test": {"rsum": None}},
    ],
    SPENT: [
        {"unknown": 1},
        {"seconds": "3"},
        {"seconds": None},
        {"seconds": float("nan")},
        {"seconds": -5},
        {"dollars": "many"},
        {"dollars": float("inf")},
        {"dollars": [1]},
    ],
    "summary.json": [{"used_up": 3}, {"used_up": ["a"]}],
    "results": [
        {"unknown": 1},
        {"format": 2},
        {"format": "1"},
        {"test": None},
        {"test": {"i2t_r1": 1.0}},
        {"history": None},
        {"history": [{}]},
        {"seconds": float("nan")},
        {"checkpoint": 3},
        {"commit": 3},
    ],
}
NEEDED = {
    "sweep.json": ("id",),
    "trials/000/record.json": ("number", "name", "overrides", "config", "state", "history"),
    SPENT: ("seconds",),
    "results": ("format", "test", "history", "checkpoint", "seconds"),
}


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of which every kind of file is there."""
    run = RunFolder(tmp_path / "runs" / "it's a run")
    run.create({"kind": "sweep"}, commit=None, versions={"torch": "2"})
    run.write(record(0, 10.0, 20.0, state="finished", test={"rsum": 20.0}))
    run.write(record(1, 10.0, state="running"))
    write_json(run.path / SPENT, {"seconds": 5.0, "dollars": None})
    write_json(run.path / "summary.json", {"used_up": "", "trials": []})
    results(run).keep(run.records()[0])
    read_all(run)
    return run


def results(run: RunFolder) -> Results:
    return Results(run.path.with_name("results"), data_fingerprint="d", commit=None)


def file_of(run: RunFolder, name: str) -> Path:
    return results(run).file_of(TINY) if name == "results" else run.path / name


def read_all(run: RunFolder) -> None:
    """As a resume does."""
    run.check_same({"kind": "sweep"})
    run.check()
    Meter(run.path / SPENT)
    results(run).fill(record(5), tested=True)


def everything(folder: Path) -> dict[str, Any]:
    """What is in a folder, to see that it stays; of large files the size, of others the kind."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        small = path.is_file() and path.stat().st_size < 10**6
        found[str(path)] = path.read_bytes() if small else path.lstat()[:7]
    return found


def refused(run: RunFolder, name: str) -> RecordError:
    """Why the run cannot be resumed; all is left as it is, and pasting the line mends it."""
    before = everything(run.path.parent)
    with pytest.raises(RecordError) as refusal:
        read_all(run)
    error, file = refusal.value, file_of(run, name)
    assert error.exit_code == 2
    assert error.file == file
    assert str(error).startswith(f"{file}: ")
    assert "It was left as it is." in str(error)
    assert everything(run.path.parent) == before
    line = str(error).splitlines()[-1]
    subprocess.run(["bash", "-c", line], check=True)
    assert not os.path.lexists(file)
    assert os.path.lexists(f"{file}.damaged")
    if name == "sweep.json":
        with pytest.raises(ConfigError, match="nothing to resume"):
            read_all(run)
    else:
        read_all(run)
    return error


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("what", ANYWHERE)
def test_something_else_in_the_place_of_a_file_is_named_and_left(
    run: RunFolder, name: str, what: str
) -> None:
    file = file_of(run, name)
    file.unlink()
    ANYWHERE[what](file)
    refused(run, name)


@pytest.mark.parametrize(
    ("name", "fields"), [(name, fields) for name, all_ in FIELDS.items() for fields in all_]
)
def test_a_field_that_cannot_be_is_named(run: RunFolder, name: str, fields: dict[str, Any]) -> None:
    file = file_of(run, name)
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    (field,) = fields
    assert field in refused(run, name).line


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, fields in NEEDED.items() for field in fields]
)
def test_a_field_that_is_missing_is_named(run: RunFolder, name: str, field: str) -> None:
    file = file_of(run, name)
    plain = json.loads(file.read_text())
    del plain[field]
    file.write_text(json.dumps(plain))
    assert field in refused(run, name).line


def test_what_earlier_releases_did_not_write_may_be_missing(run: RunFolder) -> None:
    for name, fields in (("sweep.json", ["name"]), ("trials/000/record.json", ["drift", "reused"])):
        file = file_of(run, name)
        plain = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in plain.items() if k not in fields}))
    read_all(run)
    assert run.first_name == run.name


def test_rsums_that_are_no_numbers_are_part_of_a_record(run: RunFolder) -> None:
    run.write(record(1, float("nan"), float("inf"), state="failed"))
    assert len(run.records()[1].history) == 2


def test_another_run_is_resumed_beside_one_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        RunFolder(tmp_path / name).create({"kind": "sweep"})
    RunFolder(tmp_path / "b").identity_file.write_text("null")
    RunFolder(tmp_path / "c").write(record(0))
    (tmp_path / "c" / "trials" / "000" / "record.json").write_text("[]")
    (tmp_path / "c" / "summary.json").write_text("{}")
    said: list[str] = []
    assert newest_unfinished(tmp_path, "sweep", say=said.append).name == "a"
    assert len(said) == 2
    for name in ("b/sweep.json", "c/trials/000/record.json"):
        assert any(line.startswith(f"passed over: {tmp_path / name}: ") for line in said)
    (tmp_path / "a" / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"(?s)nothing to resume.*cannot be read.*b/sweep.json"):
        newest_unfinished(tmp_path, "sweep")


def test_the_doctor_names_a_run_that_cannot_be_read_and_closes_nothing(where: Settings) -> None:
    RunFolder(where.output / "a").create({"kind": "sweep"})
    file = where.output / "a" / "sweep.json"
    file.write_text(DEEP)
    with pytest.raises(RecordError, match="nested too deeply") as told:
        check_runs(where, repair=True, wait=pytest.fail)
    assert str(file) in str(told.value)
    assert f"mv {file}" in str(told.value)
