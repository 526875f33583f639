"""What came out of a study, for people who read it in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cpfean import commands
from cpfean.config import Plain
from cpfean.records.trial_record import TrialRecord
from orchestration.settings import Settings
from orchestration.study.conclusion import StudyResult
from orchestration.tracking.address import is_web, shown

_APART = ": with another number the same settings come to another model"


def print_comparison(result: StudyResult, report: Path, where: Settings) -> None:
    """The table, and where everything is."""
    from cpfean.analysis.report import markdown_table
    from cpfean.analysis.statistics import compare
    from orchestration.study.comparison import seed_runs

    print("\n" + markdown_table(compare(seed_runs(result.records))))
    print_closing(result, where, report=report)


def print_closing(result: StudyResult, where: Settings, *, report: Path | None = None) -> None:
    print("\n" + "\n".join(closing_lines(result, where, report=report)), flush=True)


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Recalls in a small table."""
    print(f"{'':16}{'R@1':>7}{'R@5':>7}{'R@10':>7}")
    for title, direction in (("image to text", "i2t"), ("text to image", "t2i")):
        cells = "".join(f"{metrics[f'{direction}_r{k}']:7.1f}" for k in (1, 5, 10))
        print(f"{title:16}{cells}")
    print(f"{'rSum':16}{metrics['rsum']:7.1f}")


def table(records: Sequence[TrialRecord]) -> str:
    """Trials as lines for people: state, rSum, epochs, what was varied, seconds."""
    paths = list(dict.fromkeys(path for record in records for path in record.overrides))
    header = ["trial", "state", "dev rSum", "epochs", *(_short(path) for path in paths), "seconds"]
    rows = [
        [
            record.name,
            record.state + (f" ({record.failure})" if record.failure else ""),
            f"{record.best_rsum:.1f}" if record.history else "-",
            str(record.epochs),
            *(_value(record.overrides.get(path, "-")) for path in paths),
            f"{record.seconds:.0f}",
        ]
        for record in sorted(records, key=lambda r: (r.state == "failed", -r.best_rsum, r.number))
    ]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *rows]
    )


def closing_lines(
    result: StudyResult, settings: Settings, *, report: Path | None = None
) -> list[str]:
    """Where everything is; a report that was not written is not named."""
    lines = [f"records         {result.folder}"]
    if report is not None and result.has_report:
        lines.append(f"tables, plots   {report}")
    if result.best is None:
        lines.append("best            none: no trial finished")
    else:
        lines += [
            f"best            {result.best.name}, dev rSum {result.best.best_rsum:.1f}",
            f"configuration   {result.folder / 'best_config.toml'}",
        ]
    if threads := sorted(set().union(*(record.threads for record in result.records))):
        told = " and ".join(map(str, threads))
        lines.append(f"threads         {told}{_APART if len(threads) > 1 else ''}")
    if result.test:
        lines.append(f"test rSum       {result.test['rsum']:.1f}")
        model = result.folder / "best_model"
        lines.append(f"model           {model if model.is_dir() else 'not on this machine'}")
    if result.failed:
        lines.append(f"failed          {result.failed}")
    if result.spent:
        lines.append(f"spent           {result.spent}")
    if result.used_up:
        lines.append(f"budget          {result.used_up}")
    uri = settings.tracking_uri
    look = shown(uri) if is_web(uri) else commands.look_at_runs(uri)
    return [*lines, f"look at it      {look}"]


def _short(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _value(value: Plain) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
