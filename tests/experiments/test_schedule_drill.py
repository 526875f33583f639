"""A schedule on a real Ray head, for minutes: its schedulers are doubled, killed and away.

The head has namespaces and a home of its own: it meets no other Ray, asks for a token, and is gone
with the test. Slots come every 20 and every 30 seconds by the real clock, and a round is a
real training. At the end every slot is looked up in the journal, in Ray and in MLflow.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cpfean.records.run_folder import RunFolder
from orchestration.schedule.rounds import Schedule
from orchestration.tracking.stores import open_store
from tests.experiments.test_command_line import ROOT
from tests.orchestration.samples import TINY

pytestmark = [pytest.mark.slow, pytest.mark.drill, pytest.mark.timeout(1500)]

EVERY = {"quick": 20, "whole": 30}  # seconds
CRON = {"quick": "*/20 * * * * *", "whole": "*/30 * * * * *"}
FLAGS = {
    "quick": ["--only", "no_gcn", "--seeds", "2", "--in-process"],
    "whole": ["--only", "no_gcn", "--seeds", "1"],  # its trials run on the same cluster
}
APART = ["unshare", "--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
HEAD = r"""
set -eu
python - <<'END'
import fcntl, socket, struct
up_and_running = struct.pack("16sh", b"lo", 0x1 | 0x40)
fcntl.ioctl(socket.socket(), 0x8914, up_and_running)  # SIOCSIFFLAGS
END
mkdir -p /tmp/ray
mount -t tmpfs none /tmp/ray
ray get-auth-token --generate > /dev/null
ray start --head --dashboard-host=127.0.0.1 --num-cpus=4 --object-store-memory=100000000
touch "$HOME/up"
exec sleep infinity
"""
JOBS = """
import json
from orchestration.settings import prepare_environment
prepare_environment()
from ray.job_submission import JobSubmissionClient
jobs = JobSubmissionClient("http://127.0.0.1:8265").list_jobs()
print(json.dumps({j.submission_id: [j.status, j.driver_exit_code, j.start_time, j.end_time]
                  for j in jobs if j.submission_id}))
"""
# What jobs and state answer to whoever has no token, or a wrong one.
STRANGERS = """
import json, urllib.error, urllib.request
doors = ["GET /api/jobs/", "POST /api/jobs/", "DELETE /api/jobs/quick-1", "GET /api/v0/nodes",
         "GET /api/v0/tasks", "GET /api/v0/actors", "GET /api/v0/jobs", "GET /nodes?view=summary",
         "GET /api/v0/logs", "GET /api/cluster_status"]
