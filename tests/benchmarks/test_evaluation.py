"""The benchmark of evaluation runs, and its parts are parts of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def test_parts_are_beside_the_evaluation(
    run_benchmark: Callable[..., tuple[str, dict[str, Any]]],
) -> None:
    sizes = ("--images", 9, "--regions", 5, "--dim", 32, "--feature-dim", 16, "--text-dim", 32)
    printed, result = run_benchmark("evaluation", *sizes, "--runs", 3, "--device", "cpu")
    seconds = {row["what"]: row["s"] for row in result["rows"]}
    whole = {"pair scoring alone", "evaluation"}
    parts = {"encode captions", "encode images", "score", "count", "all else"}
    assert seconds.keys() == whole | {f"its part: {part}" for part in parts}
    measured = [value for name, value in seconds.items() if not name.endswith("all else")]
    assert min(measured) > 0
    # Medians of three runs each, of parts of one call; what is left over may come out below 0.
    assert sum(measured[2:]) < 2 * seconds["evaluation"]
    for row in result["rows"]:
        alone = seconds["pair scoring alone"]
        assert row["v pair scoring"] == pytest.approx(row["s"] / alone)
        assert row["what"] in printed
    assert (result["images"], result["captions"]) == (9, 45)
    # 8 to 16 words of 32 float32 each, and one more for the pooled caption.
    assert 45 * 9 * 128 <= result["caption_embedding_bytes"] <= 45 * 17 * 128
    assert result["peak_bytes"] >= 0  # 0 where the process has held as much before
