"""Tables and pictures of a comparison."""

import csv
import io
from pathlib import Path

import pytest

from cpfean.analysis.report import (
    csv_runs,
    csv_table,
    difference_plot,
    epoch_plot,
    latex_table,
    markdown_table,
    write_report,
)
from cpfean.analysis.statistics import SeedRun, compare
from tests.analysis.samples import runs

FULL = [300.0, 310.0, 305.0]
WORSE = [280.0, 289.0, 286.0]


def test_tables_say_n_intervals_p_and_what_cannot_be_told_apart() -> None:
    results = compare(runs(full=FULL, scan=WORSE, no_gcn=[301.0, 308.0, 306.0]))
    lines = markdown_table(results).splitlines()
    assert lines[2].startswith("| **full** | 3 | 305.0 ± 12.4 |")
    assert "| scan | 3 | 285.0 ± 11.4 | -20.0 ± 2.5 | 0.002 | worse than full |" in lines
    assert lines[4].startswith("| no gcn | 3 |")
    assert lines[4].endswith("| not distinguishable from full |")
    latex = latex_table(results)
    assert r"scan & 3 & $285.0 \pm 11.4$ & $-20.0 \pm 2.5$ & $0.002$ \\" in latex
    rows = list(csv.DictReader(io.StringIO(csv_table(results))))
    assert [row["variant"] for row in rows] == ["full", "scan", "no_gcn"]
    assert float(rows[1]["difference"]) == pytest.approx(-20)
    assert float(rows[1]["p_holm"]) == pytest.approx(results[1].p, rel=1e-5)


def test_failed_runs_are_said_and_listed() -> None:
    done = [*runs(full=FULL), SeedRun(variant="scan", seed=0, state="failed")]
    assert "| scan | 0 |  |  |  | 1 failed |" in markdown_table(compare(done))
    rows = list(csv.DictReader(io.StringIO(csv_runs(done))))
    assert (rows[-1]["state"], rows[-1]["test_rsum"]) == ("failed", "")
    assert (rows[0]["variant"], rows[0]["seed"], rows[0]["test_rsum"]) == ("full", "0", "300.00")
    assert (rows[0]["dev_rsum"], rows[0]["dev_rsum_by_epoch"]) == ("295.00", "150.00 295.00")
    assert (rows[-1]["dev_rsum"], rows[-1]["dev_rsum_by_epoch"]) == ("", "")


def test_the_report_is_files(tmp_path: Path) -> None:
    files = write_report(runs(full=FULL, scan=WORSE), tmp_path / "report")
    names = {file.name for file in files}
    assert names == {
        *("table.md", "table.tex", "table.csv", "runs.csv"),
        *("differences.png", "epochs.png"),
    }
    assert all(file.stat().st_size > 100 for file in files)


def test_the_forest_plot_shows_the_difference_of_each_variant_and_seed() -> None:
    (axes,) = difference_plot(compare(runs(full=FULL, scan=WORSE))).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["scan"]
    dots = next(line for line in axes.get_lines() if len(line.get_xdata()) == 3)
    assert list(dots.get_xdata()) == [-20.0, -21.0, -19.0]


def test_the_curves_are_the_means_by_epoch_of_the_seeds() -> None:
    (axes,) = epoch_plot(runs(full=FULL, scan=WORSE)).axes
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert curves == {"full": [152.5, 300.0], "scan": [142.5, 280.0]}


def test_a_single_run_is_a_table_without_a_forest_plot(tmp_path: Path) -> None:
    files = write_report(runs(full=[300.0]), tmp_path)
    assert "differences.png" not in {file.name for file in files}
