"""fit(): epochs, validation, early stop.

Runs in one process, or in each of several that share every batch; what they are started by is not
known here. It talks to a `Reporter` and to nothing else.
"""

from __future__ import annotations

import logging
import math
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cpfean.config import ExperimentConfig
from cpfean.data.dataset import GlobalBatches, RetrievalDataset
from cpfean.data.prefetch import prefetched
from cpfean.data.split import data_fingerprint
from cpfean.errors import DivergedError, NoMemoryError, StoppedError, message_of
from cpfean.metrics.retrieval import RetrievalMetrics
from cpfean.processes import place, summed
from cpfean.progress import Progress
from cpfean.threads import threads_chosen
from cpfean.training.checkpoint import (
    Checkpoint,
    TrainingState,
    Underway,
    check_same_run,
    read_state,
    restore_optimizer,
    restore_weights,
    taken,
)
from cpfean.training.evaluation import evaluate
from cpfean.training.global_batch import GlobalBatchLoss, data_parallel, find_gradients
from cpfean.training.optimizer import build_optimizer, set_epoch
from cpfean.training.precision import LossScale, autocast, chosen_precision, significand_bits
from cpfean.training.setup import open_experiment
from cpfean.training.sharding import put_together, whole, whole_on_first

logger = logging.getLogger(__name__)

# Between two looks at whether the loss is finite and whether to stop: each waits for the device.
_LOOK_STEPS = 20
_LOOK_SECONDS = 2.0


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
        workers: that shared the batches; at its end, if their number has changed.
        threads: that this process computed with, on processors; part of what makes runs equal.
        significand_bits: of the numbers that matrix products are made of: 24 in float32, 11 in
            float16, 8 in bfloat16; at its end, if the cards have changed.
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
    workers: int
    threads: int
    significand_bits: int
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
            "train/workers": self.workers,
            "train/threads": self.threads,
            "train/significand_bits": self.significand_bits,
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


