"""schedule.py as a user and as a Ray job run it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from experiments import schedule as command
from orchestration.schedule.rounds import Schedule
from orchestration.tracking.stores import open_store
from tests.experiments.test_command_line import call
from tests.orchestration.samples import TINY
from tests.orchestration.tracking_store import new_store

FLAGS = ["--config", "tiny.toml", "--in-process", "--only", "no_gcn", "--seeds", "2"]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(TINY.with_overrides({"optim.epochs": 1}).to_toml())
    return tmp_path


def test_a_suite_is_added_listed_and_removed(tiny: Path) -> None:
    empty = call("schedule.py", "list", cwd=tiny)
    assert (empty.returncode, empty.stdout.split(" in ")[0]) == (0, "no suites")
    add = ["schedule.py", "add", "nightly", "--cron", "0 2 * * *"]
    for name in ("synthetic", "small", "elsewhere"):  # the first two are names all the same
        (tiny / name).mkdir()
    more = ["--data", "synthetic", "--set", "model.text.encoder=elsewhere", "--results=r"]
    added = call(*add, "--", *FLAGS, *more, cwd=tiny)
    assert added.returncode == 0, added.stderr
    listed = call("schedule.py", "list", cwd=tiny).stdout.splitlines()
    assert listed[1].split()[0] == "nightly"
    # A round starts in another folder.
    flags = [str(tiny / word) if word.endswith(".toml") else word for word in FLAGS]
    flags += ["--data", "synthetic", "--set", f"model.text.encoder={tiny / 'elsewhere'}"]
    assert listed[1].endswith(" ".join([*flags, f"--results={tiny / 'r'}"]))
    # As three rounds that failed, and one that was not run for it, leave it.
    schedule = Schedule(tiny / "runs", script=tiny, python="python")
    schedule.note("nightly", "20261101T020000Z", "failed", "no such device")
    schedule.note("nightly", "20261102T020000Z", "paused", "the last 3 rounds failed")
    (_, row) = call("schedule.py", "list", cwd=tiny).stdout.splitlines()
    assert re.search(r"0 2 \* \* \* +paused +20261101T020000Z failed: no such device ", row)
    assert " 20261102T020000Z paused: the last 3 rounds failed " in row
    resumed = call("schedule.py", "resume", "nightly", cwd=tiny)
    assert re.fullmatch(r"nightly: next due \S+ 02:00:00\.\n", resumed.stdout)
    (_, row) = call("schedule.py", "list", cwd=tiny).stdout.splitlines()
    assert re.search(r"0 2 \* \* \* +\S+ 02:00:00 ", row)
    assert call("schedule.py", "remove", "nightly", cwd=tiny).returncode == 0
    assert "no suites" in call("schedule.py", "list", cwd=tiny).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "nightly"], "add needs --cron"),
        (["add", "--cron", "0 2 * * *"], "add takes the NAME of a suite"),
        (["add", "n", "--cron", "2"], "--cron needs five fields"),
        (["add", "n", "--cron", "0 2 * * *", "--", "--only", "no_gnc"], "no ablation 'no_gnc'"),
        (["add", "n", "--cron", "0 2 * * *", "--", "--name", "x"], "--name is set by"),
        (["add", "n", "--cron", "0 2 * * *", "--", "--name=x"], "--name is set by"),
        (["add", "n", "--cron", "0 2 * * *", "--", "--set=--"], "--set: no value can be '--'"),
        (["add", "n", "--cron", "0 2 * * *", "--", "--seed", "x"], "seed"),
        (["remove", "nightly"], "no suite 'nightly'; there are: none"),
        (["resume", "nightly"], "no suite 'nightly'; there are: none"),
        (["round", "nightly"], "round takes NAME and SLOT"),
        (["run", "nightly"], "run takes no name"),
    ],
)
def test_mistakes_are_named_before_a_night_is_lost(
    tiny: Path, words: list[str], message: str
) -> None:
    done = call("schedule.py", *words, cwd=tiny)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


RoundOf = Callable[[str], tuple[int, str]]


@pytest.fixture
def round_of(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> RoundOf:
    """Runs a round as its job does, but for the seconds that each process takes to start."""
    new_store(tiny / "runs" / "mlflow.db")
    monkeypatch.chdir(tiny)
    monkeypatch.setenv("CPFEAN_CACHE", str(tiny / "cache"))

    def run(slot: str) -> tuple[int, str]:
        before = sys.argv
        sys.argv = ["schedule.py", "round", "nightly", slot, "--", *FLAGS]
        try:
            with pytest.raises(SystemExit) as ended:
                command.main()
        finally:
            sys.argv = before
        return int(ended.value.code or 0), capsys.readouterr().out

    return run


@pytest.mark.long
def test_a_round_is_compared_with_the_one_before(tiny: Path, round_of: RoundOf) -> None:
    code, said = round_of("20261101T020000Z")
    assert (code, "nothing to compare it with" in said) == (0, True)
    _, again = round_of("20261101T020000Z")
    assert again.endswith("nightly-20261101T020000Z has been run already.\n")

    code, same = round_of("20261102T020000Z")
    assert code == 0
    assert "epoch 1/1" in same  # trained anew, to the same numbers
    assert same.endswith("no change beyond the interval\n")

    # As if the second round had come to 10 less.
    for file in (tiny / "runs/nightly-20261102T020000Z").glob("trials/*/record.json"):
        record = json.loads(file.read_text())
        record["test"]["rsum"] -= 10
        file.write_text(json.dumps(record))
    code, changed = round_of("20261103T020000Z")
    assert (code, changed.splitlines()[-1]) == (6, "changed: full, no_gcn")
    table = (tiny / "runs/nightly-20261103T020000Z/changes.md").read_text()
    assert "nightly-20261102T020000Z" in table
    assert table.count("10.0 ± 0.0 | changed |") == 2
    client, experiment = open_store(f"sqlite:///{tiny / 'runs/mlflow.db'}")
    parents = client.search_runs([experiment], "tags.`cpfean.role` = 'parent'")
    tags = {run.data.tags["cpfean.slot"]: run.data.tags for run in parents}
    assert len(tags) == len(parents) == 3
    assert {of["cpfean.suite"] for of in tags.values()} == {"nightly"}
    assert "cpfean.change" not in tags["20261101T020000Z"]
    assert tags["20261102T020000Z"]["cpfean.change"] == "none"
    assert tags["20261103T020000Z"]["cpfean.compared_with"] == "nightly-20261102T020000Z"
    assert tags["20261103T020000Z"]["cpfean.change"] == "full, no_gcn"
    rows = [json.loads(line) for line in (tiny / "runs/schedule.jsonl").read_text().splitlines()]
    assert [row["what"] for row in rows] == ["done", "done", "done", "changed"]


def test_a_round_that_fails_is_noted_with_the_reason(tiny: Path) -> None:
    words = ["round", "nightly", "20261101T020000Z", "--", *FLAGS, "--data", "absent"]
    done = call("schedule.py", *words, cwd=tiny)
    assert done.returncode == 3
    (line,) = (tiny / "runs/schedule.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert (row["suite"], row["slot"], row["what"]) == ("nightly", "20261101T020000Z", "failed")
    assert "absent" in row["why"]


def test_a_round_that_was_cut_off_goes_on(tiny: Path, round_of: RoundOf) -> None:
    assert round_of("20261101T020000Z")[0] == 0
    folder = tiny / "runs/nightly-20261101T020000Z"
    (folder / "summary.json").unlink()  # as if it had been killed before its last line
    code, said = round_of("20261101T020000Z")
    assert (code, "epoch 1/1" in said) == (0, False)
    assert json.loads((folder / "summary.json").read_text())["trials"]


def test_without_a_cluster_it_says_so(tiny: Path) -> None:
    yesterday = datetime.now(UTC) - timedelta(days=1)
    schedule = Schedule(tiny / "runs", script=tiny, python="python", now=lambda: yesterday)
    schedule.add("quick", cron="0 * * * *", arguments=FLAGS)
    done = call("schedule.py", "run", "--once", "--jobs", "http://127.0.0.1:9", cwd=tiny)
    assert done.returncode == 5
    assert "no Ray cluster takes jobs at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_due_is_said(tiny: Path) -> None:
    Schedule(tiny / "runs", script=tiny, python="python").add(
        "quick", cron="0 0 29 2 *", arguments=FLAGS
    )
    done = call("schedule.py", "run", "--once", "--jobs", "http://127.0.0.1:9", cwd=tiny)
    assert done.returncode == 0
    assert done.stdout.endswith("nothing is due.\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_scheduler_ends_when_it_is_told_to(tiny: Path, number: signal.Signals) -> None:
    words = [sys.executable, command.__file__, "run", "--output", str(tiny / "runs")]
    environment = os.environ | {"CPFEAN_CACHE": str(tiny / "cache")}
    scheduler = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert scheduler.stdout is not None
        assert "looking after 0 suite(s)" in scheduler.stdout.readline()
        scheduler.send_signal(number)
        _, error = scheduler.communicate(timeout=30)
    finally:
        scheduler.kill()
    assert (scheduler.returncode, error) == (128 + number, "")
