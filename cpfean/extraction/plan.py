"""What an extraction is about: photographs in fixed batches, and all that its result depends on.

Batch k holds the photographs k B to (k + 1) B of all of them, split by split and in the order of
their ids, also those that cannot be read. So the batches, on which the last bits of a feature may
depend, are the same whoever computes them, wherever it was stopped, and whatever is left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from cpfean.data.convert.photographs import Photograph
from cpfean.data.provenance import FORMAT
from cpfean.data.split import GALLERY, SPLITS
from cpfean.extraction.batches import Batch

ORDER = (*SPLITS, GALLERY)


@dataclass(frozen=True, kw_only=True)
class ExtractionPlan:
    """Photographs, and what makes regions of them.

    Attributes:
        photographs: by split, in the order of the ids; "gallery" where nothing has captions.
        sizes: bytes of each photograph's file, by path; -1 where that is not known.
        batch_size: photographs of a batch.
        extractor: what `provenance` of the extractor tells.
        device: "cpu" or "cuda": numbers differ.
    """

    photographs: Mapping[str, Sequence[Photograph]]
    sizes: Mapping[str, int]
    batch_size: int
    extractor: Mapping[str, Any]
    device: str

    @property
    def splits(self) -> list[str]:
        """Those that there are, in their order."""
        return [split for split in ORDER if self.photographs.get(split)]

    @property
    def num_regions(self) -> int:
        """The most of a photograph."""
        return int(self.extractor["settings"]["num_regions"])

    def all_photographs(self) -> list[tuple[str, Photograph]]:
        """Every photograph with its split, in the order of the batches."""
        return [(split, one) for split in self.splits for one in self.photographs[split]]

    def batches(self) -> list[Batch]:
        """All photographs, in order."""
        every = [one for _, one in self.all_photographs()]
        starts = range(0, len(every), self.batch_size)
        return [
            self._batch(number, every[start : start + self.batch_size])
            for number, start in enumerate(starts)
        ]

    def batches_with(self, paths: Set[str]) -> list[Batch]:
        """The batches that hold any of these photographs."""
        return [batch for batch in self.batches() if not paths.isdisjoint(batch.paths)]

    def settings(self) -> dict[str, Any]:
        """What has to agree between two attempts at the same folder, as JSON has it.

        Not the sizes of the files: a photograph that was mended has another one, and its batch is
        made again.
        """
        plain = {
            "format": FORMAT,
            **self.extractor,
            "device": self.device,
            "batch_size": self.batch_size,
            "found": {
                split: {
                    "photographs": len(self.photographs[split]),
                    "names": _digest(one.name for one in self.photographs[split]),
                    "captions": _digest("\n".join(p.captions) for p in self.photographs[split]),
                }
                for split in self.splits
            },
        }
        return json.loads(json.dumps(plain))  # tuples are lists there

    def files(self) -> str:
        """Changes with a photograph that was added, renamed, or replaced by one of another size."""
        return _digest(f"{one.name}\n{self.sizes[one.path]}" for _, one in self.all_photographs())

    def _batch(self, number: int, photographs: Sequence[Photograph]) -> Batch:
        content = _digest(f"{one.name}\n{self.sizes[one.path]}" for one in photographs)
        return Batch(
            number=number,
            paths=tuple(one.path for one in photographs),
            key=f"{number:06d}-{content[:12]}",
        )


def differences(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    names: tuple[str, str] = ("then", "now"),
    path: str = "",
) -> list[str]:
    """Each setting that is not the same, by its dotted path, with both values.

    Args:
        names: whose they are.
        path: before the names of the settings.
    """
    found = []
    for name in sorted(then.keys() | now.keys()):
        old, new = then.get(name), now.get(name)
        where = f"{path}{name}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, names=names, path=f"{where}.")
        elif old != new:
            found.append(f"{where}: {_shown(old)} {names[0]}, {_shown(new)} {names[1]}")
    return found


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", errors="surrogateescape")
        digest.update(f"{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
