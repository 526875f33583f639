"""How much settings mattered, beside what chance gives."""

from collections.abc import Sequence

import pytest

from cpfean.analysis.importance import shuffle_test

SIDES = ["left", "right"] * 20
PARITY = [0, 0, 1, 1] * 10


def gaps(rsums: Sequence[float]) -> dict[str, float]:
    """The distance of the mean rSums of a setting's two values."""

    def gap(values: Sequence[object]) -> float:
        of = [[r for r, v in zip(rsums, values, strict=True) if v == one] for one in set(values)]
        return abs(sum(of[0]) / len(of[0]) - sum(of[1]) / len(of[1]))

    return {"parity": gap(PARITY), "side": gap(SIDES)}


def test_what_matters_comes_first_and_chance_seldom_gives_as_much() -> None:
    rsums = [200.0 + 30 * (side == "right") + 7 * n % 11 for n, side in enumerate(SIDES)]
    found = shuffle_test(gaps, rsums, seed=0)
    assert list(found) == ["side", "parity"]
    assert found["side"].share > 0.9
    assert sum(one.share for one in found.values()) == pytest.approx(1)
    assert found["side"].p == 1 / 200  # no shuffling gave as much
    assert found["parity"].p > 0.2
    assert shuffle_test(gaps, rsums, seed=0) == found


def test_shares_of_nothing_are_zero_and_always_equalled_by_chance() -> None:
    found = shuffle_test(gaps, [200.0] * 40, seed=0)
    assert {(one.share, one.p) for one in found.values()} == {(0.0, 1.0)}
