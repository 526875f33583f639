"""What a study would take; nothing is started on Ray.

From a few steps that are timed here. For a card that is not here: from what was measured on such
a card or, where nothing was, from counts of a step's operations: an estimate, and called so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cpfean.config import ExperimentConfig
from cpfean.records.budget import OTHER, Prices, eta, free_bytes, size
from cpfean.records.cards import Card, Measured
from cpfean.threads import usable_cpus
from experiments.baselines import BASELINES
from orchestration.cluster.capacity import allocate, this_machine
from orchestration.settings import Settings
from orchestration.study.plan import (
    StudyPlan,
    check_room_for_checkpoints,
    disk_of,
    num_open,
    storage_of,
)


def print_dry_run(plans: Sequence[StudyPlan], where: Settings, *, in_process: bool = False) -> int:
    """Says what plans would take; fails as they would, where that can be known.

    Raises:
        ServiceError: no cluster, or no room for the checkpoints.
    """
    prices = plans[0].budget.prices
    assert prices is not None
    print("\n".join(dry_run(plans, where, in_process=in_process, prices=prices)), flush=True)
    for plan in plans:
        check_room_for_checkpoints(plan, where)
    return 0


def dry_run(
    plans: Sequence[StudyPlan], settings: Settings, *, in_process: bool, prices: Prices
) -> list[str]:
    """Lines for people: what would run, for how long, at what cost, on how much disk.

    Args:
        plans: one after the other; they share base, data and workers.
        in_process: without Ray.
        prices: of the nodes.

    Raises:
        ServiceError: no cluster at the address, or no room for one trial.
        ConfigError, DataError: what is asked for does not fit the data.
    """
    from cpfean.training.setup import default_device

    base, workers = plans[0].base, max(1, plans[0].workers)
    device = default_device()
    trials = [num_open(plan, settings) for plan in plans]
    total = sum(plan.trials for plan in plans)
    if in_process:
        cpus, gpus = usable_cpus(), device.type == "cuda"
        at_a_time, types, there = 1, [OTHER], "this machine, in one process"
    else:
        if settings.address is None:
            cluster, types, there = this_machine(), [OTHER], "this machine"
        else:
            from orchestration.cluster.connection import look_at

            cluster, types = look_at(settings)
            there = f"the cluster at {settings.address}"
        resources = allocate(cluster, workers=workers, trials=max(1, *trials))
        cpus, gpus, at_a_time = resources.cpus, resources.use_gpu, resources.concurrent
        there += f" ({len(cluster.nodes)} node(s), {cluster.cpus} CPUs, {cluster.gpus} GPUs)"
    pace = pace_of(
        base,
        plans[0].data_folder,
        prices=prices,
        types=types if gpus else (),
        cache_dir=settings.cache_dir,
        workers=workers,
        threads=cpus,
    )
    estimates = [
        Estimate(
            trials=open_trials,
            epochs=base.optim.epochs,
            steps=pace.steps,
            step_seconds=pace.step_seconds,
            validation_seconds=pace.validation_seconds,
            workers=workers,
            units=1 if gpus else cpus,
            at_a_time=min(at_a_time, max(1, open_trials)),
        )
        for open_trials in trials
    ]
    seconds = sum(estimate.seconds for estimate in estimates)
    unit_hours = sum(estimate.unit_hours for estimate in estimates)
    unit = "GPU" if gpus else "CPU"
    each = "1 GPU" if gpus else f"{cpus} CPU(s)"
    disk = replace(disk_of(plans[0], settings, at_a_time=at_a_time), trials=sum(trials))
    folder = storage_of(plans[0], settings)
    where = settings.storage if folder is None else f"{size(free_bytes(folder))} free at {folder}"
    left_out = ["starting Ray and workers"] if not in_process else []
    left_out += ["what workers exchange"] if workers > 1 else []
    left_out += ["trials on this machine at the same time"] if at_a_time > 1 else []
    left_out += ["nodes that join later"] if settings.address and not in_process else []
    left_out += ["saving checkpoints", "tests", "retries"]
    if base.model.text.encoder != "scratch" and not base.model.text.trainable:
        left_out.append("the frozen text encoder's one pass over all captions")
    notes = ["every trial is taken to be as long as the configuration itself and not stopped early"]
    if gpus and pace.is_of_a_processor:
        notes.append(
            "the step was timed without the GPU that a worker would have: an upper bound; for "
            f"less, say in {prices.file} which card the nodes have"
        )
    return [
        f"trials          {sum(trials)} of {total} to run, {base.optim.epochs} epochs of "
        f"{pace.steps} steps each",
        f"workers         {workers} a trial, {each} each; {max(e.at_a_time for e in estimates)} "
        f"trial(s) at a time on {there}",
        pace.line,
        f"time            {eta(seconds)}, {seconds / 3600:.3g} hours; "
        f"{unit_hours:.3g} {unit}-hours ({pace.line.split()[0]})",
        f"cost            {cost_line(prices, types, hours=seconds / 3600)}",
        f"disk            {disk}; {where}",
        f"not counted     {', '.join(left_out)}",
        f"note            {'; '.join(notes)}",
        "Nothing was started.",
    ]


# Settings that change what is learned and not how long a step takes.
_SAME_STEP = {
    "seed",
    "data.path",
    "data.train_images",
    "loss.margin",
    "loss.warmup_epochs",
    "optim.clip_norm",
    "optim.decay_epoch",
    "optim.decay_factor",
    "optim.epochs",
    "optim.learning_rate",
    "optim.patience",
    "optim.text_learning_rate",
    "optim.weight_decay",
}


def same_steps(config: ExperimentConfig) -> list[str]:
    """The named configurations whose steps are as long as those of this one."""
    flat = config.flat()
    return [
        name
        for name, named in BASELINES.items()
        if all(path in _SAME_STEP or flat[path] == value for path, value in named.flat().items())
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How long a trial's parts take, and where that is from.

    Attributes:
        steps: of an epoch.
        step_seconds: of one.
        validation_seconds: of an epoch.
        line: the same for people; it begins with "timed", "measured" or "estimate".
        is_of_a_processor: timed on one.
    """

    steps: int
    step_seconds: float
    validation_seconds: float
    line: str
    is_of_a_processor: bool = False


