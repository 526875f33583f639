from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., tuple[str, dict[str, Any]]]
SMALL = ("--device", "cpu", "--runs", 1)


def by_section(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault(row["section"], []).append(row)
    return found


def test_scores_gradients_and_repeats_are_checked_for_every_switch(run_benchmark: Run) -> None:
    _, result = run_benchmark("gpu", *SMALL, "--only", "kernels", "gradients", "repeats")
    sections = by_section(result)
    switches = [row["what"] for row in sections["gradients"]]
    assert len(switches) >= 7
    assert len(sections["kernels"]) == 3 * len(switches)
    assert len(sections["repeats"]) == len(switches)
    checked = [row for rows in sections.values() for row in rows if row["bound"]]
    assert all(row[""] == "holds" for row in checked)
    # Rounding leaves something: what is exactly right has not been computed.
    assert all(row["found"] > 0 for row in sections["kernels"] + sections["gradients"])
    assert {"card", "commit", "versions", "date"} <= set(result)


def test_a_wrong_score_fails(
    run_benchmark: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from gpu_checks import kernels

    right = kernels.local_scores

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        scores = right(*args, **kwargs).clone()
        scores[0, -1] = torch.nan  # as of an output that nobody wrote
        return scores

    monkeypatch.setattr(kernels, "local_scores", wrong)
    with pytest.raises(SystemExit) as ended:
        run_benchmark("gpu", *SMALL, "--only", "kernels")
    assert ended.value.code == 1
    assert "does not hold: kernels, the default, fp32 products" in capsys.readouterr().out


def test_what_there_is_no_time_for_and_what_needs_more_is_said(run_benchmark: Run) -> None:
    _, result = run_benchmark("gpu", *SMALL, "--only", "ceilings", "rsum", "--minutes", -1)
    assert [row["note"] for row in result["rows"]] == ["no time left of --minutes -1"] * 2
    _, result = run_benchmark("gpu", *SMALL, "--only", "syncs", "rsum")
    assert [row["what"] for row in result["rows"]] == ["not run"] * 2


def test_a_model_without_data_is_refused(
    run_benchmark: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_benchmark("gpu", *SMALL, "--model", "somewhere")
    assert "--model and --data go together" in capsys.readouterr().err


@pytest.mark.long
def test_all_of_it_runs_on_a_processor(run_benchmark: Run) -> None:
    _, result = run_benchmark("gpu", *SMALL)
    sections = by_section(result)
    assert len(sections) == 11
    assert all(row[""] == "holds" for rows in sections.values() for row in rows if row["bound"])
    assert [row["what"] for row in sections["processes"]][-1].startswith("a partner is killed")
