"""Splits of photographs: drawn, or given and looked through for doubles."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np

from cpfean.data.findings import Findings
from cpfean.data.split import SPLITS
from cpfean.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Captions = dict[str, list[str]]  # of each photograph, by its path from the root


def check_shares(shares: tuple[float, float, float]) -> None:
    """Refuses shares that are none.

    Raises:
        ConfigError: one outside 0..1, or another sum than 1.
    """
    if not all(0 <= share <= 1 for share in shares) or not math.isclose(sum(shares), 1):
        raise ConfigError(
            f"shares of train, dev and test must be from 0 to 1 and sum to 1; got "
            f"{', '.join(map(str, shares))}."
        )


def draw_splits(
    captions: Captions,
    groups: Sequence[Sequence[str]],
    *,
    shares: tuple[float, float, float],
    seed: int,
    root: str,
) -> dict[str, Captions]:
    """Splits drawn from the photographs; doubles stay together.

    Args:
        captions: of all photographs.
        groups: their names, sorted, those of equal content together.
        root: what errors are about.

    Raises:
        DataError: too few photographs for every share to get one.
    """
    # A group begins with the first of its names, and comes where that does.
    order = np.random.default_rng(seed).permutation(len(groups))
    ends = np.cumsum(shares) * len(captions)
    ends[-1] = len(captions)
    splits: dict[str, Captions] = {split: {} for split in SPLITS}
    done = 0
    for position in order:
        group = groups[position]
        # By its middle: a large group goes where most of it belongs.
        middle = done + len(group) / 2
        split = SPLITS[int(np.searchsorted(ends, middle))]
        splits[split].update((name, captions[name]) for name in group)
        done += len(group)
    empty = [s for s, share in zip(SPLITS, shares, strict=True) if share and not splits[s]]
    if empty:
        raise DataError(
            f"{root}: {len(captions):,} photographs, {len(groups):,} of them different, are too "
            f"few for shares of {', '.join(map(str, shares))}: none for {' and '.join(empty)}; "
            "give other shares, or more photographs."
        )
    return splits


def find_leaks(
    splits: Mapping[str, Captions], groups: Sequence[Sequence[str]], findings: Findings
) -> None:
    """Finds photographs whose double is in another split."""
    split_of = {name: split for split, own in splits.items() for name in own}
    for group in groups:
        for name in group[1:]:
            if split_of[name] != split_of[group[0]]:
                findings.add(
                    "leak",
                    name,
                    f"expected photographs of {split_of[name]} that are in no other split, found "
                    f"the same bytes as {group[0]} of {split_of[group[0]]}; remove one",
                )


def tell_doubles(groups: Sequence[Sequence[str]]) -> None:
    """Says how many photographs are there more than once, if any."""
    more = [group for group in groups if len(group) > 1]
    if more:
        logger.info(
            "%d photographs are there more than once, %s for one; captions of one are no right "
            "answers to the other",
            len(more),
            " and ".join(more[0][:3]),
        )
