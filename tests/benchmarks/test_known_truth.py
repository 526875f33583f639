"""How gates are judged, by hand; what they are judged to be is in tests/model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.known_truth import area_under_curve


@given(
    above=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    below=st.lists(st.integers(0, 5), min_size=1, max_size=8),
)
def test_the_area_under_the_curve_counts_pairs_in_order_and_ties_half(
    above: list[int], below: list[int]
) -> None:
    pairs = [(a > b) + (a == b) / 2 for a in above for b in below]
    area = area_under_curve(np.array(above, dtype=float), np.array(below, dtype=float))
    assert area == pytest.approx(sum(pairs) / len(pairs))
