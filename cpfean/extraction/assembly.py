"""Batches that are done, put together as a data folder that says what it was made of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cpfean.data.convert.captions import Captioned
from cpfean.data.convert.native import NativeWriter, Regions
from cpfean.data.convert.photographs import Photograph
from cpfean.data.provenance import PROVENANCE, read_provenance
from cpfean.errors import DataError
from cpfean.extraction.batches import Found
from cpfean.extraction.plan import ExtractionPlan, differences
from cpfean.extraction.work_folder import WorkFolder, no_room
from cpfean.files import is_there
from cpfean.photographs.extractor import PhotographRegions
from cpfean.progress import Progress


class Skipped(NamedTuple):
    """A photograph that is left out with its captions."""

    split: str
    photograph: Photograph
    reason: str


def assemble(
    plan: ExtractionPlan,
    work: WorkFolder,
    *,
    label_names: Sequence[str] | None,
) -> dict[str, Any]:
    """Makes the data folder of batches that are all done, checks it, and gives it its name.

    The rows of a split are in the order of its ids. Photographs that cannot be used are left out.

    Returns:
        The provenance, as it is written.

    Raises:
        DataError: a batch that is damaged; no photograph left in a split; what the checks of the
            folder find; a disk that is full.
    """
    skipped = unusable(plan, work)
    gone = {(one.split, one.photograph.path) for one in skipped}
    kept = {
        split: [one for one in plan.photographs[split] if (split, one.path) not in gone]
        for split in plan.splits
    }
    for split, photographs in kept.items():
        if not photographs:
            raise DataError(f"{split}: none of its photographs can be used, so it would be empty.")
    provenance = {
        **plan.settings(),
        "files": plan.files(),
        "photographs": {split: len(photographs) for split, photographs in kept.items()},
        "captions": {split: sum(len(p.captions) for p in kept[split]) for split in kept},
        "skipped": [
            {"split": one.split, "name": one.photograph.name, "reason": one.reason}
            for one in skipped
        ],
    }
    images = {
        split: Captioned(
            names=[one.name for one in photographs],
            captions=[list(one.captions) for one in photographs],
        )
        for split, photographs in kept.items()
    }
    total = len(plan.all_photographs())
    usable = (one for _, _, one in _found(plan, work) if isinstance(one, PhotographRegions))
    first = next(usable)  # all of them are alike
    progress = Progress("putting the data folder together", total=total)
    rows = {split: itertools.count() for split in kept}
    with NativeWriter(
        work.assembled,
        images,
        num_regions=plan.num_regions,
        feature_dim=first.features.shape[1],
        half=True,
        boxes=True,
        vocabulary=None if label_names is None else list(label_names),
        scores=first.scores is not None,
        provenance=provenance,
    ) as writer:
        for done, (split, _, found) in enumerate(_found(plan, work), 1):
            if isinstance(found, PhotographRegions):
                regions = Regions(
                    features=found.features,
                    boxes=found.boxes,
                    size=found.size,
                    labels=found.labels,
                    scores=found.scores,
                    ordered=True,  # by the extractor
                )
                writer.write(split, next(rows[split]), regions)
            progress.step(done)
        writer.finish()
    try:
        work.assembled.rename(work.target)
    except OSError as error:
        raise no_room(work.target, error) from error
    return provenance


def unusable(plan: ExtractionPlan, work: WorkFolder) -> list[Skipped]:
    """Photographs of batches that are done which cannot be read."""
    photographs = iter(plan.all_photographs())
    return [
        Skipped(split, photograph, reason)
        for batch in plan.batches()
        for reason, (split, photograph) in zip(work.reasons(batch), photographs, strict=False)
        if reason
    ]


def finished(plan: ExtractionPlan, target: Path) -> dict[str, Any] | None:
    """The provenance of the data folder if it is there, whole and of this plan; None if not there.

    Raises:
        DataError: what is there is something else; says what differs.
    """
    if not is_there(target):
        return None
    refuse_strange(target)
    provenance = read_provenance(target)
    assert provenance is not None
    expected = plan.settings() | {"files": plan.files()}
    found = differences({name: provenance.get(name) for name in expected}, expected)
    if found:
        raise DataError(
            f"{target}: exists already, and was made of other photographs or settings:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nName another OUT, or remove the folder."
        )
    return provenance


def refuse_strange(target: Path) -> None:
    """Raises DataError if what has the name of the data folder was not made by an extraction."""
    if is_there(target) and not is_there(target / PROVENANCE):
        raise DataError(
            f"{target}: exists already, and is not of an extraction (it has no {PROVENANCE}); "
            "name another OUT."
        )


def _found(plan: ExtractionPlan, work: WorkFolder) -> Iterator[tuple[str, Photograph, Found]]:
    """Every photograph with its split and what is known of it, batch by batch."""
    photographs = iter(plan.all_photographs())
    for batch in plan.batches():
        for found in work.load(batch):
            split, photograph = next(photographs)
            yield split, photograph, found
