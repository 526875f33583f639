"""Training and evaluation: the same losses as on a processor, and where the time of a step goes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from measure import in_turns, peak_memory
from random_data import as_dataset, write_split
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cpfean.config import ExperimentConfig
from cpfean.data.batch import Batch
from cpfean.data.dataset import BatchRequest, GlobalBatches
from cpfean.losses.triplet import triplet_loss
from cpfean.training.checkpoint import Checkpoint
from cpfean.training.evaluation import evaluate
from cpfean.training.global_batch import GlobalBatchLoss
from cpfean.training.loop import EpochReport, fit
from cpfean.training.optimizer import build_optimizer
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


class _Step:
    """A whole training step of the full model on random data, in its parts."""

    def __init__(self, given: Given, *, pairs: int) -> None:
        sizes = given.sizes
        split = write_split(
            given.folder / f"pairs-{pairs}",
            images=max(2, pairs // 2),
            regions=36,
            feature_dim=sizes.feature_dim,
        )
        self.config = ExperimentConfig().with_overrides(
            {
                "model.dim": sizes.dim,
                "model.text.scratch_dim": sizes.text_dim,
                "model.text.scratch_layers": sizes.text_layers,
                "optim.batch_size": pairs,
            }
        )
        self.dataset, tokenizer = as_dataset(split)
        torch.manual_seed(0)
        self.device = given.device
        self.precision = chosen_precision(self.config.optim.precision, given.device)
        self.model = build_model(self.config, split=split, tokenizer=tokenizer).to(given.device)
        self.loss = GlobalBatchLoss(self.model, margin=self.config.loss.margin).train()
        self.optimizer = build_optimizer(self.model, self.config.optim)
        self.pairs = pairs
        self._requests = _endless(len(self.dataset), pairs)

    def batch(self) -> Batch:
        """The next one, on the device."""
        return self.dataset.training_batch(next(self._requests)).to(self.device)

    def whole(self, batch: Batch) -> None:
        """Forward, backward, clipping and update."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.device):
            loss = self.loss(batch, "hardest", self.pairs)
        loss.backward()
        self.update()

    def update(self) -> None:
        """Clipping and AdamW."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_norm)
        self.optimizer.step()

    def seconds_by_phase(self, wait: Callable[[], None]) -> dict[str, float]:
        """One step, the device waited for after every phase."""
        found: dict[str, float] = {}

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            wait()
            started = time.perf_counter()
            yield
            wait()
            found[name] = time.perf_counter() - started

        with phase("batch to the device"):
            batch = self.batch()
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision, self.device):
            with phase("encode images"):
                images = self.model.encode_images(**batch.images._asdict())
            with phase("encode captions"):
                captions = self.model.encode_captions(**batch.captions._asdict())
            with phase("score"):
                scores = self.model.score(images, captions)
            with phase("loss"):
                loss = triplet_loss(
                    scores, batch.image_ids, margin=self.config.loss.margin, mining="hardest"
                )
        with phase("backward"):
            loss.backward()
        with phase("update"):
            self.update()
        return found


def syncs(given: Given) -> list[Check]:
    """How often a step waits for the device."""
    if not given.on_card:
        return [Check.left_out("syncs", "needs a card")]
    step = _Step(given, pairs=given.sizes.batches[0])
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
        step = _Step(given, pairs=pairs)
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


def _several(step: _Step, batch: Batch, number: int) -> None:
    for _ in range(number):
        step.whole(batch)


def _launches(step: _Step, batch: Batch) -> int:
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

    def whole() -> object:
        return evaluate(model, dataset, protocol="full", batch_size=128, device=given.device)

    @torch.inference_mode()
    def captions_alone() -> Tensor | None:
        pooled = None
        for start in range(0, len(dataset), 128):
            some = range(start, min(start + 128, len(dataset)))
            batch = dataset.caption_batch(some).to(given.device)
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


def _endless(num_pairs: int, batch_size: int) -> Iterator[BatchRequest]:
    """Global batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from GlobalBatches(num_pairs, batch_size, seed=0, epoch=epoch)
        epoch += 1
