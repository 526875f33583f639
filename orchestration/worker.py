"""What each Ray Train worker runs: one share of one training.

Ray has initialised torch.distributed before it calls us; `fit` finds it and makes one batch of all
workers' shares.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpfean.config import ExperimentConfig

if TYPE_CHECKING:
    from cpfean.training.checkpoint import Checkpoint
    from cpfean.training.loop import EpochReport


def metrics_of(report: EpochReport) -> dict[str, Any]:
    """What a driver is told of an epoch.

    Beside the epoch's own numbers, those of all epochs before it, so that a driver that was away
    misses nothing, and whether the training has come to its own end.
    """
    history = [dict(row) for row in report.history]
    ended = report.stopped_early or report.epoch >= report.epochs
    return report.as_dict() | {"history": history, "ended": ended}


def train_worker(job: dict[str, Any]) -> None:
    """Trains; called by Ray Train in every worker.

    Args:
        job: "config" as plain data, "cache_dir" on this node, and "cpus" for this worker.
    """
    import torch
    from ray.train import get_checkpoint
    from ray.train.torch import get_device

    from cpfean.data.sources import resolve_data
    from cpfean.training.checkpoint import newest_valid
    from cpfean.training.loop import fit

    torch.set_num_threads(job["cpus"])
    config = ExperimentConfig.from_dict(job["config"])
    cache_dir = Path(job["cache_dir"])
    data_folder = resolve_data(config.data, cache_dir=cache_dir)
    with ExitStack() as stack:
        resume_from = None
        checkpoint = get_checkpoint()
        if checkpoint is not None:
            newest = Path(stack.enter_context(checkpoint.as_directory()))
            # On storage that is a folder the one before it is still there, should this be damaged.
            older = (
                sorted(newest.parent.glob("epoch-*"), reverse=True) if _is_local(checkpoint) else []
            )
            resume_from = newest_valid([newest, *(path for path in older if path != newest)])
        fit(
            config,
            data_folder=data_folder,
            cache_dir=cache_dir,
            reporter=RayReporter(),
            resume_from=resume_from,
            device=get_device(),
        )


class RayReporter:
    """Hands each epoch to Ray Train, in every worker; the first one brings the checkpoint."""

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        from ray import train

        metrics = metrics_of(report) | _placement()
        with tempfile.TemporaryDirectory(prefix="cpfean-") as folder:
            saved = None
            if checkpoint is not None:
                checkpoint.save(Path(folder))
                saved = train.Checkpoint.from_directory(folder)
            name = f"epoch-{report.epoch:04d}"
            train.report(metrics, checkpoint=saved, checkpoint_dir_name=name)


def _placement() -> dict[str, str]:
    """The placement group of the workers: the driver frees it should nobody else do so."""
    from ray.util import get_current_placement_group

    group = get_current_placement_group()
    return {} if group is None else {"placement_group": group.id.hex()}


def _is_local(checkpoint: Any) -> bool:
    return checkpoint.filesystem.type_name == "local" and os.path.isdir(checkpoint.path)
