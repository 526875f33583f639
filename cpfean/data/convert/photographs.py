"""Photographs as people have them, with their captions and splits.

Here and not beside the detectors, because captions are read by `cpfean.data.convert.captions`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """A file with a picture, and what people wrote about it.

    Attributes:
        name: unique over all splits, as it goes to `S_ids.txt`.
        path: of the file, or its s3:// URL.
        captions: cleaned; empty only in a gallery.
    """

    name: str
    path: str
    captions: tuple[str, ...]


def find_photographs(
    root: str,
    *,
    captions: Path | None = None,
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> dict[str, list[Photograph]]:
    """The photographs of each split, by name within a split."""
    raise NotImplementedError
