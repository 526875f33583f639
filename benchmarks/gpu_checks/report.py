"""A check or a figure, what all sections are given, and the sizes they work at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Check:
    """A line of the table.

    Attributes:
        section: that found it.
        what: was looked at.
        found: a number or a word.
        unit: of the number.
        bound: what had to hold, in words; "" for a figure.
        holds: whether it does; None for a figure, or where it was not run.
        note: whatever else is to be said.
    """

    section: str
    what: str
    found: float | str
    unit: str = ""
    bound: str = ""
    holds: bool | None = None
    note: str = ""

    @classmethod
    def at_most(
        cls, section: str, what: str, found: float, most: float, *, unit: str = "", note: str = ""
    ) -> Check:
        """A number that must not be larger; what is not a number is."""
        holds = found <= most
        return cls(
            section=section,
            what=what,
            found=found,
            unit=unit,
            bound=f"at most {most:g}",
            holds=holds,
            note=note,
        )

    @classmethod
    def left_out(cls, section: str, why: str) -> Check:
        """A section that was not run."""
        return cls(section=section, what="not run", found="", note=why)

    def as_row(self) -> dict[str, object]:
        """For the table."""
        held = {True: "holds", False: "DOES NOT HOLD", None: ""}[self.holds]
        return {
            "section": self.section,
            "what": self.what,
            "found": self.found,
            "unit": self.unit,
            "bound": self.bound,
            "": held,
            "note": self.note,
        }


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is.

    Attributes:
        product: a square matrix's side, for the ceilings.
        checked: images, captions and width of what is compared with float64.
        scored: images and captions of the timed scorings.
        dim: width of the joint space where time is measured.
        feature_dim: of a region.
        text_dim, text_layers: of the text encoder of a whole step.
        batches: pairs of a whole step.
        steps: of a run.
        evaluated: images of the timed evaluation, with five captions each.
    """

    product: int
    checked: tuple[int, int, int]
    scored: tuple[tuple[int, int], ...]
    dim: int
    feature_dim: int
    text_dim: int
    text_layers: int
    batches: tuple[int, ...]
    steps: int
    evaluated: int

    @classmethod
    def for_device(cls, device: str) -> Sizes:
        """Those of the full model on a card; what takes seconds on a processor.

        Args:
            device: "cpu" or "cuda".
        """
        if device == "cpu":
            return cls(
                product=512,
                checked=(7, 11, 64),
                scored=((20, 100), (40, 200)),
                dim=128,
                feature_dim=64,
                text_dim=64,
                text_layers=1,
                batches=(16,),
                steps=2,
                evaluated=20,
            )
        return cls(
            product=8192,
            checked=(48, 96, 1024),
            scored=((1000, 5000), (5000, 25000)),
            dim=1024,
            feature_dim=2048,
            text_dim=768,
            text_layers=12,
            batches=(128, 512),
            steps=10,
            evaluated=1000,
        )


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a section works with.

    Attributes:
        device: that is looked at.
        sizes: to work at.
        runs: of each timing.
        folder: for files; it is removed in the end.
        model, data: a trained model and its data; None if none was named.
    """

    device: torch.device
    sizes: Sizes
    runs: int
    folder: Path
    model: Path | None
    data: Path | None

    @property
    def on_card(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"
