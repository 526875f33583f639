"""The scorers by name: what `model.alignment.kind` can be.

The table is plain data, so that a configuration can be checked without torch. `scorer_class` of
`cpfean.model.scorers.scorer` loads the class that an entry names; docs/extending.md adds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A scorer, in the file of this package that has the name of its kind.

    Attributes:
        scorer: the class, a `Scorer`.
        fuses: whether it fuses words into regions, which `fusion` can switch off and `rounds`
            repeat.
    """

    scorer: str
    fuses: bool = False


SCORERS: Mapping[str, Entry] = {
    # CPFEAN's own: gates, prominent words.
    "prominent": Entry(scorer="ProminentAlignment", fuses=True),
    # SCAN: each word attends to the regions.
    "cross_attention": Entry(scorer="CrossAttention"),
    # CHAN: the best region of each word.
    "hard_coding": Entry(scorer="HardCoding"),
    # The same, a mean over the words.
    "hard_coding_mean": Entry(scorer="HardCodingMean"),
    # FILIP: the best region of each word and the best word of each region.
    "late_interaction": Entry(scorer="LateInteraction"),
}