class Notice(Protocol):
    """Word that the processes will have to stop soon, e.g. because their host is taken away."""

    def given(self) -> bool:
        """Whether there is such word; asked every few seconds, on every process equally often."""

    def save(self, checkpoint: Checkpoint | None) -> None:
        """Takes a checkpoint in the middle of an epoch.

        Args:
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
    notice: Notice | None = None,
) -> FitResult:
    """Trains the model of a configuration, by rSum on dev.

    Args:
        config: the experiment; its `batch_size` is that of all processes together.
        data_folder: a checked folder in the native format.
        cache_dir: for what can be made again; processes of one machine may share it.
        reporter: told of each epoch.
        device: of this process.
        resume_from: a checkpoint of the same experiment; training goes on as if never interrupted.
        notice: if it is given on any process, all of them stop before their next step.

    Raises:
        ConfigError, DataError, CheckpointError: what was given does not fit together.
        DivergedError: the loss is not a finite number any more.
        NoMemoryError: there is too little.
        StoppedError: notice was given; how far the training is has been saved.
    """
    with threads_chosen(config, workers=place()[1]) as threads:
        return _fit(
            config,
            data_folder=data_folder,
            cache_dir=cache_dir,
            reporter=reporter,
            device=device,
            resume_from=resume_from,
            notice=notice,
            threads=threads,
        )


def _fit(
    config: ExperimentConfig,
    *,
    data_folder: Path,
    cache_dir: Path,
    reporter: Reporter,
    device: torch.device,
    resume_from: Path | None,
    notice: Notice | None,
    threads: int,
) -> FitResult:
    rank, world_size = place()
    experiment = open_experiment(
        config, data_folder=data_folder, cache_dir=cache_dir, device=device
    )
    model = experiment.model
    step = GlobalBatchLoss(model, margin=config.loss.margin)
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
        best_weights = restore_weights(resume_from, model)
    parallel = data_parallel(step, device, sharding=config.optim.sharding)
    optimizer = build_optimizer(model, config.optim)
    if resume_from is not None:
        restore_optimizer(resume_from, optimizer)
        logger.info("resumed after %s; %d epochs in all", state.moment, config.optim.epochs)
        if device.type == "cpu":  # a GPU's results do not depend on it
            _warn_of_other_threads(state, threads)
    looks = _Looks(notice, device)
    precision = chosen_precision(config.optim.precision, device)
    scale = LossScale.to_go_on(precision, state.loss_scale)

    def taken_now() -> Checkpoint | None:
        # Every process has a part in it.
        checkpoint = taken(state, model, optimizer, experiment.tokenizer, best_weights=best_weights)
        return checkpoint if rank == 0 else None

    for epoch in range(state.epoch + 1, config.optim.epochs + 1):
        if state.stopped_early:
            break
        if looks.told_to_stop():
            raise StoppedError(f"told to stop after {state.moment}, which is saved.")
        set_epoch(optimizer, config.optim, epoch=epoch)
        with _memory_watched(config, device, epoch=epoch):
            underway, is_whole = _train_epoch(
                parallel,
                experiment.train,
                optimizer,
                config,
                epoch=epoch,
                device=device,
                begun=state.underway,
                looks=looks,
                scale=scale,
            )
            if not is_whole:
                assert notice is not None
                state = replace(state, underway=underway, loss_scale=copy(scale))
                notice.save(taken_now())
                raise StoppedError(
                    f"told to stop, saved at step {underway.steps} of epoch {epoch}."
                )
            started = time.monotonic()
            with put_together(parallel):
                metrics = evaluate(
                    model,
                    experiment.dev,
                    protocol=config.evaluation.protocol,
                    batch_size=config.evaluation.batch_size,
                    device=device,
                    products=config.evaluation.products,
                    precision=precision,
                )
        best_rsum, best_epoch = state.best_rsum, state.best_epoch
        if metrics.rsum > best_rsum:
            best_rsum, best_epoch = metrics.rsum, epoch
            whole_weights = whole_on_first(model.own_state())
            best_weights = {name: tensor.cpu().clone() for name, tensor in whole_weights.items()}
        patience = config.optim.patience
        stopped = patience > 0 and epoch - best_epoch >= patience and epoch < config.optim.epochs
        num_pairs = underway.steps * min(config.optim.batch_size, len(experiment.train))
        report = EpochReport(
            epoch=epoch,
            epochs=config.optim.epochs,
            loss=underway.loss_sum / num_pairs,
            learning_rate=optimizer.param_groups[0]["lr"],
            seconds=underway.seconds + time.monotonic() - started,
            pairs_per_second=num_pairs / underway.seconds,
            workers=world_size,
            threads=threads,
            significand_bits=significand_bits(precision),
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
            loss_scale=copy(scale),
        )
        reporter.report(report, taken_now())
    return FitResult(history=state.history, best_rsum=state.best_rsum, best_epoch=state.best_epoch)


def _warn_of_other_threads(state: TrainingState, threads: int) -> None:
    before = state.history[-1].get("train/threads", threads) if state.history else threads
    if before != threads:
        logger.warning(
            "the training goes on with %d threads, and has had %d so far: the result will be "
            "neither's. OMP_NUM_THREADS=%d keeps the number.",
            threads,
            before,
            before,
        )


class _Looks:
    """When the processes compare notes: loss so far, time taken, and whether any is to stop."""

    def __init__(self, notice: Notice | None, device: torch.device) -> None:
        self._notice = notice
        self._device = device
        # The first step tells how long a step takes.
        self._every = 1

    def due(self, steps: int) -> bool:
        """Whether it is time, so many steps after the last look."""
        return steps >= self._every

    def told_to_stop(self) -> bool:
        """Whether any process has been given notice."""
        if self._notice is None:
            return False
        given = torch.full((), float(self._notice.given()), device=self._device)
        return float(summed(given)) > 0

    def look(self, loss_sum: Tensor, *, seconds: float, steps: int) -> tuple[float, bool]:
        """The loss summed over all processes, and whether to stop; the same on every process.

        Args:
            loss_sum: this process's.
            seconds: that these steps took here.
            steps: so many.
        """
        is_given = self._notice is not None and self._notice.given()
        # Filled in on the device: a copy would be waited for, and so will be the sums.
        own = [loss_sum, *(loss_sum.new_full((), x) for x in (seconds, float(is_given)))]
        total, all_seconds, notices = summed(torch.stack(own)).tolist()
        per_step = all_seconds / (steps * place()[1])
        self._every = max(1, min(_LOOK_STEPS, int(_LOOK_SECONDS / max(per_step, 1e-9))))
        return total, notices > 0


def _train_epoch(
    step: nn.Module,
    dataset: RetrievalDataset,
    optimizer: torch.optim.Optimizer,
    config: ExperimentConfig,
    *,
    epoch: int,
    device: torch.device,
    begun: Underway,
    looks: _Looks,
    scale: LossScale,
) -> tuple[Underway, bool]:
    """One pass over the training pairs, or the rest of one.

    Returns:
        What was done of the epoch, and whether that is all of it.
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
    if rank == 0:
        total += begun.loss_sum
    seen = begun.steps
    rest = islice(batches, begun.steps, None)
    with prefetched(map(dataset.training_batch, rest), pin=on_gpu) as gathered:
        for number, batch in enumerate(gathered, start=begun.steps + 1):
            # What is drawn depends on the step alone, so there is no random state to carry over.
            torch.manual_seed(_seed_of(config.seed, epoch, number, rank))
            batch = batch.to(device, non_blocking=on_gpu)
            optimizer.zero_grad(set_to_none=True)
            with autocast(scale.precision, device):
                loss = step(batch, mining, in_batch)
            # A scaled gradient is clipped at the scaled norm.
            largest = config.optim.clip_norm * scale.value
            norm = find_gradients(step, loss * scale.value, parameters, clip_norm=largest)
            norm = scale.step(optimizer, parameters, norm)
            total += loss.detach()
            is_last = number == len(batches)
            if is_last or looks.due(number - seen):
                seen = number
                seconds = time.monotonic() - started
                loss_sum, stop = looks.look(total, seconds=seconds, steps=number - begun.steps)
                mean = loss_sum / (number * in_batch)
                _check_finite(mean, norm, step, optimizer, epoch=epoch, step_number=number)
                progress.step(number, f"loss {mean:.3f}")
                # An epoch whose last step is done is ended first: that saves as well.
                if stop or is_last:
                    break
    underway = Underway(
        steps=number, loss_sum=loss_sum, seconds=begun.seconds + time.monotonic() - started
    )
    if is_last:
        _warn_if_collapsed(mean, mining, config, epoch=epoch)
    return underway, is_last