def pace_of(
    base: ExperimentConfig,
    data_folder: Path,
    *,
    prices: Prices,
    types: Sequence[str],
    cache_dir: Path,
    workers: int,
    threads: int,
) -> Pace:
    """Timed where the workers' card is, which is not always here: the head of a cluster has none.

    Args:
        base: what a trial trains.
        data_folder: a checked folder in the native format.
        prices: with the cards that nodes have, and what was measured on them.
        types: of the nodes, if workers take their GPUs.
        cache_dir: for what can be made again.
        workers: of a trial.
        threads: of each.

    Raises:
        ConfigError, DataError: what is asked for does not fit the data.
    """
    from cpfean.training.setup import default_device

    card = prices.cards.slowest(types)
    if card is None or default_device().type == "cuda":
        return _timed(base, data_folder, cache_dir, workers=workers, threads=threads)
    known = prices.cards.newest(card.name, same_steps(base), workers=workers)
    if known is not None:
        return _measured(base, data_folder, known)
    return _counted(base, data_folder, cache_dir, workers=workers, card=card)


def _timed(base: ExperimentConfig, data: Path, cache: Path, *, workers: int, threads: int) -> Pace:
    """Of this machine."""
    from cpfean.training.setup import default_device
    from cpfean.training.timing import time_training

    device = default_device()
    timing = time_training(
        base, data_folder=data, cache_dir=cache, device=device, workers=workers, threads=threads
    )
    return Pace(
        steps=timing.steps,
        step_seconds=timing.step_seconds,
        validation_seconds=timing.validation_seconds,
        line=f"timed           {timing.timed} steps at {timing.step_seconds:.3g} s, validation "
        f"{timing.validation_seconds:.3g} s an epoch, in this process on {device.type} with "
        f"{timing.threads} thread(s)",
        is_of_a_processor=device.type != "cuda",
    )


