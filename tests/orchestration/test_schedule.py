"""Slots, catching up, overlaps and two schedulers; with jobs that are only noted."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cpfean.errors import ConfigError
from orchestration.schedule import Ended, Schedule, last_fire_time, trigger_of
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


def end_all(schedule: Schedule, jobs: NotedJobs, how: Ended | None = "done") -> None:
    """Ends the rounds that run; None: they are killed, and say nothing."""
    for job in [job for job in jobs.commands if job not in jobs.ended]:
        if how is not None:
            schedule.ended(*job.split("-"), how)
        jobs.ended.add(job)


def journal(folder: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in (folder / "schedule.jsonl").read_text().splitlines()]
    return [row for row in rows if row["slot"]]


def test_every_slot_is_submitted_once(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    schedule.fire_all(jobs, ignore)
    assert jobs.commands == {}  # nothing is due before the first slot
    for minutes in range(0, 200, 10):
        clock.now = START + timedelta(minutes=minutes)
        schedule.fire_all(jobs, ignore)
        end_all(schedule, jobs)
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
    assert [(row["slot"], row["what"]) for row in journal(tmp_path)] == [
        ("20261124T110000Z", "missed"),
        ("20261124T120000Z", "missed"),
        ("20261124T130000Z", "submitted"),
    ]


def test_a_long_pause_does_not_flood_the_journal(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = schedule_of(tmp_path, clock)
    schedule.add("often", cron="* * * * *", arguments=())
    clock.now = START + timedelta(days=7)
    schedule.fire_all(jobs, ignore)
    missed = [row["slot"] for row in journal(tmp_path) if row["what"] == "missed"]
    assert (len(missed), missed[-1]) == (100, "20261201T100600Z")
    assert list(jobs.commands) == ["often-20261201T100700Z"]


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_jumps_an_hour_and_back_runs_no_slot_twice(tmp_path: Path, hours: int) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    right = [START + timedelta(minutes=minutes) for minutes in range(0, 360, 10)]
    wrong = [
        now + timedelta(hours=hours) if 100 <= 10 * i < 160 else now for i, now in enumerate(right)
    ]
    for clock.now in wrong:
        schedule.fire_all(jobs, ignore)
        end_all(schedule, jobs)
    slots = [f"nightly-20261124T{hour}0000Z" for hour in (11, 12, 13, 14, 15)]
    # The clock that was ahead brings 12 and 13 o'clock forward, the other one is late.
    assert list(jobs.commands) == slots
    assert all(row["what"] != "missed" for row in journal(tmp_path))


def test_a_slot_that_a_wrong_clock_noted_years_ahead_does_not_end_a_suite(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    clock.now = START.replace(year=2036)
    schedule.fire_all(jobs, ignore)
    end_all(schedule, jobs)
    clock.now = START + timedelta(hours=1)
    schedule.fire_all(jobs, ignore)
    assert list(jobs.commands)[1:] == ["nightly-20261124T110000Z"]


def test_a_slot_is_skipped_for_good_while_the_one_before_it_runs(tmp_path: Path) -> None:
    clock, jobs, lines = Clock(START + timedelta(hours=1)), NotedJobs(), list[str]()
    schedule = hourly(tmp_path, Clock())
    schedule = schedule_of(tmp_path, clock)
    schedule.fire_all(jobs, lines.append)
    clock.now += timedelta(hours=1)
    schedule.fire_all(jobs, lines.append)
    end_all(schedule, jobs)
    schedule.fire_all(jobs, lines.append)
    assert lines == [
        "nightly-20261124T110000Z: submitted",
        "nightly-20261124T120000Z: skipped, nightly-20261124T110000Z still runs",
        "nothing is due.",
    ]
    standing = schedule.standing("nightly")
    assert (standing.last["slot"], standing.last["what"]) == ("20261124T110000Z", "done")
    assert standing.not_run["slot"] == "20261124T120000Z"
    assert standing.not_run["why"] == "nightly-20261124T110000Z still runs"
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
    assert lines[1] == "nightly-20261124T110000Z: known, another scheduler had submitted it"


def every_hour(
    schedule: Schedule, clock: Clock, jobs: NotedJobs, *ends: Ended | None
) -> list[list[str]]:
    """Slots one after another, whose rounds end so; the jobs that each slot led to."""
    led_to = []
    for how in ends:
        known = set(jobs.commands)
        clock.now += timedelta(hours=1)
        schedule.fire_all(jobs, ignore)
        led_to.append([job for job in jobs.commands if job not in known])
        end_all(schedule, jobs, how)
    return led_to


def test_a_suite_is_paused_after_three_failed_rounds_until_it_is_resumed(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    # Killed ones failed; stopped ones say nothing; one that is done starts the count anew.
    ends: list[Ended | None] = ["failed", None, "changed", "failed", None, "stopped", "failed"]
    assert all(every_hour(schedule, clock, jobs, *ends))
    assert not schedule.standing("nightly").is_paused
    assert every_hour(schedule, clock, jobs, "done", "done") == [[], []]
    standing = schedule.standing("nightly")
    assert standing.is_paused
    assert standing.last["what"] == "failed"
    assert standing.not_run["slot"] == "20261124T190000Z"
    assert "the last 3 rounds failed, nightly-20261124T170000Z" in standing.not_run["why"]
    assert "schedule.py resume nightly" in standing.not_run["why"]
    schedule.resume("nightly")
    assert not schedule.standing("nightly").is_paused
    assert every_hour(schedule, clock, jobs, "failed", "failed", "done") == [
        [f"nightly-20261124T{hour}0000Z"] for hour in (20, 21, 22)
    ]


def test_a_suite_that_is_added_again_is_not_paused_any_more(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    every_hour(schedule, clock, jobs, "failed", "failed", "failed", "done")
    schedule.remove("nightly")
    hourly(tmp_path, clock)
    assert every_hour(schedule, clock, jobs, "done") == [["nightly-20261124T150000Z"]]


def test_no_scheduler_pauses_a_suite_for_a_round_that_still_runs(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    every_hour(schedule, clock, jobs, "failed", "failed")
    clock.now += timedelta(hours=1)
    schedule.fire_all(jobs, ignore)
    clock.now += timedelta(hours=1)
    schedule.fire_all(jobs, ignore)
    assert schedule.standing("nightly").not_run["what"] == "skipped"
    assert not schedule.standing("nightly").is_paused


def test_resuming_what_is_not_there_names_what_is(tmp_path: Path) -> None:
    schedule = hourly(tmp_path, Clock())
    with pytest.raises(ConfigError, match="no suite 'other'; there are: nightly"):
        schedule.resume("other")


# Real processes; a job is a file that can be made once, as an id can be taken once.
DRIVER = """
import sys, time
from datetime import UTC, datetime, timedelta
from pathlib import Path
import orchestration.schedule
from orchestration.schedule import Schedule