def _seed_of(seed: int, epoch: int, step: int, rank: int) -> int:
    sequence = np.random.SeedSequence((seed, epoch, step, rank))
    return int(sequence.generate_state(1, np.uint64)[0])


@contextmanager
def _memory_watched(
    config: ExperimentConfig, device: torch.device, *, epoch: int
) -> Iterator[None]:
    """Tells of a lack of memory what was asked for, and what helps.

    Raises:
        NoMemoryError: the code inside ran out of it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (
            isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "can't allocate memory" in str(error)
        ):
            raise
        on_gpu = device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_of_process()
        raise NoMemoryError(
            f"out of memory in epoch {epoch}, with optim.batch_size = {config.optim.batch_size} "
            f"over {place()[1]} process(es), at a peak of {peak / 2**30:.2f} GiB of "
            f"{'GPU' if on_gpu else 'main'} memory in this one. Lower optim.batch_size or "
            "evaluation.batch_size, or take more --workers for a trial: each has a smaller share, "
            f"and fewer trials run at a time. ({message_of(error)})"
        ) from error


def _peak_of_process() -> int:
    """The most bytes of main memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would tell the peak of the parent, if that was higher when this one was started.
        text = status.read_text(encoding="utf-8", errors="replace")  # it has the process's name
        kilobytes = re.search(r"^VmHWM:\s+(\d+) kB$", text, flags=re.MULTILINE)
        if kilobytes:
            return int(kilobytes[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS, where this is


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
    bad = [name for name, tensor in step.named_parameters() if not whole(tensor).isfinite().all()]
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
