"""Ablations on a schedule: suites that run at their times, each time once."""

from __future__ import annotations

import argparse
import re
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cpfean import commands
from cpfean.errors import ConfigError, message_of
from cpfean.folders import expanded
from experiments import command_line, run_ablations
from experiments.ablations import ABLATIONS
from experiments.baselines import BASELINES
from orchestration.study.stopping import Interrupted

if TYPE_CHECKING:
    from cpfean.analysis.statistics import Change
    from cpfean.records.run_folder import RunFolder
    from orchestration.schedule.journal import Row
    from orchestration.schedule.rounds import Schedule

CHANGED = 6  # exit code

_EPILOG = """\
commands:
  add NAME --cron "MIN HOUR DAY MONTH WEEKDAY" [-- FLAGS]
               a suite: flags of run_ablations.py, and when it runs (UTC)
  list         the suites, when they are due, the last round, and what was not run and why
  remove NAME
  resume NAME  go on with a suite that was paused because its last 3 rounds failed
  run          submit rounds when they are due, until stopped; --once: those due now, and end
  round NAME SLOT -- FLAGS
               one round, compared with the one before; what the submitted jobs call

A round is a Ray job whose id is made of suite and time. Ray refuses a second one, so any number of
schedulers may look after the same suites, be killed and started, and each time is run once. While a
round runs, the next one of its suite is skipped. After a pause the last time that has passed is
caught up with. A suite is paused when its last 3 rounds failed, or were killed. A round trains
everything anew; add --results DIR to the flags to take over what is known.

  python experiments/schedule.py add nightly --cron "0 2 * * *" -- --only no_fusion --seeds 3
  python experiments/schedule.py run

Exit codes: 0 done, 2 flags or configuration, 3 data, 4 some runs failed, 5 cluster or storage,
6 (of a round) rSum changed beyond the interval, 130 or 143 stopped.
"""
_OURS = ("--name", "--output", "--resume", "--retry-failed")
_PATHS = (
    "--config",
    "--data",
    "--prices",
    "--results",
    "--set data.path",
    "--set model.text.encoder",
)


