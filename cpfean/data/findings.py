"""What is wrong with a data folder, gathered so that all of it is told at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpfean.errors import DataError

LISTED = 20  # of each kind in each file; the others are only counted


class Finding(NamedTuple):
    """One fault.

    Attributes:
        kind: a short name, listed with its meaning in docs/data.md.
        where: the file, and the row, line or region in it.
        message: what was expected, what was found, what to do.
    """

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message} [{self.kind}]"


class Findings:
    """Collects faults; keeps the first `LISTED` of each kind in each file and counts the rest."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], list[Finding]] = {}
        self._counts: dict[tuple[str, str], int] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def add(self, kind: str, file: str, message: str, *, place: str = "") -> None:
        """Adds one fault in `file`, at `place` in it."""
        self.add_rows(kind, file, [0], lambda _: (place, message))

    def unreadable(self, file: str, error: OSError) -> None:
        """Adds a file that the system does not give."""
        self.add(
            "unreadable",
            file,
            f"cannot be read: {error.strerror or error}; check the disk and the rights",
        )

    def add_rows(
        self,
        kind: str,
        file: str,
        rows: Sequence[int] | np.ndarray,
        describe: Callable[[int], tuple[str, str]],
    ) -> None:
        """Adds one fault for each of `rows`; only those that are listed are described.

        Args:
            describe: from a row to the place in the file and the message.
        """
        if not len(rows):
            return
        key = (kind, file)
        kept = self._kept.setdefault(key, [])
        for row in rows[: LISTED - len(kept)]:
            place, message = describe(int(row))
            kept.append(Finding(kind, f"{file}, {place}" if place else file, message))
        self._counts[key] = self._counts.get(key, 0) + len(rows)

    def listed(self) -> list[Finding]:
        """The faults that were kept, each kind followed by how many more there are."""
        result = []
        for key, kept in self._kept.items():
            result += kept
            more = self._counts[key] - len(kept)
            if more:
                kind, file = key
                result.append(
                    Finding(kind, file, f"and {more:,} more of these, {self._counts[key]:,} in all")
                )
        return result

    def refuse(self, folder: Path | str) -> None:
        """Raises one DataError that lists everything, if there is anything."""
        if self:
            faults = "1 fault" if len(self) == 1 else f"{len(self):,} faults"
            lines = "\n".join(f"  {finding}" for finding in self.listed())
            raise DataError(f"{folder}: {faults} in the data.\n{lines}")
