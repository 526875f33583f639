"""The benchmark of the data path runs, and its figures are of one another's kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def test_every_way_of_gathering_is_beside_its_plain_copy(
    run_benchmark: Callable[..., tuple[str, dict[str, Any]]],
) -> None:
    options = ("--images", 12, "--regions", 10, "--feature-dim", 8, "--batch-size", 6)
    printed, result = run_benchmark(
        "data_loading", *options, "--batches", 3, "--step", 0.002, "--runs", 2
    )
    rows = result["rows"]
    assert [row["features"] for row in rows] == ["float32"] * 5 + ["float16"] * 5
    for row in rows:
        copies = row["what"].startswith("plain copy")
        assert row["v plain copy"] == pytest.approx(1) if copies else row["v plain copy"] > 0
        assert row["GB/s"] == pytest.approx(row["MB a batch"] / row["ms a batch"])
        regions = 8 if "dropout" in row["what"] or "regions" in row["what"] else 10
        assert row["MB a batch"] * 1e6 == 6 * regions * 8 * (
            4 if row["features"] == "float32" else 2
        )
        assert row["what"] in printed
    assert [row["gathered"] for row in result["waiting"]] == ["in between", "ahead"] * 2
    assert all(row["ms waited"] > 0 for row in result["waiting"])
