"""Tables and pictures of a search."""

import csv
from pathlib import Path

import numpy as np
import pytest

from cpfean.analysis.importance import Importance
from cpfean.analysis.search_report import (
    SearchedTrial,
    Setting,
    slice_plot,
    write_search_report,
)

GATE = Setting(path="model.gate", choices=("soft", "hard", "off"))
SHARPNESS = Setting(path="model.sharpness", low=2.0, high=40.0, log=True)
UNTRIED = Setting(path="loss.margin", low=0.1, high=0.4)
TRIALS = [
    SearchedTrial(state="finished", rsum=300.0, values={"model.gate": "soft", SHARPNESS.path: 3.0}),
    SearchedTrial(state="pruned", rsum=90.0, values={"model.gate": "off"}),
    SearchedTrial(state="finished", rsum=310.0, values={"model.gate": "soft", SHARPNESS.path: 9.0}),
]
MATTERED = {
    SHARPNESS.path: Importance(share=0.75, p=0.01),
    GATE.path: Importance(share=0.25, p=0.4),
}


def report(folder: Path, importance: dict[str, Importance]) -> list[Path]:
    return write_search_report(TRIALS, [GATE, SHARPNESS], importance, folder, needed=20)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "importance.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_has_shares_corrected_p_and_how_many_trials_searched_a_setting(
    tmp_path: Path,
) -> None:
    files = report(tmp_path / "report", MATTERED)
    assert [file.name for file in files] == [
        *("importance.md", "importance.csv"),
        *("slice-model.gate.png", "slice-model.sharpness.png"),
    ]
    assert all(file.stat().st_size > 1000 for file in files[2:])
    text = files[0].read_text()
    assert "3 trials (1 stopped early)" in text
    assert text.splitlines()[-2:] == [
        "| model.sharpness | 2 | 0.750 | 0.020 |",
        "| model.gate | 3 | 0.250 | 0.400 |",
    ]
    assert rows_of(tmp_path / "report")[0] == {
        "setting": "model.sharpness",
        "trials": "2",
        "importance": "0.750",
        "p_holm": "0.020",
    }


def test_of_too_few_trials_there_are_pictures_and_no_number(tmp_path: Path) -> None:
    report(tmp_path, MATTERED)
    files = report(tmp_path, {})  # the older one is replaced
    assert len(files) == 4
    text = files[0].read_text()
    assert text.startswith("No importance is given: 3 trials (1 stopped early) are too few")
    assert "it takes 20" in text
    assert "|" not in text
    rows = rows_of(tmp_path)
    assert [row["setting"] for row in rows] == ["model.gate", "model.sharpness"]
    assert {row["importance"] + row["p_holm"] for row in rows} == {""}


def test_without_a_trial_that_came_so_far_there_is_no_picture(tmp_path: Path) -> None:
    files = write_search_report([], [GATE, UNTRIED], {}, tmp_path, needed=20)
    assert [file.name for file in files] == ["importance.md", "importance.csv"]
    assert "0 trials" in files[0].read_text()


def test_a_slice_has_a_point_for_each_trial_that_searched_the_setting_by_state() -> None:
    figure = slice_plot(TRIALS, GATE)
    (axes,) = figure.axes
    finished, stopped = axes.get_lines()
    assert (finished.get_label(), stopped.get_label()) == ("finished (2)", "stopped early (1)")
    assert finished.get_marker() != stopped.get_marker()
    assert list(finished.get_ydata()) == [300.0, 310.0]
    # Each within its strip, and no two of them at one place.
    assert [round(x) for x in finished.get_xdata()] == [0, 0]
    assert finished.get_xdata()[0] < finished.get_xdata()[1]
    assert list(stopped.get_xdata()) == [2.0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["soft", "hard", "off"]


def test_a_number_has_its_whole_range_and_the_logarithm_where_it_was_drawn_on_it() -> None:
    (axes,) = slice_plot(TRIALS, SHARPNESS).axes
    (finished,) = axes.get_lines()
    assert list(finished.get_xdata()) == [3.0, 9.0]
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low == pytest.approx(2, rel=0.2)
    assert low < 2
    assert high > 40
    margin = SearchedTrial(state="finished", rsum=1.0, values={"loss.margin": 0.2})
    (axes,) = slice_plot([margin], UNTRIED).axes
    assert axes.get_xscale() == "linear"
    assert np.allclose(axes.get_xlim(), (0.1, 0.4), atol=0.02)
