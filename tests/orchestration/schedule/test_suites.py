"""The file of the suites: edited by several, by hand too, and never taken for what it is not."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpfean.errors import ConfigError, CpfeanError, ServiceError
from cpfean.json_files import RecordError
from orchestration.schedule.suites import read_suites
from tests.orchestration.schedule.test_rounds import (
    START,
    Clock,
    NotedJobs,
    hourly,
    ignore,
)


def test_the_file_is_readable_and_may_be_edited_by_hand(tmp_path: Path) -> None:
    schedule = hourly(tmp_path, Clock())
    file = tmp_path / "suites.json"
    plain = json.loads(file.read_text())
    assert plain == {
        "nightly": {
            "cron": "0 * * * *",
            "arguments": ["--only", "no_gcn"],
            "added": START.isoformat(),
        }
    }
    plain["second"] = plain["nightly"] | {"cron": "30 2 * * *"}
    file.write_text(json.dumps(plain))
    assert [(suite.name, suite.cron) for suite in schedule.suites()] == [
        ("nightly", "0 * * * *"),
        ("second", "30 2 * * *"),
    ]


def test_what_cannot_be_a_suite_is_refused(tmp_path: Path) -> None:
    schedule = hourly(tmp_path, Clock())
    with pytest.raises(ConfigError, match="there is a suite 'nightly' already"):
        schedule.add("nightly", cron="0 2 * * *", arguments=())
    for name in ("Nightly", "a-b", "../x", ""):
        with pytest.raises(ConfigError, match="name is 1 to 40"):
            schedule.add(name, cron="0 2 * * *", arguments=())
    for cron in ("2", "0 25 * * *", "a b c d e", "0 0 30 2 *"):
        with pytest.raises(ConfigError, match="--cron"):
            schedule.add("other", cron=cron, arguments=())
    with pytest.raises(ConfigError, match="no suite 'other'; there are: nightly"):
        schedule.remove("other")
    schedule.remove("nightly")
    assert schedule.suites() == []


EDITS = """
import sys
from pathlib import Path
from orchestration.schedule.rounds import Schedule

schedule = Schedule(Path(sys.argv[1]), script=Path("/x"), python="python")
for number in range(12):
    schedule.add(f"{sys.argv[2]}_{number}", cron="0 2 * * *", arguments=())
    if number % 3 == 0:
        schedule.remove(f"{sys.argv[2]}_{number}")
"""


def test_edits_of_several_processes_are_all_kept(tmp_path: Path) -> None:
    names = ("one", "two", "three", "four")
    editors = [
        subprocess.Popen([sys.executable, "-c", EDITS, str(tmp_path), name], cwd=Path.cwd())
        for name in names
    ]
    assert [editor.wait(timeout=90) for editor in editors] == [0] * 4
    kept = {f"{name}_{number}" for name in names for number in range(12) if number % 3}
    assert read_suites(tmp_path).keys() == kept


def test_the_file_is_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        schedule = hourly(tmp_path, Clock())
    finally:
        os.umask(before)
    file = tmp_path / "suites.json"
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o666)
    with pytest.raises(ServiceError, match="others may write to it") as told:
        schedule.suites()
    paste(str(told.value).partition("and ")[2])
    assert schedule.suites()


def paste(line: str) -> None:
    subprocess.run(["bash", "-c", line], check=True)


@pytest.mark.parametrize("content", [b"null", b"x" * 5000, b"[]", b'{"nightly": {'], ids=len)
def test_a_damaged_file_is_named_left_and_put_aside(tmp_path: Path, content: bytes) -> None:
    schedule = hourly(tmp_path, Clock())
    file = tmp_path / "suites.json"
    file.write_bytes(content)
    for ask in (
        schedule.suites,
        lambda: schedule.remove("nightly"),
        lambda: hourly(tmp_path, Clock()),
    ):
        with pytest.raises(RecordError, match=re.escape(str(file))) as told:
            ask()
        assert file.read_bytes() == content
    paste(str(told.value).splitlines()[-1])
    assert hourly(tmp_path, Clock()).suites()[0].name == "nightly"


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("nowhere")])
@pytest.mark.parametrize("name", ["suites.json", "schedule.jsonl"])
def test_what_is_no_file_is_named(tmp_path: Path, name: str, put: Callable[[Path], None]) -> None:
    schedule = hourly(tmp_path, Clock())
    (tmp_path / name).unlink()
    put(tmp_path / name)
    with pytest.raises(CpfeanError, match=re.escape(name)):
        schedule.tick(NotedJobs(), ignore)


@pytest.mark.parametrize(
    "given",
    [
        {"arguments": ["--seeds", 3]},
        {"arguments": "none"},
        {"unknown": 1},
        {"added": None},
        {"added": "yesterday"},
        {"added": "2026-11-24T10:07:00"},
        {"cron": "every night"},
        {"name": "other"},
        None,
    ],
)
def test_a_suite_of_another_release_is_told_and_never_thrown_away(
    tmp_path: Path, given: dict[str, Any] | None
) -> None:
    schedule = hourly(tmp_path, Clock())
    file = tmp_path / "suites.json"
    plain = json.loads(file.read_text())
    plain["nightly"] = None if given is None else plain["nightly"] | given
    file.write_text(json.dumps(plain))
    before = file.read_bytes()
    for ask in (schedule.suites, lambda: schedule.remove("nightly")):
        with pytest.raises(RecordError, match=r"suite 'nightly': .*written by another release"):
            ask()
    assert file.read_bytes() == before


def test_suites_of_an_earlier_release_are_told_of_and_neither_read_nor_lost(
    tmp_path: Path,
) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    clock.now = START.replace(hour=11)
    schedule.tick(jobs, ignore)
    (tmp_path / "suites.json").unlink()
    old = tmp_path / "schedule.db"
    old.write_bytes(b"SQLite format 3\0")
    for ask in (
        schedule.suites,
        lambda: schedule.resume("nightly"),
        lambda: schedule.tick(jobs, ignore),
        lambda: hourly(tmp_path, clock),
    ):
        with pytest.raises(ServiceError, match=r"(?s)added again.*The journal stays") as told:
            ask()
    with schedule.only_round("nightly", "20261124T110000Z", ignore) as is_ours:
        assert is_ours  # a round that had been submitted before goes on
        schedule.note("nightly", "20261124T110000Z", "done")
    paste(str(told.value).splitlines()[-1])
    assert (tmp_path / "schedule.db.earlier").read_bytes() == b"SQLite format 3\0"
    hourly(tmp_path, Clock())
    assert not schedule.tick(jobs, ignore)
    assert schedule.standing("nightly").last.what == "done"