def _measured(base: ExperimentConfig, data: Path, known: Measured) -> Pace:
    """Of a card on which such steps were timed once."""
    from cpfean.training.timing import steps_of

    rate = base.optim.batch_size / known.step_seconds
    return Pace(
        steps=steps_of(base, data),
        step_seconds=known.step_seconds,
        validation_seconds=known.validation_seconds,
        line=f"measured        {known.step_seconds:.3g} s a step ({rate:.0f} images a second), "
        f"validation {known.validation_seconds:.3g} s an epoch, with --config "
        f"{known.configuration} on {known.card}, {known.date}, commit {known.commit}: "
        f"{known.source}",
    )


def _counted(base: ExperimentConfig, data: Path, cache: Path, *, workers: int, card: Card) -> Pace:
    """Of a card on which nobody has timed such steps: an estimate."""
    from cpfean.training.counting import OF_MEMORY, OF_PRODUCTS, Rates
    from cpfean.training.precision import precision_of
    from cpfean.training.timing import count_training

    precision = precision_of(base.optim.precision, card.capability)
    memory = card.gb_per_second * 1e9
    in_float32 = Rates(products=card.tflops_32 * 1e12, memory=memory)
    in_16_bits = Rates(products=card.tflops_16 * 1e12, memory=memory)
    found = count_training(
        base,
        data_folder=data,
        cache_dir=cache,
        workers=workers,
        in_step=in_float32 if precision == "fp32" else in_16_bits,
        in_validation=in_float32 if precision == "fp32" else in_16_bits,
    )
    return Pace(
        steps=found.steps,
        step_seconds=found.step_seconds,
        validation_seconds=found.validation_seconds,
        line=f"estimate        {found.step_seconds:.3g} s a step, validation "
        f"{found.validation_seconds:.3g} s an epoch, on {card.name} in {precision}: from counts, "
        f"{found.flops / 1e12:.3g} TFLOP and {found.bytes / 1e9:.3g} GB a step at "
        f"{OF_PRODUCTS:.0%} and {OF_MEMORY:.0%} of the maker's rates, without the time to launch "
        "kernels; nothing was measured on this card",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How long a plan takes, from the length of a step.

    Attributes:
        trials: that are still to be run.
        epochs: of each.
        steps: of an epoch.
        step_seconds: of one.
        validation_seconds: of an epoch.
        workers: of a trial.
        units: GPUs, or CPUs where there is none, of a worker.
        at_a_time: trials.
    """

    trials: int
    epochs: int
    steps: int
    step_seconds: float
    validation_seconds: float
    workers: int
    units: int
    at_a_time: int

    @property
    def trial_seconds(self) -> float:
        """Of one trial that is not stopped early."""
        return self.epochs * (self.steps * self.step_seconds + self.validation_seconds)

    @property
    def seconds(self) -> float:
        """By the clock, with as many trials at a time as there is room for."""
        return math.ceil(self.trials / self.at_a_time) * self.trial_seconds

    @property
    def unit_hours(self) -> float:
        """GPU-hours, or CPU-hours, of all trials."""
        return self.trials * self.trial_seconds * self.workers * self.units / 3600


def cost_line(prices: Prices, types: Sequence[str], *, hours: float) -> str:
    """What nodes of these types cost for some hours."""
    unknown = prices.unknown(types)
    if len(unknown) == len(set(types)):
        return f"unknown: {prices.file} has no price of {', '.join(map(repr, unknown))} ([nodes])"
    held = ", ".join(f"{count} x {name}" for name, count in sorted(Counter(types).items()))
    paid, at_most = prices.hourly(types), prices.hourly(types, on_demand=True)
    line = f"${hours * paid:.2f} for {held} at ${paid:.2f} an hour"
    if at_most > paid:
        line += f"; ${hours * at_most:.2f} if all were on demand"
    return line + (f"; without {', '.join(map(repr, unknown))}, no price" if unknown else "")
