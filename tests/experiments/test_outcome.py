"""What is printed of a study at its end."""

from pathlib import Path

import pytest

from cpfean.records.trial_record import TrialRecord
from experiments.outcome import closing_lines, table
from orchestration.settings import Settings
from orchestration.study.conclusion import StudyResult
from tests.orchestration.samples import record


def test_the_table_shows_the_best_trial_first_and_what_each_one_varied() -> None:
    lines = table(
        [
            record(0, 50.0, state="finished", overrides={"loss.margin": 0.2}),
            record(1, 90.0, state="pruned", overrides={"loss.margin": 0.35}),
            record(2, state="failed", failure="oom"),
        ]
    ).splitlines()
    assert lines[0].split()[:2] == ["trial", "state"]
    assert "margin" in lines[0]
    assert lines[1].split()[:3] == ["trial-001", "pruned", "90.0"]
    assert "0.35" in lines[1]
    assert "failed (oom)" in lines[3]


def trained_with(*threads: int) -> TrialRecord:
    trial = record(0, *[50.0] * len(threads), state="finished")
    for row, number in zip(trial.history, threads, strict=True):
        row["train/threads"] = number
    return trial


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([record(0, 50.0)], []),  # of a release that did not note it
        ([trained_with(1, 1), trained_with(1)], ["threads         1"]),
        (
            [trained_with(2), trained_with(1, 10)],
            [
                "threads         1 and 2 and 10: with another number the same settings come to "
                "another model"
            ],
        ),
    ],
)
def test_the_numbers_of_threads_stand_beside_the_result(
    tmp_path: Path, records: list[TrialRecord], told: list[str]
) -> None:
    where = Settings(output=tmp_path, cache_dir=tmp_path, tracking_uri="")
    lines = closing_lines(StudyResult(folder=tmp_path, records=tuple(records)), where)
    assert [line for line in lines if line.startswith("threads")] == told
