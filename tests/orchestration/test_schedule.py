"""Slots, catching up, overlaps and two schedulers; with jobs that are only noted."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cpfean.errors import ConfigError
from orchestration.schedule import Schedule, last_fire_time, trigger_of
from orchestration.settings import ServiceError

START = datetime(2026, 11, 24, 10, 7, tzinfo=UTC)


class Clock:
    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


class NotedJobs:
    """As Ray does: an id is taken once; a job runs until it is ended."""

    def __init__(self) -> None:
        self.commands: dict[str, str] = {}
        self.ended: set[str] = set()
        self.is_down = False

    def submit(self, job: str, command: str) -> bool:
        new = job not in self.commands
        self.commands.setdefault(job, command)
        return new

    def running(self, prefix: str) -> Sequence[str]:
        if self.is_down:
            raise ServiceError("nobody answers")
        return [job for job in self.commands if job.startswith(prefix) and job not in self.ended]


def schedule_of(folder: Path, clock: Clock) -> Schedule:
    return Schedule(folder, script=Path("/x/schedule.py"), python="python", now=clock)


def hourly(folder: Path, clock: Clock) -> Schedule:
    schedule = schedule_of(folder, clock)
    schedule.add("nightly", cron="0 * * * *", arguments=("--only", "no_gcn"))
    return schedule


def ignore(line: str) -> None: ...


def test_every_slot_is_submitted_once(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    schedule.fire_all(jobs, ignore)
    assert jobs.commands == {}  # nothing is due before the first slot
    for minutes in range(0, 200, 10):
        clock.now = START + timedelta(minutes=minutes)
        schedule.fire_all(jobs, ignore)
        jobs.ended = set(jobs.commands)
    slots = [f"nightly-20261124T{hour}0000Z" for hour in (11, 12, 13)]
    assert list(jobs.commands) == slots
    assert jobs.commands[slots[0]] == (
        f"python /x/schedule.py round nightly 20261124T110000Z --output {tmp_path} -- --only no_gcn"
    )


def test_after_a_pause_over_three_slots_one_is_caught_up_with(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    hourly(tmp_path, clock)
    clock.now = START + timedelta(hours=3)
    schedule_of(tmp_path, clock).fire_all(jobs, ignore)  # as after a restart
    assert list(jobs.commands) == ["nightly-20261124T130000Z"]


def test_a_slot_is_skipped_for_good_while_the_one_before_it_runs(tmp_path: Path) -> None:
    clock, jobs, lines = Clock(START + timedelta(hours=1)), NotedJobs(), list[str]()
    schedule = hourly(tmp_path, Clock())
    schedule = schedule_of(tmp_path, clock)
    schedule.fire_all(jobs, lines.append)
    clock.now += timedelta(hours=1)
    schedule.fire_all(jobs, lines.append)
    jobs.ended = set(jobs.commands)
    schedule.fire_all(jobs, lines.append)
    assert lines == [
        "nightly-20261124T110000Z: submitted",
        "nightly-20261124T120000Z: skipped, nightly-20261124T110000Z still runs",
        "nothing is due.",
    ]
    assert schedule.last("nightly")["what"] == "skipped"
    clock.now += timedelta(hours=1)
    schedule.fire_all(jobs, lines.append)
    assert list(jobs.commands) == ["nightly-20261124T110000Z", "nightly-20261124T130000Z"]


def test_suites_do_not_wait_for_each_other(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    schedule.add("other", cron="0 * * * *", arguments=())
    clock.now += timedelta(hours=1)
    schedule.fire_all(jobs, ignore)
    assert sorted(jobs.commands) == ["nightly-20261124T110000Z", "other-20261124T110000Z"]


def test_a_slot_that_found_no_cluster_is_still_due(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    clock.now += timedelta(hours=1)
    jobs.is_down = True
    with pytest.raises(ServiceError):
        schedule.fire_all(jobs, ignore)
    jobs.is_down = False
    schedule.fire_all(jobs, ignore)
    assert len(jobs.commands) == 1


def test_a_second_scheduler_finds_that_the_cluster_has_the_job(tmp_path: Path) -> None:
    """Both look before either has noted anything: the cluster decides."""
    clock, jobs, lines = Clock(), NotedJobs(), list[str]()
    schedule = hourly(tmp_path, clock)
    clock.now += timedelta(hours=1)
    (suite,) = schedule.suites()
    schedule.fire(suite, jobs, lines.append)
    (tmp_path / "schedule.jsonl").unlink()
    schedule.fire(suite, jobs, lines.append)
    assert len(jobs.commands) == 1
    assert lines[1] == "nightly-20261124T110000Z: the cluster has it already"


DRIVER = """
import sys, threading, time
from pathlib import Path
from orchestration.schedule import Schedule