folder, me, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

class Jobs:
    def running(self, prefix):
        if what == "once":  # nobody goes on before all have looked
            (folder / f"looked-{me}").touch()
            wait_for(lambda: len(list(folder.glob("looked-*"))) == int(sys.argv[4]))
        return []
    def submit(self, job, command):
        try:
            (folder / job).touch(exist_ok=False)
        except FileExistsError:
            return False
        with (folder / "by").open("a") as file:
            file.write(f"{me} {job}\\n")
        schedule.ended(*job.split("-"), "done")
        return True

if what == "once":
    schedule = Schedule(folder, script=Path("/x"), python="python",
                        now=lambda: datetime.fromisoformat(sys.argv[5]))
    schedule.fire_all(Jobs(), print)
elif what == "round":
    schedule = Schedule(folder, script=Path("/x"), python="python")
    with schedule.only_round("nightly", me, print) as is_ours:
        (folder / f"round-{me}-{is_ours}").touch()
        wait_for(lambda: (folder / "end").exists() or not is_ours)
else:
    orchestration.schedule._LOOK = timedelta(seconds=1)
    schedule = Schedule(folder, script=Path("/x"), python="python")
    orchestration.schedule._look = (folder / f"awake-{me}").touch
    schedule.run(Jobs(), print)
"""


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), *words],
        cwd=Path.cwd(),
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_schedulers_that_look_at_the_same_instant_submit_a_slot_once(tmp_path: Path) -> None:
    """Four processes, none of which submits before all have seen that nothing runs."""
    hourly(tmp_path, Clock())
    now = (START + timedelta(hours=1)).isoformat()
    names = ("one", "two", "three", "four")
    schedulers = [start(tmp_path, name, "once", "4", now) for name in names]
    said = [scheduler.communicate(timeout=90)[0] for scheduler in schedulers]
    assert [scheduler.returncode for scheduler in schedulers] == [0] * 4
    assert len((tmp_path / "by").read_text().splitlines()) == 1
    assert sum("submitted\n" in text for text in said) == 1
    assert sum("known, another" in text for text in said) == 3
    noted = [row["what"] for row in journal(tmp_path)]
    assert sorted(noted) == ["done", "known", "known", "known", "submitted"]


def test_a_late_round_finds_that_another_one_of_its_suite_runs_and_the_dead_hold_nothing(
    tmp_path: Path,
) -> None:
    """As when a scheduler is halted between looking and submitting."""
    hourly(tmp_path, Clock())
    first = start(tmp_path, "20261124T120000Z", "round")
    wait_until((tmp_path / "round-20261124T120000Z-True").exists)
    late = start(tmp_path, "20261124T110000Z", "round")
    assert "nightly-20261124T120000Z still runs" in late.communicate(timeout=60)[0]
    assert (tmp_path / "round-20261124T110000Z-False").exists()
    (row,) = journal(tmp_path)
    assert (row["slot"], row["what"]) == ("20261124T110000Z", "skipped")
    first.kill()
    first.wait()
    (tmp_path / "end").touch()
    again = start(tmp_path, "20261124T110000Z", "round")
    assert again.wait(timeout=60) == 0
    assert (tmp_path / "round-20261124T110000Z-True").exists()


def test_a_suite_that_is_added_while_a_scheduler_runs_is_looked_after(tmp_path: Path) -> None:
    schedule = Schedule(tmp_path, script=Path("/x"), python="python")
    scheduler = start(tmp_path, "one", "run")
    try:
        wait_until((tmp_path / "awake-one").exists)
        schedule.add("quick", cron="* * * * * *", arguments=())
        wait_until((tmp_path / "by").exists)
    finally:
        scheduler.kill()
        scheduler.wait()


def test_a_suite_that_is_removed_just_when_it_is_due_does_not_end_a_scheduler(
    tmp_path: Path,
) -> None:
    schedule = hourly(tmp_path, Clock())
    with schedule._store() as scheduler:
        job = scheduler.get_job("nightly")
        scheduler.remove_job("nightly")
        scheduler._jobstores["default"].update_job(job)
    assert schedule.suites() == []


def test_two_schedulers_at_once_one_of_them_killed_run_every_slot_once(tmp_path: Path) -> None:
    """Real processes with the real clock; a slot every two seconds."""
    schedule = Schedule(tmp_path, script=Path("/x"), python="python")
    schedule.add("quick", cron="*/2 * * * * *", arguments=())
    drivers = [start(tmp_path, name, "run") for name in ("one", "two")]
    by = tmp_path / "by"

    def count() -> int:
        return len(by.read_text().splitlines()) if by.exists() else 0

    try:
        wait_until(lambda: count() >= 3)
        drivers[0].kill()
        before = count()
        wait_until(lambda: count() >= before + 3)
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
    jobs = {line.split()[1] for line in by.read_text().splitlines()}
    rows = journal(tmp_path)
    submitted = [f"quick-{row['slot']}" for row in rows if row["what"] == "submitted"]
    assert len(submitted) == len(set(submitted))
    # One that was killed may have submitted a slot and not noted it; the other one then has.
    noted = {f"quick-{row['slot']}" for row in rows}
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
    assert schedule.standing("nightly").last["what"] == "submitted"
    schedule.ended("nightly", "20261124T110000Z", "done")
    assert schedule.standing("nightly").last["what"] == "done"


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


def put_aside(line: str) -> None:
    subprocess.run(["bash", "-c", line], check=True)


@pytest.mark.parametrize(
    "content", [b"null", b"x" * 5000, b"SQLite format 3\0" + b"\xff" * 5000], ids=len
)
def test_a_damaged_store_of_suites_is_named_left_and_put_aside(
    tmp_path: Path, content: bytes
) -> None:
    schedule = hourly(tmp_path, Clock())
    file = tmp_path / "schedule.db"
    file.write_bytes(content)
    for ask in (
        schedule.suites,
        lambda: schedule.remove("nightly"),
        lambda: hourly(tmp_path, Clock()),
    ):
        with pytest.raises(ServiceError, match="cannot be used as the schedule's database") as told:
            ask()
        assert file.read_bytes() == content
    put_aside(str(told.value).splitlines()[-1])
    assert hourly(tmp_path, Clock()).suites()[0].name == "nightly"


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda file: file.symlink_to("nowhere")])
@pytest.mark.parametrize("name", ["schedule.db", "schedule.jsonl"])
def test_what_is_no_file_is_named(tmp_path: Path, name: str, put: Callable[[Path], None]) -> None:
    schedule = hourly(tmp_path, Clock())
    (tmp_path / name).unlink()
    put(tmp_path / name)
    with pytest.raises(ServiceError, match=re.escape(name)):
        schedule.fire_all(NotedJobs(), ignore)


@pytest.mark.parametrize(
    "suite",
    [
        {"arguments": ("--seeds", 3)},
        {"arguments": "none"},
        {"unknown": 1},
        {"added": None},
        {"added": "yesterday"},
        {"cron": "every night"},
        None,
    ],
)
def test_a_suite_of_another_release_is_told_and_never_thrown_away(
    tmp_path: Path, suite: dict[str, Any] | None
) -> None:
    schedule = hourly(tmp_path, Clock())
    with schedule._store() as scheduler:
        job = scheduler.get_job("nightly")
        given = None if suite is None else job.args[1] | suite
        job.modify(args=[job.args[0], given])
    told_of_and_left(tmp_path)


def test_a_suite_that_another_release_calls_is_never_thrown_away(tmp_path: Path) -> None:
    schedule = hourly(tmp_path, Clock())
    with schedule._store() as scheduler:
        job = scheduler.get_job("nightly")
        job.func_ref = "orchestration.schedule:_gone"
        scheduler._jobstores["default"].update_job(job)
    told_of_and_left(tmp_path)


def told_of_and_left(folder: Path) -> None:
    before = (folder / "schedule.db").read_bytes()
    with pytest.raises(ServiceError, match="suite 'nightly' is damaged, or of another release"):
        schedule_of(folder, Clock()).suites()
    assert (folder / "schedule.db").read_bytes() == before


def test_lines_of_the_journal_that_cannot_be_read_are_left_out_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, jobs = Clock(START + timedelta(hours=2)), NotedJobs()
    schedule = hourly(tmp_path, Clock())
    schedule = schedule_of(tmp_path, clock)
    schedule.fire_all(jobs, ignore)
    assert len(jobs.commands) == 1
    odd = [b"null", b"[1]", b'"a"', b"{}", b'{"suite": 3}', b"[" * 1000, b"\xff\xfe", b'{"torn']
    with (tmp_path / "schedule.jsonl").open("ab") as file:
        file.write(b"".join(line + b"\n" for line in odd))
    again = schedule_of(tmp_path, clock)
    again.fire_all(jobs, ignore)
    assert len(jobs.commands) == 1
    assert again.standing("nightly").last["what"] == "submitted"
    assert f"{len(odd)} line(s) are damaged and left out" in caplog.text
    assert all(line in (tmp_path / "schedule.jsonl").read_bytes() for line in odd)
