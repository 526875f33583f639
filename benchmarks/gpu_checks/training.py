"""Training and evaluation: the same losses as on a processor, and where the time of a step goes."""

from __future__ import annotations

import warnings

import torch
from full_step import FullStep
from measure import in_turns, peak_memory
from random_data import as_dataset, write_split
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cpfean.config import ExperimentConfig
from cpfean.data.batch import Batch
from cpfean.training.checkpoint import Checkpoint
from cpfean.training.evaluation import evaluate
from cpfean.training.loop import EpochReport, fit
from cpfean.training.precision import autocast, chosen_precision
from cpfean.training.setup import build_model
from gpu_checks.made_up import make_up
from gpu_checks.report import Check, Given

# The default and six of the registry's variants that compute something else.
_VARIANTS: dict[str, dict[str, object]] = {
    "the default": {},
    "no fusion": {"model.alignment.fusion": False, "model.alignment.gate": "off"},
    "hard gate": {"model.alignment.gate": "hard"},
    "two rounds": {"model.alignment.rounds": 2},
    "prominent words weigh more": {"model.alignment.prominence": True},
    "dense regions": {"model.regions.graph": "dense"},
    "cross attention": {"model.alignment.kind": "cross_attention"},
}
# Of an epoch's loss, after some dozens of steps: what float32 in another order adds up to.
_LOSS = 5e-3
# What waits for the device: the loss, read once in a while, is the one that has to.
_SYNCS = 2


class _Silent:
    """Keeps nothing."""

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        """Drops an epoch's report."""


def losses(given: Given) -> list[Check]:
    """The last epoch's loss of `fit()`, here and on a processor, without dropout."""
    made_up = make_up(given.folder)
    checks = []
    for name, overrides in _VARIANTS.items():
        config = made_up.config.with_overrides(overrides)
        on_processor, here = (
            fit(
                config,
                data_folder=made_up.data,
                cache_dir=given.folder / "cache",
                reporter=_Silent(),
                device=device,
            ).history[-1]["train/loss"]
            for device in (torch.device("cpu"), given.device)
        )
        difference = abs(here - on_processor) / abs(on_processor)
        checks.append(
            Check.at_most("losses", name, difference, _LOSS, note=f"loss {here:.5f}, relative")
        )
    return checks


def _step(given: Given, *, pairs: int) -> FullStep:
    sizes = given.sizes
    return FullStep(
        given.folder / f"pairs-{pairs}",
        given.device,
        pairs=pairs,
        dim=sizes.dim,
        feature_dim=sizes.feature_dim,
        text_dim=sizes.text_dim,
        text_layers=sizes.text_layers,
    )


def syncs(given: Given) -> list[Check]:
    """How often a step waits for the device."""
    if not given.on_card:
        return [Check.left_out("syncs", "needs a card")]
    step = _step(given, pairs=given.sizes.batches[0])
    batch = step.batch()
    step.whole(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step.whole(batch)
    torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "synchroniz" in str(one.message)]
    places = sorted({f"{wait.filename}:{wait.lineno}" for wait in waits})
    return [Check.at_most("syncs", "of a step", len(waits), _SYNCS, note=", ".join(places))]


def steps(given: Given) -> list[Check]:
    """A whole step: time, memory and launches, and its phases."""
    checks = []
    for pairs in given.sizes.batches:
        step = _step(given, pairs=pairs)
        batch = step.batch()
        peak = peak_memory(
            lambda step=step, batch=batch: step.whole(batch), device=given.device.type
        )
        timing = in_turns(
            {"step": lambda step=step, batch=batch: _several(step, batch, given.sizes.steps)},
            runs=given.runs,
            device=given.device.type,
        )["step"]

        def figure(what: str, found: float, unit: str, note: str = "", *, of: int = pairs) -> Check:
            return Check(
                section="steps", what=f"batch {of}: {what}", found=found, unit=unit, note=note
            )

        checks.append(figure("step", 1e3 * timing.median / given.sizes.steps, "ms", "one batch"))
        checks.append(figure("peak memory", peak / 2**30, "GiB", "above weights and moments"))
        if given.on_card:
            checks.append(figure("launches", _launches(step, batch), ""))
        wait = torch.cuda.synchronize if given.on_card else lambda: None
        step.seconds_by_phase(wait)
        for name, seconds in step.seconds_by_phase(wait).items():
            checks.append(figure(name, 1e3 * seconds, "ms", "waited for"))
    return checks


def _several(step: FullStep, batch: Batch, number: int) -> None:
    for _ in range(number):
        step.whole(batch)


def _launches(step: FullStep, batch: Batch) -> int:
    """Kernels that a step launches."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step.whole(batch)
        torch.cuda.synchronize()
    return sum(
        event.count
        for event in seen.key_averages()
        if event.key.startswith(("cudaLaunch", "cuLaunch"))
    )


def evaluation(given: Given) -> list[Check]:
    """A whole evaluation, encoders included, and how much of it is scoring."""
    sizes = given.sizes
    split = write_split(
        given.folder / "evaluated",
        images=sizes.evaluated,
        regions=36,
        feature_dim=sizes.feature_dim,
    )
    dataset, tokenizer = as_dataset(split)
    config = ExperimentConfig().with_overrides(
        {
            "model.dim": sizes.dim,
            "model.text.scratch_dim": sizes.text_dim,
            "model.text.scratch_layers": sizes.text_layers,
        }
    )
    torch.manual_seed(0)
    model = build_model(config, split=split, tokenizer=tokenizer).to(given.device).eval()

    precision = chosen_precision(config.optim.precision, given.device)

    def whole() -> object:
        return evaluate(
            model,
            dataset,
            protocol="full",
            batch_size=128,
            device=given.device,
            products=config.evaluation.products,
            precision=precision,
        )

    @torch.inference_mode()
    def captions_alone() -> Tensor | None:
        pooled = None
        for start in range(0, len(dataset), 128):
            some = range(start, min(start + 128, len(dataset)))
            batch = dataset.caption_batch(some).to(given.device)
            with autocast(precision, given.device):
                pooled = model.encode_captions(**batch._asdict()).pooled
        return pooled

    timings = in_turns(
        {"whole": whole, "its captions, encoded": captions_alone},
        runs=given.runs,
        device=given.device.type,
    )
    size = f"{sizes.evaluated:,} images, {len(dataset):,} captions"
    return [
        Check(section="evaluation", what=f"{size}: {name}", found=timing.median, unit="s")
        for name, timing in timings.items()
    ]
