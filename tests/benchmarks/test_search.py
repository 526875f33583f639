"""The benchmark of searching runs, and what it says of shortlists is so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpfean.search.searcher import Searcher
from tests.search.conftest import home

__all__ = ["home"]

RunBenchmark = Callable[..., tuple[str, dict[str, Any]]]


def test_generated_galleries_are_measured_and_removed(
    run_benchmark: RunBenchmark, tmp_path: Path
) -> None:
    sizes = ("--images", 30, 300, "--config", "synthetic", "--shortlist", 20)
    _, result = run_benchmark("search", *sizes, "--scratch", tmp_path, "--runs", 1)
    for row, images in zip(result["rows"], (30, 300), strict=True):
        assert row["images"] == images
        assert row["exact s"] > 0
        assert row["shortlist of 20 s"] > 0
        # 24 regions and a pool of 64 float32 each, and beside them masks and thresholds.
        assert row["disk GB"] * 1e9 == pytest.approx(images * (25 * 64 * 4 + 24 * 5), rel=0.1)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_shortlists_are_compared_with_the_exact_order(
    run_benchmark: RunBenchmark, home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CPFEAN_CACHE", str(tmp_path / "cache"))
    asked = ("--questions", 10, "--lengths", 10, 29, 30)
    words = ("--images", 30, "--config", "synthetic", "--runs", 1, *asked)
    printed, result = run_benchmark(
        "search", "--model", home / "prominent", "--data", home / "data", *words
    )
    rows = result["real"]["shortlists"]
    assert [row["shortlist"] for row in rows] == ["every image", 10, 29]
    shares = [row["share of the exact 10 best"] for row in rows]
    assert shares[0] == rows[0]["first one the same"] == 1
    searcher = Searcher.from_pretrained(
        home / "prominent", data=home / "data", cache_dir=home / "cache", device="cpu"
    )
    for row, length in zip(rows[1:], (10, 29), strict=True):
        expected = []
        for question in searcher.split.captions[::15]:
            exact = {hit.position for hit in searcher.images(question, k=10)}
            found = searcher.images(question, k=10, shortlist=length)
            expected.append(len(exact & {hit.position for hit in found}) / 10)
        assert row["share of the exact 10 best"] == pytest.approx(sum(expected) / len(expected))
    assert "every image" in printed