def status(door, headers):
    method, path = door.split()
    data = b'{"entrypoint": "touch stolen"}' if method == "POST" else None
    url = "http://127.0.0.1:8265" + path
    request = urllib.request.Request(url, method=method, data=data, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code
wrong = {"Authorization": "Bearer " + "0" * 64}
print(json.dumps([[status(door, headers) for door in doors] for headers in ({}, wrong)]))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What happened when.

    Attributes:
        added: when each suite was.
        paused: the last scheduler was killed.
        back: the next one was started.
        over: so was that.
        spoilt: the round whose records were changed afterwards, the last before the pause.
        jobs: status, exit code, start and end of every job that Ray knows.
    """

    added: dict[str, datetime]
    paused: datetime
    back: datetime
    over: datetime
    spoilt: str
    jobs: dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A machine of its own, as far as its processes can tell."""

    home: Path
    pid: int

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        enter = ["nsenter", f"--target={self.pid}", "--net", "--pid", "--mount"]
        with (self.home / "log").open("ab") as log:
            return subprocess.Popen(
                [*enter, f"--wd={self.home}", sys.executable, *words],
                env=environment(self.home),
                stdout=subprocess.PIPE if words[0] == "-c" else log,
                stderr=log,
            )

    def schedule(self, *words: str) -> subprocess.Popen[bytes]:
        return self.start(str(ROOT / "experiments/schedule.py"), *words)

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """Kills what `nsenter` has started, and not only `nsenter`."""
        os.kill(child_of(process.pid), signal.SIGKILL)
        process.wait(timeout=30)

    def answer(self, script: str) -> Any:
        """What a script prints last."""
        out, _ = self.start("-c", script).communicate(timeout=120)
        return json.loads(out.splitlines()[-1])

    def log(self) -> str:
        return (self.home / "log").read_text()


def environment(home: Path) -> dict[str, str]:
    return {
        "HOME": str(home),
        "PATH": f"{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(ROOT),
        "CPFEAN_CACHE": str(home / "cache"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
    }


def child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@contextmanager
def ray_head(home: Path) -> Iterator[Host]:
    with (home / "log").open("ab") as log:
        apart = subprocess.Popen(
            [*APART, "bash", "-c", HEAD], env=environment(home), stdout=log, stderr=log
        )
    try:
        wait_until((home / "up").exists, 120, (home / "log").read_text)
        yield Host(home=home, pid=child_of(apart.pid))
    finally:
        apart.kill()  # and all that runs apart with it
        apart.wait()


def wait_until(condition: Callable[[], bool], seconds: float, why: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


def rows_of(home: Path, suite: str) -> list[dict[str, str]]:
    file = home / "runs/schedule.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for row in rows if row["suite"] == suite and row["slot"]]


def slots_with(home: Path, suite: str, *whats: str) -> set[str]:
    return {row["slot"] for row in rows_of(home, suite) if row["what"] in whats}


def slots_between(suite: str, first: datetime, last: datetime) -> list[str]:
    """Slots after the one and not after the other, worked out without the scheduler."""
    every = EVERY[suite]
    start = int(first.timestamp()) // every + 1
    times = range(start * every, int(last.timestamp()) + 1, every)
    return [datetime.fromtimestamp(at, UTC).strftime("%Y%m%dT%H%M%SZ") for at in times]


def table(rows: Sequence[Sequence[object]]) -> str:
    lines = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def test_each_suite_runs_as_often_as_it_should(tmp_path: Path) -> None:
    if (
        not shutil.which("unshare")
        or subprocess.run([*APART, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs Linux and the right to make namespaces (root)")
    with ray_head(tmp_path) as host:
        story = play(host, tmp_path)
    check(story, tmp_path)


def play(host: Host, home: Path) -> Story:
    """Two schedulers, then one, then none, then two at an instant, then one."""
    config = home / "tiny.toml"
    config.write_text(TINY.with_overrides({"optim.epochs": 1}).to_toml())
    for suite, cron in CRON.items():
        words = ["add", suite, "--cron", cron, "--", "--config", str(config), *FLAGS[suite]]
        assert host.schedule(*words).wait(timeout=60) == 0, host.log()

    def ended(suite: str) -> set[str]:
        return slots_with(home, suite, "done", "changed")

    def runs(suite: str) -> set[str]:
        return slots_with(home, suite, "submitted", "known") - ended(suite)

    def calm() -> bool:
        """Whether no slot is near, of which nobody could say who deals with it."""
        return 3 < time.time() % 10 < 7

    def have_ended() -> bool:
        return all(job[0] in ("SUCCEEDED", "FAILED") for job in host.answer(JOBS).values())

    # Two schedulers at once.
    one, two = host.schedule("run"), host.schedule("run")
    wait_until(lambda: len(ended("quick")) >= 2 and len(ended("whole")) >= 1, 300, host.log)
    # One is killed in the middle of a round; the other one goes on.
    wait_until(lambda: bool(runs("quick")), 300, host.log)
    host.kill(one)
    before = ended("quick")
    wait_until(lambda: len(ended("quick") - before) >= 2, 300, host.log)
    # Nobody looks, for three slots of each suite; what runs ends.
    wait_until(calm, 30, host.log)
    host.kill(two)
    paused = datetime.now(UTC)
    wait_until(lambda: len(slots_between("whole", paused, datetime.now(UTC))) >= 3, 120, host.log)
    wait_until(have_ended, 300, host.log)
    # As if the last round before the pause had come to 10 more.
    last = RunFolder(home / "runs" / f"quick-{max(ended('quick'))}")
    for record in last.records():
        record.test["rsum"] += 10
        last.write(record)
    # Two look at the same time, well before the next slot.
    wait_until(lambda: 1 < time.time() % 10 < 3, 30, host.log)
    back = datetime.now(UTC)
    once = [host.schedule("run", "--once") for _ in range(2)]
    assert [process.wait(timeout=60) for process in once] == [0, 0], host.log()
    three = host.schedule("run")
    regular = datetime.now(UTC)
    wait_until(
        lambda: bool(ended("quick") & set(slots_between("quick", regular, datetime.now(UTC)))),
        300,
        host.log,
    )
    wait_until(calm, 30, host.log)
    host.kill(three)
    over = datetime.now(UTC)
    wait_until(have_ended, 300, host.log)
    jobs = host.answer(JOBS)
    anonymous, wrong = host.answer(STRANGERS)
    assert (set(anonymous), set(wrong)) == ({401}, {403})
    assert host.answer(JOBS).keys() == jobs.keys()
    suites = Schedule(home / "runs", script=config, python=sys.executable).suites()
    return Story(
        added={suite.name: datetime.fromisoformat(suite.added) for suite in suites},
        paused=paused,
        back=back,
        over=over,
        spoilt=last.name,
        jobs=jobs,
    )


def check(story: Story, home: Path) -> None:
    """Prints what became of every slot, and compares journal, Ray and MLflow."""
    jobs = story.jobs
    client, experiment = open_store(f"sqlite:///{home / 'runs/mlflow.db'}")
    tracked = client.search_runs([experiment], max_results=5000)
    parents: dict[tuple[str, str], list[Any]] = {}
    for run in tracked:
        if run.data.tags["cpfean.role"] == "parent":
            key = (run.data.tags["cpfean.suite"], run.data.tags["cpfean.slot"])
            parents.setdefault(key, []).append(run)

    lines: list[Sequence[object]] = [
        ("suite", "slot", "journal", "job in Ray", "parents in MLflow", "change", "why")
    ]
    for suite in EVERY:
        rows = rows_of(home, suite)
        for slot in slots_between(suite, story.added[suite], story.over):
            mine = [row for row in rows if row["slot"] == slot]
            found = parents.get((suite, slot), [])
            job = jobs.get(f"{suite}-{slot}")
            lines.append(
                (
                    suite,
                    slot,
                    ", ".join(dict.fromkeys(row["what"] for row in mine)) or "-",
                    f"{job[0]} {job[1]}" if job else "-",
                    ", ".join(run.info.status for run in found) or "-",
                    ", ".join(run.data.tags.get("cpfean.change", "first") for run in found),
                    "; ".join(dict.fromkeys(row["why"] for row in mine if row["why"])),
                )
            )
    print(f"\nno scheduler from {story.paused:%H:%M:%S} to {story.back:%H:%M:%S}\n{table(lines)}")

    for suite in EVERY:
        rows = rows_of(home, suite)
        ran = slots_with(home, suite, "submitted", "known")
        skipped = slots_with(home, suite, "skipped") - ran
        missed = slots_with(home, suite, "missed")
        # Every slot is accounted for, in one way.
        assert sorted([*ran, *skipped, *missed]) == slots_between(
            suite, story.added[suite], story.over
        )
        # MLflow has one parent run for each that ran, and none for the others; so has Ray.
        assert {slot for of, slot in parents if of == suite} == ran
        assert {job for job in jobs if job.startswith(suite)} == {f"{suite}-{s}" for s in ran}
        # No slot was submitted by two schedulers.
        submitted = [row["slot"] for row in rows if row["what"] == "submitted"]
        assert len(submitted) == len(set(submitted))
        # Of the slots of the pause the last was caught up with, and those before it were not.
        pause = slots_between(suite, story.paused, story.back)
        assert len(pause) >= 3
        assert pause[-1] in ran
        assert missed == set(pause[:-1])
        # What was skipped had a predecessor that was running then; rows have whole seconds.
        for row in rows:
            if row["what"] == "skipped":
                _, _, start, end = jobs[row["why"].split()[0]]
                noted = datetime.fromisoformat(row["time"]).timestamp() * 1000
                assert start - 1000 <= noted <= end + 1000
    assert all(len(found) == 1 for found in parents.values())
    assert {run.info.status for run in tracked} == {"FINISHED"}
    trials = {"quick": 4, "whole": 2}
    assert len(tracked) == sum(1 + trials[suite] for suite, _ in parents)

    # The round that was caught up with differs from the one before for certain, and no other does.
    caught_up = slots_between("quick", story.paused, story.back)[-1]
    for (suite, slot), (run,) in parents.items():
        changed = (suite, slot) == ("quick", caught_up)
        status, code, *_ = jobs[f"{suite}-{slot}"]
        assert (status, code) == (("FAILED", 6) if changed else ("SUCCEEDED", 0))
        is_first = slot == min(s for of, s in parents if of == suite)
        expected = "full, no_gcn" if changed else None if is_first else "none"
        assert run.data.tags.get("cpfean.change") == expected
        report = (home / "runs" / f"{suite}-{slot}" / "changes.md").read_text()
        assert report.count("| changed |") == (2 if changed else 0)
        if changed:
            assert run.data.tags["cpfean.compared_with"] == story.spoilt
