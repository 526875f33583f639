"""Disks of the driver that take no more, done to a real small disk."""

import errno
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpfean.errors import ServiceError
from cpfean.records.run_folder import RunFolder
from cpfean.writing import cannot_write, is_disk_error
from tests.faults import small_disk
from tests.orchestration.samples import record
from tests.orchestration.study.scripted import Driven


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kilobytes=1024) as disk:
        yield disk


def fill(disk: Path) -> None:
    """To the last byte."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        filler.write(bytes(shutil.disk_usage(disk).free))
    assert shutil.disk_usage(disk).free == 0


def test_a_record_on_a_full_disk_is_the_old_one_whole(disk: Path) -> None:
    folder = RunFolder(disk / "run")
    folder.create({"kind": "sweep"})
    folder.write(record(0, 1.0))
    fill(disk)
    with pytest.raises(ServiceError, match=r"record\.json: disk full: 0 B free, \d+ kB needed"):
        folder.write(record(0, *range(200)))
    assert [known.epochs for known in folder.records()] == [1]
    assert not list((disk / "run" / "trials" / "000").glob(".record*"))
    with pytest.raises(ServiceError, match="disk full"):
        RunFolder(disk / "other").create({"kind": "sweep", "long": "x" * 10_000})


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: folder.write(record(0, 1.0)),
        lambda folder: folder.lock().__enter__(),
        lambda folder: RunFolder(folder.path / "b").create({}),
    ],
)
def test_a_disk_that_is_read_only_is_named(disk: Path, use: Callable[[RunFolder], None]) -> None:
    folder = RunFolder(disk / "run")
    folder.create({"kind": "sweep"})
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(ServiceError, match=rf"{disk}/run.*: cannot be written: Read-only file"):
        use(folder)


def test_a_study_whose_disk_is_full_is_stopped_in_good_order(disk: Path) -> None:
    driven = Driven(disk)
    number = driven.begin()
    driven.report(number, 10.0)
    fill(disk)
    assert not driven.stop.is_asked
    with driven.stop.errors_of(disk):
        driven.report(number, *range(300))
    assert isinstance(driven.stop.error, ServiceError)
    assert "disk full" in str(driven.stop.error)
    assert driven.next_trial() is None
    driven.end(number)  # Tune still tells what it stops
    (disk / "filler").unlink()
    resumed = Driven(disk)
    assert [known.epochs for known in RunFolder(disk / "s").records()] == [1]
    assert "cut off: trial-000" in resumed.said[-1]
    assert resumed.begin() == number


def test_a_defect_is_no_disk_error() -> None:
    assert not is_disk_error(ValueError("no space in this list"))
    assert not is_disk_error(FileNotFoundError(errno.ENOENT, "No such file"))
    assert is_disk_error(sqlite3.OperationalError("database or disk is full"))
    assert is_disk_error(Exception("I/O error: No space left on device (os error 28)"))
    told = cannot_write(Path("/"), OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert "quota of this user" in str(told)


_FULL = """
import sys
from experiments import command_line
def body(arguments):
    raise OSError(28, "No space left on device")
parser = command_line.Parser(description="", epilog="")
parser.add_argument("--debug", action="store_true")
command_line.run(parser, body)
"""


@pytest.mark.parametrize("flags", [(), ("--debug",)])
def test_a_command_whose_disk_is_full_shows_no_traceback(flags: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", _FULL, *flags], capture_output=True, text=True)
    assert ("Traceback" in done.stderr) == bool(flags)
    if not flags:
        assert done.returncode == 5
        assert "disk full" in done.stderr
