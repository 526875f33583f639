"""Slots, catching up, overlaps and two schedulers; with jobs that are only noted."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cpfean.errors import ConfigError, ServiceError
from orchestration.schedule.rounds import Schedule

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


def end_all(schedule: Schedule, jobs: NotedJobs, how: str | None = "done") -> None:
    """Ends the rounds that run; None: they are killed, and say nothing."""
    for job in [job for job in jobs.commands if job not in jobs.ended]:
        if how is not None:
            schedule.note(*job.split("-"), how)
        jobs.ended.add(job)


def journal(folder: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in (folder / "schedule.jsonl").read_text().splitlines()]
    return [row for row in rows if row["slot"]]


def test_every_slot_is_submitted_once(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    schedule.tick(jobs, ignore)
    assert jobs.commands == {}  # nothing is due before the first slot
    for minutes in range(0, 200, 10):
        clock.now = START + timedelta(minutes=minutes)
        schedule.tick(jobs, ignore)
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
    schedule_of(tmp_path, clock).tick(jobs, ignore)  # as after a restart
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
    schedule.tick(jobs, ignore)
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
        schedule.tick(jobs, ignore)
        end_all(schedule, jobs)
    slots = [f"nightly-20261124T{hour}0000Z" for hour in (11, 12, 13, 14, 15)]
    # The clock that was ahead brings 12 and 13 o'clock forward, the other one is late.
    assert list(jobs.commands) == slots
    assert all(row["what"] != "missed" for row in journal(tmp_path))


def test_a_slot_that_a_wrong_clock_noted_years_ahead_does_not_end_a_suite(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    clock.now = START.replace(year=2036)
    schedule.tick(jobs, ignore)
    end_all(schedule, jobs)
    clock.now = START + timedelta(hours=1)
    schedule.tick(jobs, ignore)
    assert list(jobs.commands)[1:] == ["nightly-20261124T110000Z"]


def test_a_slot_is_skipped_for_good_while_the_one_before_it_runs(tmp_path: Path) -> None:
    clock, jobs, lines = Clock(START + timedelta(hours=1)), NotedJobs(), list[str]()
    schedule = hourly(tmp_path, Clock())
    schedule = schedule_of(tmp_path, clock)
    schedule.tick(jobs, lines.append)
    clock.now += timedelta(hours=1)
    schedule.tick(jobs, lines.append)
    end_all(schedule, jobs)
    assert not schedule.tick(jobs, lines.append)
    assert lines == [
        "nightly-20261124T110000Z: submitted",
        "nightly-20261124T120000Z: skipped, nightly-20261124T110000Z still runs",
    ]
    standing = schedule.standing("nightly")
    assert (standing.last.slot, standing.last.what) == ("20261124T110000Z", "done")
    assert standing.not_run.slot == "20261124T120000Z"
    assert standing.not_run.why == "nightly-20261124T110000Z still runs"
    clock.now += timedelta(hours=1)
    schedule.tick(jobs, lines.append)
    assert list(jobs.commands) == ["nightly-20261124T110000Z", "nightly-20261124T130000Z"]


def test_suites_do_not_wait_for_each_other(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    schedule.add("other", cron="0 * * * *", arguments=())
    clock.now += timedelta(hours=1)
    schedule.tick(jobs, ignore)
    assert sorted(jobs.commands) == ["nightly-20261124T110000Z", "other-20261124T110000Z"]


def test_a_slot_that_found_no_cluster_is_still_due(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    clock.now += timedelta(hours=1)
    jobs.is_down = True
    with pytest.raises(ServiceError):
        schedule.tick(jobs, ignore)
    jobs.is_down = False
    schedule.tick(jobs, ignore)
    assert len(jobs.commands) == 1


def test_a_second_scheduler_finds_that_the_cluster_has_the_job(tmp_path: Path) -> None:
    """Both look before either has noted anything: the cluster decides."""
    clock, jobs, lines = Clock(), NotedJobs(), list[str]()
    schedule = hourly(tmp_path, clock)
    clock.now += timedelta(hours=1)
    schedule.tick(jobs, lines.append)
    (tmp_path / "schedule.jsonl").unlink()
    schedule.tick(jobs, lines.append)
    assert len(jobs.commands) == 1
    assert lines[1] == "nightly-20261124T110000Z: known, another scheduler had submitted it"


def every_hour(
    schedule: Schedule, clock: Clock, jobs: NotedJobs, *ends: str | None
) -> list[list[str]]:
    """Slots one after another, whose rounds end so; the jobs that each slot led to."""
    led_to = []
    for how in ends:
        known = set(jobs.commands)
        clock.now += timedelta(hours=1)
        schedule.tick(jobs, ignore)
        led_to.append([job for job in jobs.commands if job not in known])
        end_all(schedule, jobs, how)
    return led_to


def test_a_suite_is_paused_after_three_failed_rounds_until_it_is_resumed(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    # Killed ones failed; stopped ones say nothing; one that is done starts the count anew.
    ends: list[str | None] = ["failed", None, "changed", "failed", None, "stopped", "failed"]
    assert all(every_hour(schedule, clock, jobs, *ends))
    assert not schedule.standing("nightly").is_paused
    assert every_hour(schedule, clock, jobs, "done", "done") == [[], []]
    standing = schedule.standing("nightly")
    assert standing.is_paused
    assert standing.last.what == "failed"
    assert standing.not_run.slot == "20261124T190000Z"
    assert "the last 3 rounds failed, nightly-20261124T170000Z" in standing.not_run.why
    assert "schedule.py resume nightly" in standing.not_run.why
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
    schedule.tick(jobs, ignore)
    clock.now += timedelta(hours=1)
    schedule.tick(jobs, ignore)
    assert schedule.standing("nightly").not_run.what == "skipped"
    assert not schedule.standing("nightly").is_paused


def test_a_round_that_ends_while_a_scheduler_looks_has_not_failed(tmp_path: Path) -> None:
    class Ending(NotedJobs):
        def running(self, prefix: str) -> Sequence[str]:
            end_all(schedule, self)
            return super().running(prefix)

    clock, jobs = Clock(), Ending()
    schedule = hourly(tmp_path, clock)
    schedule.note("nightly", "20261124T080000Z", "failed")
    schedule.note("nightly", "20261124T090000Z", "failed")
    for hour in (1, 2):
        clock.now = START + timedelta(hours=hour)
        schedule.tick(jobs, ignore)
    assert list(jobs.commands) == ["nightly-20261124T110000Z", "nightly-20261124T120000Z"]


def test_resuming_what_is_not_there_names_what_is(tmp_path: Path) -> None:
    schedule = hourly(tmp_path, Clock())
    with pytest.raises(ConfigError, match="no suite 'other'; there are: nightly"):
        schedule.resume("other")


class Over(Exception):  # noqa: N818
    """The time that a scheduler is given has passed."""


def run_for(
    schedule: Schedule,
    clock: Clock,
    jobs: NotedJobs,
    hours: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[list[float], list[str]]:
    """A scheduler that runs for hours of the clock, in an instant: its pauses, what it said."""
    pauses, lines, end = list[float](), list[str](), clock.now + timedelta(hours=hours)

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        clock.now += timedelta(seconds=seconds)
        end_all(schedule, jobs)
        meanwhile()
        if clock.now >= end:
            raise Over

    with pytest.raises(Over):
        schedule.run(jobs, lines.append, wait=wait)
    return pauses, lines


def test_a_scheduler_wakes_when_a_suite_is_due_and_looks_every_half_minute(tmp_path: Path) -> None:
    clock, jobs = Clock(START + timedelta(seconds=7)), NotedJobs()
    schedule = hourly(tmp_path, clock)
    submitted_at: dict[str, datetime] = {}

    def meanwhile() -> None:
        for job in jobs.commands:
            submitted_at.setdefault(job, clock.now)

    pauses, lines = run_for(schedule, clock, jobs, 2.5, meanwhile)
    slots = [f"nightly-20261124T{hour}0000Z" for hour in (11, 12)]
    assert lines == [f"{slot}: submitted" for slot in slots]
    assert max(pauses) == 30
    # The pause before a slot ends with it, and what is submitted then is seen after the next one.
    assert [time.minute for time in submitted_at.values()] == [0, 0]


def test_a_running_scheduler_follows_suites_and_clocks_that_others_change(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = schedule_of(tmp_path, clock)
    elsewhere = schedule_of(tmp_path, clock)
    deeds = {
        10: lambda: elsewhere.add("often", cron="*/10 * * * *", arguments=()),
        80: lambda: setattr(clock, "now", clock.now + timedelta(hours=1)),
        160: lambda: elsewhere.remove("often"),
    }
    looks = 0

    def meanwhile() -> None:
        nonlocal looks
        looks += 1
        deeds.get(looks, lambda: None)()

    run_for(schedule, clock, jobs, 4, meanwhile)
    slots = [job.split("T")[1] for job in jobs.commands]
    assert slots[:4] == ["102000Z", "103000Z", "104000Z", "114000Z"]
    assert slots[-1] <= "123000Z"


def test_a_scheduler_tries_again_after_a_minute_where_no_cluster_answers(tmp_path: Path) -> None:
    clock, jobs = Clock(START + timedelta(hours=1)), NotedJobs()
    hourly(tmp_path, Clock())
    schedule = schedule_of(tmp_path, clock)
    jobs.is_down = True

    def meanwhile() -> None:
        jobs.is_down = clock.now < START + timedelta(hours=1, minutes=3)

    pauses, lines = run_for(schedule, clock, jobs, 0.1, meanwhile)
    assert pauses[:4] == [60, 60, 60, 30]
    assert lines == ["nobody answers", "trying again in 60 s."] * 3 + [
        "nightly-20261124T110000Z: submitted"
    ]


def test_a_file_of_suites_that_is_damaged_while_a_scheduler_runs_does_not_end_it(
    tmp_path: Path,
) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    file = tmp_path / "suites.json"
    whole = file.read_text()
    contents = ["{", whole]

    def meanwhile() -> None:
        if contents:
            file.write_text(contents.pop(0))

    pauses, lines = run_for(schedule, clock, jobs, 1, meanwhile)
    assert (pauses[:3], lines[1]) == ([30, 60, 30], "trying again in 60 s.")
    assert str(file) in lines[0]
    assert list(jobs.commands) == ["nightly-20261124T110000Z"]


def test_a_suite_whose_jobs_are_refused_does_not_hold_the_others_up(tmp_path: Path) -> None:
    class Choosy(NotedJobs):
        def submit(self, job: str, command: str) -> bool:
            if job.startswith("nightly"):
                raise ServiceError("not this one")
            return super().submit(job, command)

    clock, jobs = Clock(), Choosy()
    schedule = hourly(tmp_path, clock)
    schedule.add("other", cron="0 * * * *", arguments=())
    clock.now += timedelta(hours=1)
    with pytest.raises(ServiceError, match="not this one"):
        schedule.tick(jobs, ignore)
    assert list(jobs.commands) == ["other-20261124T110000Z"]


def test_a_suite_that_is_removed_just_when_it_is_due_does_not_end_a_scheduler(
    tmp_path: Path,
) -> None:
    class Removing(NotedJobs):
        def running(self, prefix: str) -> Sequence[str]:
            schedule_of(tmp_path, clock).remove("nightly")
            return super().running(prefix)

    clock, jobs = Clock(), Removing()
    schedule = hourly(tmp_path, clock)
    clock.now += timedelta(hours=1)
    assert schedule.tick(jobs, ignore)
    assert schedule.suites() == []
    assert not schedule.tick(jobs, ignore)


# Real processes; a job is a file that can be made once, as an id can be taken once.
DRIVER = """
import sys, time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from orchestration.schedule.rounds import Schedule

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
        schedule.note(*job.split("-"), "done")
        return True

