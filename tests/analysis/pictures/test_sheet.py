"""Boxes on a page."""

from cpfean.analysis.pictures.sheet import Box, least_covering


def test_the_first_free_box_is_taken_or_the_one_that_covers_least() -> None:
    taken = [Box(0, 0, 1, 1), Box(2, 0, 1, 1)]
    candidates = [Box(0.5, 0, 1, 1), Box(1, 0, 1, 1), Box(1.1, 0, 0.5, 1)]
    assert least_covering(candidates, taken) == candidates[1]
    assert least_covering([Box(0.2, 0, 1, 1), Box(0.9, 0, 1, 1)], taken) == Box(0.9, 0, 1, 1)
