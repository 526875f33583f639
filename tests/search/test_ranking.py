"""The best of many scores, against sorting all of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpfean.search.ranking import best


@given(
    scores=st.lists(st.sampled_from([-1.0, -0.25, 0.0, 0.25, 0.5, 1.0]), max_size=40),
    count=st.integers(0, 50),
)
def test_the_best_are_those_of_a_stable_sort(scores: list[float], count: int) -> None:
    expected = sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]
    assert best(np.array(scores, dtype=np.float32), count).tolist() == expected


def test_a_million_scores_are_ranked_as_a_few_are() -> None:
    scores = np.random.default_rng(0).standard_normal(1_000_000).astype(np.float32)
    expected = np.argsort(-scores, kind="stable")[:100]
    np.testing.assert_array_equal(best(scores, 100), expected)
