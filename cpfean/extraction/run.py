"""One extraction from the first look at the photographs to the finished data folder.

Whoever runs it again with the same settings goes on with what is missing: see `work_folder`.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpfean.data.convert.photographs import Photograph
from cpfean.errors import DataError
from cpfean.extraction.assembly import assemble, finished, refuse_strange, unusable
from cpfean.extraction.batches import Batch, Described
from cpfean.extraction.check import look_at, refuse
from cpfean.extraction.in_process import Made
from cpfean.extraction.plan import ExtractionPlan
from cpfean.extraction.work_folder import WorkFolder, claimed
from cpfean.files import is_there
from cpfean.progress import Progress

logger = logging.getLogger(__name__)

# Gives every batch, packed, in whatever order: in this process, or on a cluster.
Runner = Callable[[Sequence[Batch]], Iterable[Made]]

_SMALL = 4 * 4 + 4 + 4  # bytes of a region besides its features: box, label, confidence


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an extraction came to.

    Attributes:
        provenance: of the data folder, as its provenance.json has it.
        feature_dim: width of a region vector.
        made: photographs that were looked at this time; 0 if nothing was missing.
        seconds: that this took, with what it takes to start workers.
        was_finished: the folder was there before.
    """

    provenance: Mapping[str, Any]
    feature_dim: int
    made: int
    seconds: float
    was_finished: bool


def extract(
    photographs: Mapping[str, Sequence[Photograph]],
    target: Path,
    *,
    extractor: Described,
    run: Runner,
    batch_size: int,
    device: str,
    skip_broken: bool = False,
) -> Extraction:
    """Makes a data folder in the native format of photographs, or goes on making it.

    Args:
        photographs: by split, as `cpfean.data.convert.photographs.find_photographs` gives them.
        target: the data folder; unless it is finished already, nothing may be there. What is done
            is kept beside it, in TARGET.unfinished, until all is.
        extractor: tells the names of labels, the width of features and what it is made of.
        run: has the batches worked on by extractors that are like this one.
        batch_size: photographs that are looked at together.
        device: "cpu" or "cuda", where `run` computes.
        skip_broken: leave out photographs that cannot be read, with their captions.

    Raises:
        DataError: photographs that cannot be read, all of them by name; a folder that was begun
            with other settings, that another process is making, or that somebody else has made;
            no room on the disk.
        CpfeanError: what `run` raises.
    """
    refuse_strange(target)
    looks = look_at([one for each in photographs.values() for one in each])
    plan = ExtractionPlan(
        photographs=photographs,
        sizes=looks.sizes,
        batch_size=batch_size,
        extractor=extractor.provenance(),
        device=device,
    )

    def result(provenance: Mapping[str, Any], **made: Any) -> Extraction:
        return Extraction(provenance=provenance, feature_dim=extractor.feature_dim, **made)

    provenance = finished(plan, target)
    if provenance is not None and not is_there(WorkFolder(target).folder):
        return result(provenance, made=0, seconds=0.0, was_finished=True)
    with claimed(target) as work:
        # Somebody else may just have finished it; or was killed when only this was left to do.
        if (provenance := finished(plan, target)) is not None:
            work.discard()
            return result(provenance, made=0, seconds=0.0, was_finished=True)
        if not skip_broken:
            refuse(list(looks.faults.items()), of=len(looks.sizes), done=False)
        work.agree(plan.settings())
        start = time.monotonic()
        made = _make_missing(plan, work, run, feature_dim=extractor.feature_dim)
        seconds = time.monotonic() - start
        skipped = unusable(plan, work)
        if skipped and not skip_broken:
            # They are looked at anew: what was mended may be as large as before.
            work.forget(plan.batches_with({one.photograph.path for one in skipped}))
            faults = [(one.photograph.path, one.reason) for one in skipped]
            refuse(faults, of=len(looks.sizes), done=True)
        for one in skipped:
            logger.warning("left out: %s: %s", one.photograph.path, one.reason)
        provenance = assemble(plan, work, label_names=extractor.label_names)
        work.discard()
    return result(provenance, made=made, seconds=seconds, was_finished=False)


def _make_missing(plan: ExtractionPlan, work: WorkFolder, run: Runner, *, feature_dim: int) -> int:
    """Makes the batches that are not there yet; returns of how many photographs."""
    batches = plan.batches()
    missing = [batch for batch in batches if not work.has(batch)]
    photographs = sum(len(batch.paths) for batch in missing)
    there = len(batches) - len(missing)
    if there:
        logger.info(
            "%d of %d batches are there already, of %d photographs; %d photographs are left",
            there,
            len(batches),
            len(plan.all_photographs()) - photographs,
            photographs,
        )
    if not missing:
        return 0
    # In the batches, and once more in the data folder that is put together of them.
    row = plan.num_regions * (feature_dim * 2 + _SMALL)
    _check_room(work.folder, row * (photographs + len(plan.all_photographs())))
    logger.info("extracting the regions of %d photographs", photographs)
    progress = None
    done = 0
    for batch, content in run(missing):
        # Behind what it takes to start workers, which tells nothing about the rest.
        progress = progress or Progress("photographs", total=photographs)
        work.store(batch, content)
        done += len(batch.paths)
        progress.step(done)
    return photographs


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder}: needs up to {needed / 1e9:,.1f} GB, and its disk has {free / 1e9:,.1f} GB "
            "left; make room, or name an OUT on another disk."
        )
