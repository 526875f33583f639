"""What is printed of a study at its end."""

from experiments.outcome import table
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
