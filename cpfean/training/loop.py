"""fit(): epochs, validation, early stop.

Runs in one process, or in each of several that share every batch; what they are started by is not
known here. It talks to a `Reporter` and to nothing else.
"""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import GlobalBatches, RetrievalDataset
from cpfean.data.prefetch import prefetched
from cpfean.data.split import data_fingerprint
from cpfean.errors import DivergedError
from cpfean.metrics.retrieval import RetrievalMetrics
from cpfean.processes import place, summed
from cpfean.progress import Progress
from cpfean.training.checkpoint import (
    Checkpoint,
    TrainingState,
    check_same_run,
    read_state,
    restore,
)
from cpfean.training.evaluation import evaluate
from cpfean.training.global_batch import GlobalBatchLoss, data_parallel
from cpfean.training.optimizer import build_optimizer, set_epoch
from cpfean.training.setup import open_experiment

logger = logging.getLogger(__name__)

# Steps between two looks at whether the loss is still finite: each look waits for the device.
_LOOK_EVERY = 20


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What one epoch came to.

    Attributes:
        epoch: number of this epoch, from 1.
        epochs: how many are planned.
        loss: mean over the pairs seen.
        learning_rate: of the new layers.
        seconds: for training and validation.
        pairs_per_second: training alone, all workers together.
        metrics: on dev.
        best_rsum, best_epoch: so far, this epoch included.
        stopped_early: no further epoch follows although more were planned.
        history: `as_dict()` of every epoch so far, this one last, those before a resume included.
    """

    epoch: int
    epochs: int
    loss: float
    learning_rate: float
    seconds: float
    pairs_per_second: float
    metrics: RetrievalMetrics
    best_rsum: float
    best_epoch: int
    stopped_early: bool
    history: tuple[dict[str, float], ...]

    def as_dict(self) -> dict[str, float]:
        """Flat numbers by name, for records."""
        return {
            "epoch": self.epoch,
            "train/loss": self.loss,
            "train/learning_rate": self.learning_rate,
            "train/seconds": self.seconds,
            "train/pairs_per_second": self.pairs_per_second,
            **self.metrics.as_dict("val/"),
            "best/val_rsum": self.best_rsum,
            "best/epoch": self.best_epoch,
        }


class Reporter(Protocol):
    """Where `fit` reports to, on every process, once an epoch."""

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        """Takes an epoch's report.

        Args:
            report: the same on every process but for the seconds.
            checkpoint: on the first process; to be saved before this returns. None elsewhere.
        """


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """A finished training."""

    history: tuple[dict[str, float], ...]
    best_rsum: float
    best_epoch: int


def fit(
    config: ExperimentConfig,
    *,
    data_folder: Path,
    cache_dir: Path,
    reporter: Reporter,
    device: torch.device,
    resume_from: Path | None = None,
) -> FitResult:
    """Trains the model of a configuration, by rSum on dev.

    Args:
        config: the experiment; its `batch_size` is that of all processes together.
        data_folder: a checked folder in the native format.
        cache_dir: for what can be made again; processes of one machine may share it.
        reporter: told of each epoch.
        device: of this process.
        resume_from: a checkpoint of the same experiment; training goes on as if never interrupted.

    Raises:
        ConfigError, DataError, CheckpointError: what was given does not fit together.
        DivergedError: the loss is not a finite number any more.
    """
    rank, _ = place()
    experiment = open_experiment(
        config, data_folder=data_folder, cache_dir=cache_dir, device=device
    )
    model = experiment.model
    step = GlobalBatchLoss(model, margin=config.loss.margin)
    optimizer = build_optimizer(model, config.optim)
    fingerprint = data_fingerprint(data_folder)
    state = TrainingState(
        epoch=0,
        best_rsum=-math.inf,
        best_epoch=0,
        stopped_early=False,
        history=(),
        config=config,
        data_fingerprint=fingerprint,
    )
    best_weights: dict[str, Tensor] = {}
    if resume_from is not None:
        state = read_state(resume_from)
        check_same_run(state, config, fingerprint)
        best_weights = restore(resume_from, model, optimizer)
        logger.info("resumed after epoch %d of %d", state.epoch, config.optim.epochs)
    parallel = data_parallel(step, device)

    for epoch in range(state.epoch + 1, config.optim.epochs + 1):
        if state.stopped_early:
            break
        started = time.monotonic()
        # What is drawn depends on the epoch alone, so there is no random state to carry over.
        torch.manual_seed((config.seed * 1_000_003 + epoch) * 1_009 + rank)
        set_epoch(optimizer, config.optim, epoch=epoch)
        loss, pairs_per_second = _train_epoch(
            parallel, experiment.train, optimizer, config, epoch=epoch, device=device
        )
        metrics = evaluate(
            model,
            experiment.dev,
            protocol=config.evaluation.protocol,
            batch_size=config.evaluation.batch_size,
            device=device,
            products=config.evaluation.products,
        )
        best_rsum, best_epoch = state.best_rsum, state.best_epoch
        if metrics.rsum > best_rsum:
            best_rsum, best_epoch = metrics.rsum, epoch
            if rank == 0:
                best_weights = {k: v.cpu().clone() for k, v in model.own_state().items()}
        patience = config.optim.patience
        stopped = patience > 0 and epoch - best_epoch >= patience and epoch < config.optim.epochs
        report = EpochReport(
            epoch=epoch,
            epochs=config.optim.epochs,
            loss=loss,
            learning_rate=optimizer.param_groups[0]["lr"],
            seconds=time.monotonic() - started,
            pairs_per_second=pairs_per_second,
            metrics=metrics,
            best_rsum=best_rsum,
            best_epoch=best_epoch,
            stopped_early=stopped,
            history=(),
        )
        report = replace(report, history=(*state.history, report.as_dict()))
        state = TrainingState(
            epoch=epoch,
            best_rsum=best_rsum,
            best_epoch=best_epoch,
            stopped_early=stopped,
            history=report.history,
            config=config,
            data_fingerprint=fingerprint,
        )
        checkpoint = Checkpoint(
            state=state,
            model=model,
            best_weights=best_weights,
            optimizer=optimizer,
            tokenizer=experiment.tokenizer,
        )
        reporter.report(report, checkpoint if rank == 0 else None)
    return FitResult(history=state.history, best_rsum=state.best_rsum, best_epoch=state.best_epoch)


def _train_epoch(
    step: nn.Module,
    dataset: RetrievalDataset,
    optimizer: torch.optim.Optimizer,
    config: ExperimentConfig,
    *,
    epoch: int,
    device: torch.device,
) -> tuple[float, float]:
    """One pass over the training pairs.

    Returns:
        The mean loss of a pair, and pairs per second of all processes.
    """
    rank, world_size = place()
    batches = GlobalBatches(
        len(dataset),
        config.optim.batch_size,
        seed=config.seed,
        epoch=epoch,
        rank=rank,
        world_size=world_size,
    )
    on_gpu = device.type == "cuda"
    warming_up = epoch <= config.loss.warmup_epochs
    mining: Literal["hardest", "all"] = "all" if warming_up else config.loss.mining
    in_batch = min(config.optim.batch_size, len(dataset))
    progress = Progress(f"epoch {epoch}/{config.optim.epochs}", total=len(batches))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    started = time.monotonic()
    step.train()
    total = torch.zeros((), dtype=torch.float64, device=device)
    num_pairs = 0
    with prefetched(map(dataset.training_batch, batches), pin=on_gpu) as gathered:
        for number, batch in enumerate(gathered, start=1):
            batch = batch.to(device, non_blocking=on_gpu)
            optimizer.zero_grad(set_to_none=True)
            with autocast(config.optim.precision, device):
                loss = step(batch, mining, in_batch)
            # Data-parallel gradients are averaged over processes; the shares are to be summed.
            (loss * world_size).backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
            optimizer.step()
            total += loss.detach()
            num_pairs += in_batch
            if number % _LOOK_EVERY == 0 or number == len(batches):
                mean = float(summed(total.clone())) / num_pairs
                _check_finite(mean, norm, step, optimizer, epoch=epoch, step_number=number)
                progress.step(number, f"loss {mean:.3f}")
    _warn_if_collapsed(mean, mining, config, epoch=epoch)
    return mean, num_pairs / (time.monotonic() - started)


def autocast(
    precision: Literal["auto", "fp32", "bf16"], device: torch.device
) -> torch.autocast | nullcontext[None]:
    """The types that a step computes in."""
    if precision == "bf16" or (precision == "auto" and device.type == "cuda"):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _check_finite(
    mean: float,
    norm: Tensor,
    step: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    epoch: int,
    step_number: int,
) -> None:
    if math.isfinite(mean):
        return
    bad = [name for name, tensor in step.named_parameters() if not tensor.isfinite().all()]
    rates = sorted({group["lr"] for group in optimizer.param_groups})
    raise DivergedError(
        f"the loss is {mean} at step {step_number} of epoch {epoch}: learning rates {rates}, "
        f"gradient norm {float(norm):.3g}, first weight that is not finite: "
        f"{bad[0] if bad else 'none'}. Try a lower optim.learning_rate."
    )


def _warn_if_collapsed(mean: float, mining: str, config: ExperimentConfig, *, epoch: int) -> None:
    # With equal scores every hinge is the margin: the hardest-negative loss is then 2 m a pair,
    # and stays there.
    if mining == "hardest" and abs(mean - 2 * config.loss.margin) < 0.01 * config.loss.margin:
        logger.warning(
            "epoch %d: the loss is stuck at twice the margin: all scores are alike, the training "
            "has collapsed. Try more loss.warmup_epochs or a lower optim.learning_rate.",
            epoch,
        )
