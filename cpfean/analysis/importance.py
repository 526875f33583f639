"""How much each of several settings mattered, and how often chance alone would give as much."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SHUFFLES = 199  # the least p is one in 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """How much a setting mattered.

    Attributes:
        share: of the importance of all settings; they add up to 1, also where none matters.
        p: how often a setting that does not matter would come out as important.
    """

    share: float
    p: float


def shuffle_test(
    measure: Callable[[Sequence[float]], Mapping[str, float]],
    rsums: Sequence[float],
    *,
    seed: int,
) -> dict[str, Importance]:
    """Measures what mattered, and again with the rSums shuffled among the trials.

    Trials that a search has proposed by how earlier ones did are not exchangeable: p is a guide.

    Args:
        measure: the importance of each setting, 0 or more, given an rSum for each trial.
        seed: of the shuffling.

    Returns:
        By setting, the greatest first.
    """
    random = np.random.default_rng(seed)
    own = measure(rsums)
    shuffled = [measure(random.permutation(rsums).tolist()) for _ in range(_SHUFFLES)]
    whole = sum(own.values()) or 1.0
    found = {
        name: Importance(
            share=value / whole,
            p=(1 + sum(other[name] >= value for other in shuffled)) / (1 + _SHUFFLES),
        )
        for name, value in own.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].share))