def main() -> None:
    # argparse would take the flags after "--" for its own.
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = command_line.Parser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("command", choices=tuple(_COMMANDS))
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the suite; SLOT of a round")
    parser.add_argument("--cron", metavar="TIMES", help="when a suite runs, e.g. '0 2 * * *'")
    parser.add_argument("--once", action="store_true", help="run what is due now, and end")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=command_line.output_folder,
        default=Path("runs"),
        help="folder of the schedule and of the rounds (default: runs)",
    )
    parser.add_argument(
        "--jobs",
        metavar="URL",
        default="http://127.0.0.1:8265",
        help="dashboard of the Ray cluster (default: that of the head, on the head)",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error came from")
    sys.argv[1:] = words[:at]
    given = words[at + 1 :]
    command_line.run(parser, lambda arguments: body(arguments, given))


def body(arguments: argparse.Namespace, given: list[str]) -> int:
    from orchestration.schedule.rounds import Schedule

    wanted = {"add": 1, "remove": 1, "resume": 1, "round": 2}.get(arguments.command, 0)
    if len(arguments.names) != wanted:
        what = ("no name", "the NAME of a suite", "NAME and SLOT")[wanted]
        raise ConfigError(f"{arguments.command} takes {what}.")
    schedule = Schedule(
        expanded(arguments.output, what="--output").absolute(),
        script=Path(__file__).resolve(),
        python=sys.executable,
    )
    return _COMMANDS[arguments.command](schedule, arguments, given)


def _add(schedule: Schedule, arguments: argparse.Namespace, given: list[str]) -> int:
    if not arguments.cron:
        raise ConfigError("add needs --cron, e.g. --cron '0 2 * * *' for every night at two, UTC.")
    given = _from_anywhere(given)
    _checked(given)
    suite = schedule.add(arguments.names[0], cron=arguments.cron, arguments=given)
    (row,) = [row for row in _rows(schedule) if row[0] == suite.name]
    print(f"{suite.name}: first due {row[2]}. What has to be running then:")
    print(commands.script("schedule.py", "run", "--output", schedule.folder))
    return 0


def _list(schedule: Schedule, arguments: argparse.Namespace, given: list[str]) -> int:
    header = ("suite", "cron (UTC)", "next", "last round", "last not run", "flags")
    rows = [header, *_rows(schedule)]
    if len(rows) == 1:
        print(f"no suites in {schedule.folder}; see {commands.script('schedule.py', '--help')}")
        return 0
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    return 0


def _remove(schedule: Schedule, arguments: argparse.Namespace, given: list[str]) -> int:
    schedule.remove(arguments.names[0])
    return 0


def _resume(schedule: Schedule, arguments: argparse.Namespace, given: list[str]) -> int:
    (name,) = arguments.names
    schedule.resume(name)
    (row,) = [row for row in _rows(schedule) if row[0] == name]
    print(f"{name}: next due {row[2]}.")
    return 0


def _run(schedule: Schedule, arguments: argparse.Namespace, given: list[str]) -> int:
    from orchestration.schedule.jobs import RayJobs

    def end(number: int, _frame: object) -> None:
        raise Interrupted(number)

    jobs = RayJobs(arguments.jobs)
    if arguments.once:
        if not schedule.tick(jobs, command_line.say):
            command_line.say("nothing is due.")
        return 0
    signal.signal(signal.SIGTERM, end)
    command_line.say(f"looking after {len(schedule.suites())} suite(s) in {schedule.folder}")
    schedule.run(jobs, command_line.say)


def _round(schedule: Schedule, arguments: argparse.Namespace, given: list[str]) -> int:
    from orchestration.settings import check_name

    suite, slot = arguments.names
    check_name(f"{suite}-{slot}")
    with schedule.only_round(suite, slot, command_line.say) as is_ours:
        if not is_ours:
            return 0
        try:
            code = _run_round(schedule, suite, slot, given)
        except (KeyboardInterrupt, Interrupted):
            schedule.note(suite, slot, "stopped")
            raise
        except BaseException as error:
            schedule.note(suite, slot, "failed", message_of(error))
            raise
        what = "changed" if code == CHANGED else "done"
        schedule.note(suite, slot, what, "some runs failed" if code not in (0, CHANGED) else "")
        return code


def _run_round(schedule: Schedule, suite: str, slot: str, given: list[str]) -> int:
    from cpfean.records.run_folder import RunFolder

    name = f"{suite}-{slot}"
    folder = RunFolder(schedule.folder / name)
    flags = [*given, "--name", name, "--output", str(schedule.folder)]
    if "--results" not in _flags(given):
        flags += ["--results", str(folder.path / "results")]
    if folder.identity_file.exists():
        flags.append("--resume")
    asked = run_ablations.make_parser().parse_args(flags)
    asked.tags = {"cpfean.suite": suite, "cpfean.slot": slot}
    code = 0
    if (folder.path / "summary.json").exists():
        command_line.say(f"{name} has been run already.")
    else:
        code = run_ablations.body(asked)
    if (folder.path / "changes.md").exists():
        return code
    changed = _compare_with_the_last(folder, suite, asked)
    return CHANGED if changed and code == 0 else code


def _compare_with_the_last(folder: RunFolder, suite: str, asked: argparse.Namespace) -> bool:
    """Says and records what changed since the round before; whether anything did for certain."""
    from cpfean.analysis.statistics import changes
    from cpfean.errors import ServiceError
    from cpfean.records.run_folder import RunFolder
    from cpfean.writing import write_text
    from orchestration.study.comparison import seed_runs
    from orchestration.tracking.runs import tag_parent

    before = _round_before(folder.path, suite)
    if before is None:
        first = "The first round of this suite: nothing to compare it with."
        write_text(folder.path / "changes.md", first + "\n")
        print(f"\n{first}")
        return False
    found = changes(seed_runs(RunFolder(before).records()), seed_runs(folder.records()))
    certain = [change.name for change in found if change.is_certain]
    table = _table(found, before.name)
    verdict = f"changed: {', '.join(certain)}" if certain else "no change beyond the interval"
    print(f"\n{table}\n\n{verdict}")
    tags = {"cpfean.compared_with": before.name, "cpfean.change": ", ".join(certain) or "none"}
    try:
        tag_parent(command_line.settings(asked).tracking_uri, folder.id, tags)
    except ServiceError as error:
        command_line.say(f"tracking: {error}")
    # Last: a round that was killed before this is compared when it is run again.
    write_text(folder.path / "changes.md", table + "\n")
    return bool(certain)


def _round_before(folder: Path, suite: str) -> Path | None:
    """The newest finished round of a suite that is older than this one."""
    pattern = re.compile(rf"{re.escape(suite)}-\d{{8}}T\d{{6}}Z")
    rounds = [
        other
        for other in folder.parent.iterdir()
        if pattern.fullmatch(other.name)
        and other.name < folder.name
        and (other / "summary.json").exists()
    ]
    return max(rounds, default=None)


def _table(found: list[Change], before: str) -> str:
    lines = [
        f"| variant | rSum, {before} | rSum now | difference, 95 % | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for change in found:
        cells = [
            "-" if interval is None else interval.brief
            for interval in (change.before, change.now, change.difference)
        ]
        verdict = "changed" if change.is_certain else ""
        lines.append(f"| {change.name.replace('_', ' ')} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines)


def _checked(given: list[str]) -> None:
    """Refuses flags that would fail every night."""
    for flag in _OURS:
        if flag in _flags(given):
            raise ConfigError(f"{flag} is set by the schedule; leave it out of the flags.")
    asked = run_ablations.make_parser().parse_args(given)
    if asked.dry_run:
        raise ConfigError("--dry-run starts nothing; leave it out of the flags.")
    command_line.budget(asked)
    command_line.chosen(asked.only, ABLATIONS, flag="--only", what="ablation")
    command_line.configuration(asked)


def _flags(given: list[str]) -> set[str]:
    """The flags among words, whichever way their values are given."""
    return {word.partition("=")[0] for word in given if word.startswith("--")}


def _from_anywhere(given: list[str]) -> list[str]:
    """The flags with absolute paths: a round starts in another folder."""
    words: list[str] = []
    for word in given:
        before = words[-1] if words else ""
        flag, equals, value = word.partition("=")
        if before == "--set" and f"--set {flag}" in _PATHS:
            words.append(f"{flag}={_absolute(f'--set {flag}', value)}")
        elif equals and flag in _PATHS:
            words.append(f"{flag}={_absolute(flag, value)}")
        else:
            words.append(_absolute(before, word) if before in _PATHS else word)
    return words


def _absolute(flag: str, value: str) -> str:
    """The path; what is none stays: a URL, generated data, a configuration's or model's name."""
    is_name = "://" in value or value == "synthetic" or (flag == "--config" and value in BASELINES)
    path = expanded(value, what=flag)
    is_path = not is_name and (path.exists() or flag == "--results")
    return str(path.absolute()) if is_path else value


def _rows(schedule: Schedule) -> list[tuple[str, ...]]:
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    rows: list[tuple[str, ...]] = []
    for suite in schedule.suites():
        standing = schedule.standing(suite.name)
        due = suite.next(now)
        rows.append(
            (
                suite.name,
                suite.cron,
                "paused" if standing.is_paused else f"{due:%Y-%m-%d %H:%M:%S}" if due else "never",
                _became(standing.last),
                _became(standing.not_run),
                " ".join(suite.arguments),
            )
        )
    return rows


def _became(row: Row) -> str:
    if not row.slot:
        return "-"
    return f"{row.slot} {row.what}" + (f": {row.why}" if row.why else "")


_COMMANDS: Mapping[str, Callable[[Schedule, argparse.Namespace, list[str]], int]] = {
    "add": _add,
    "list": _list,
    "remove": _remove,
    "resume": _resume,
    "run": _run,
    "round": _round,
}


if __name__ == "__main__":
    main()
