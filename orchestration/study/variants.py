"""Variants of the base configuration, as plain data: ablations and methods of the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cpfean.config import Plain
from orchestration.proposals.search_space import Choice, Range


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """What makes a model differ from the base configuration, by the name that tables show."""

    name: str
    overrides: Mapping[str, Plain]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ablation(Variant):
    """One change to the full model, and the question it answers."""

    question: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Method(Variant):
    """A way to score image and caption, as a variant of the full model.

    Attributes:
        source: who published it.
        knobs: its own main settings, tuned beside those that all methods have in common.
    """

    source: str
    knobs: Mapping[str, Choice | Range] = field(default_factory=dict)