if what == "once":
    schedule = Schedule(folder, script=Path("/x"), python="python",
                        now=lambda: datetime.fromisoformat(sys.argv[5]))
    schedule.tick(Jobs(), print)
elif what == "round":
    schedule = Schedule(folder, script=Path("/x"), python="python")
    with schedule.only_round("nightly", me, print) as is_ours:
        (folder / f"round-{me}-{is_ours}").touch()
        wait_for(lambda: (folder / "end").exists() or not is_ours)
else:
    def wait(seconds):
        (folder / f"awake-{me}").touch()
        time.sleep(min(seconds, 1.0))
    schedule = Schedule(folder, script=Path("/x"), python="python")
    schedule.run(Jobs(), print, wait=wait)
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


def test_two_schedulers_at_once_one_of_them_killed_run_every_slot_once(tmp_path: Path) -> None:
    """Real processes with the real clock; a slot every second."""
    schedule = Schedule(tmp_path, script=Path("/x"), python="python")
    schedule.add("quick", cron="* * * * * *", arguments=())
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


def test_a_journal_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    clock, jobs = Clock(), NotedJobs()
    schedule = hourly(tmp_path, clock)
    clock.now += timedelta(hours=1)
    schedule.tick(jobs, ignore)
    with (tmp_path / "schedule.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    assert schedule.standing("nightly").last.what == "submitted"
    schedule.note("nightly", "20261124T110000Z", "done")
    assert schedule.standing("nightly").last.what == "done"


def test_lines_of_the_journal_that_cannot_be_read_are_left_out_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, jobs = Clock(START + timedelta(hours=2)), NotedJobs()
    schedule = hourly(tmp_path, Clock())
    schedule = schedule_of(tmp_path, clock)
    schedule.tick(jobs, ignore)
    assert len(jobs.commands) == 1
    odd = [b"null", b"[1]", b'"a"', b"{}", b'{"suite": 3}', b"[" * 1000, b"\xff\xfe", b'{"torn']
    with (tmp_path / "schedule.jsonl").open("ab") as file:
        file.write(b"".join(line + b"\n" for line in odd))
    again = schedule_of(tmp_path, clock)
    again.tick(jobs, ignore)
    assert len(jobs.commands) == 1
    assert again.standing("nightly").last.what == "submitted"
    assert f"{len(odd)} line(s) are damaged and left out" in caplog.text
    assert all(line in (tmp_path / "schedule.jsonl").read_bytes() for line in odd)
