"""What a study would take, from a few steps that are timed here; nothing is started on Ray."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpfean.records.budget import OTHER, Prices, eta, free_bytes, size
from cpfean.threads import usable_cpus
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
    from cpfean.training.timing import time_training

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
    timing = time_training(
        base,
        data_folder=plans[0].data_folder,
        cache_dir=settings.cache_dir,
        device=device,
        workers=workers,
        threads=cpus,
    )
    estimates = [
        Estimate(
            trials=open_trials,
            epochs=base.optim.epochs,
            steps=timing.steps,
            step_seconds=timing.step_seconds,
            validation_seconds=timing.validation_seconds,
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
    if gpus and device.type != "cuda":
        notes.append("the step was timed without the GPU that a worker would have: an upper bound")
    return [
        f"trials          {sum(trials)} of {total} to run, {base.optim.epochs} epochs of "
        f"{timing.steps} steps each",
        f"workers         {workers} a trial, {each} each; {max(e.at_a_time for e in estimates)} "
        f"trial(s) at a time on {there}",
        f"timed           {timing.timed} steps at {timing.step_seconds:.3g} s, validation "
        f"{timing.validation_seconds:.3g} s an epoch, in this process on {device.type} with "
        f"{cpus} thread(s)",
        f"time            {eta(seconds)}, {seconds / 3600:.3g} hours; "
        f"{unit_hours:.3g} {unit}-hours",
        f"cost            {cost_line(prices, types, hours=seconds / 3600)}",
        f"disk            {disk}; {where}",
        f"not counted     {', '.join(left_out)}",
        f"note            {'; '.join(notes)}",
        "Nothing was started.",
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How long a plan takes, from a step that was timed.

    Attributes:
        trials: that are still to be run.
        epochs: of each.
        steps: of an epoch.
        step_seconds: timed.
        validation_seconds: of an epoch, timed on a part of the split.
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