class Jobs:
    def running(self, prefix):
        return []
    def submit(self, job, command):
        try:
            (Path(sys.argv[1]) / job).touch(exist_ok=False)
        except FileExistsError:
            return False
        with (Path(sys.argv[1]) / "by").open("a") as file:
            file.write(f"{sys.argv[2]} {job}\\n")
        return True

Schedule(Path(sys.argv[1]), script=Path("/x"), python="python").run(Jobs(), print)
"""


def test_two_schedulers_at_once_one_of_them_killed_run_every_slot_once(tmp_path: Path) -> None:
    """Real processes with the real clock; a slot every two seconds."""
    schedule = Schedule(tmp_path, script=Path("/x"), python="python")
    schedule.add("quick", cron="*/2 * * * * *", arguments=())
    drivers = [
        subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), name], cwd=Path.cwd())
        for name in ("one", "two")
    ]
    by = tmp_path / "by"
    try:
        deadline = time.monotonic() + 60
        while not (by.exists() and len(by.read_text().splitlines()) >= 3):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        drivers[0].kill()
        count = len(by.read_text().splitlines())
        while len(by.read_text().splitlines()) < count + 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
    jobs = {line.split()[1] for line in by.read_text().splitlines()}
    journal = [json.loads(line) for line in (tmp_path / "schedule.jsonl").read_text().splitlines()]
    submitted = [f"quick-{row['slot']}" for row in journal if row["what"] == "submitted"]
    assert len(submitted) == len(set(submitted))
    # One that was killed may have submitted a slot and not noted it; the other one then has.
    noted = {f"quick-{row['slot']}" for row in journal}
    assert set(submitted) <= jobs <= noted
    assert len(jobs - set(submitted)) <= 1


@pytest.mark.parametrize(
    ("cron", "now", "since", "expected"),
    [
        ("0 2 * * *", "2026-11-24 01:59", "2026-11-20", "2026-11-23 02:00"),
        ("0 2 * * *", "2026-11-24 02:00", "2026-11-20", "2026-11-24 02:00"),
        ("*/5 * * * *", "2026-11-24 10:07", "2026-11-20", "2026-11-24 10:05"),
        ("0 0 1 * *", "2026-11-24 10:07", "2026-01-20", "2026-11-01 00:00"),
        ("0 0 29 2 *", "2027-06-01", "2020-01-01", "2024-02-29 00:00"),
        ("0 2 * * *", "2026-11-24 01:59", "2026-11-23 02:00", None),
        ("0 2 * * *", "2026-11-24 01:59", "2026-11-23 12:00", None),
        # The clocks of Europe went back on 25 October; slots are in UTC.
        ("30 1 * * *", "2026-10-25 12:00", "2026-10-01", "2026-10-25 01:30"),
    ],
)
def test_the_newest_slot_that_is_due(cron: str, now: str, since: str, expected: str | None) -> None:
    def utc(text: str) -> datetime:
        return datetime.fromisoformat(text).replace(tzinfo=UTC)

    found = last_fire_time(trigger_of(cron), utc(now), since=utc(since))
    assert found == (utc(expected) if expected else None)


def test_what_cannot_be_a_suite_is_refused(tmp_path: Path) -> None:
    schedule = hourly(tmp_path, Clock())
    with pytest.raises(ConfigError, match="there is a suite 'nightly' already"):
        schedule.add("nightly", cron="0 2 * * *", arguments=())
    for name in ("Nightly", "a-b", "../x", ""):
        with pytest.raises(ConfigError, match="name is 1 to 40"):
            schedule.add(name, cron="0 2 * * *", arguments=())
    for cron in ("2", "0 25 * * *", "a b c d e"):
        with pytest.raises(ConfigError, match="--cron"):
            schedule.add("other", cron=cron, arguments=())
    with pytest.raises(ConfigError, match="no suite 'other'; there are: nightly"):
        schedule.remove("other")
    schedule.remove("nightly")
    assert schedule.suites() == []


def test_a_journal_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    clock.now += timedelta(hours=1)
    schedule.fire_all(jobs, ignore)
    with (tmp_path / "schedule.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    assert schedule.last("nightly")["what"] == "submitted"
    assert json.loads((tmp_path / "schedule.jsonl").read_text().splitlines()[0])["slot"]


def test_the_store_is_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        schedule = hourly(tmp_path, Clock())
    finally:
        os.umask(before)
    file = tmp_path / "schedule.db"
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o666)
    with pytest.raises(ServiceError, match="others may write to it"):
        schedule.suites()
