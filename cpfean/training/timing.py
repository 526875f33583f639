"""How long a training of a configuration takes and how large its checkpoints are, before it is run.

A few steps are trained for real, on the real data, and thrown away. Of several workers one is
played: it has its share of the batch, and copies of its own captions stand in for those of the
others, so that it encodes and scores as much as a worker does. What workers exchange is left out.
For a card that is not here one step is counted instead, which makes an estimate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import torch
from torch import Tensor

from cpfean.config import ExperimentConfig
from cpfean.data.batch import Batch
from cpfean.data.dataset import BatchRequest, GlobalBatches, RetrievalDataset, WordFeatures
from cpfean.data.prefetch import prefetched
from cpfean.data.split import Split, open_split
from cpfean.data.tokens import CaptionTokenizer
from cpfean.losses.triplet import triplet_loss
from cpfean.model.cpfean import Cpfean, LabelEmbeddings, ModelInputs
from cpfean.model.embeddings import CaptionEmbeddings
from cpfean.model.text_encoder import TextBackbone
from cpfean.threads import threads_chosen
from cpfean.training.counting import Counter, Rates
from cpfean.training.evaluation import COCO_FOLD, evaluate
from cpfean.training.global_batch import find_gradients
from cpfean.training.optimizer import build_optimizer
from cpfean.training.precision import LossScale, autocast, chosen_precision
from cpfean.training.setup import Experiment, open_experiment

_WARM_UP = 2  # steps that compile, allocate and open files
_LEAST, _MOST = 10, 100
_ENOUGH_SECONDS, _LONG_SECONDS = 5.0, 30.0  # with the least of steps, and without
_PART = 128  # dev images that validation is timed on; the rest is extrapolated
_LABEL_PIECES = 8  # of the longest label; the table of them is small whatever it is


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was timed.

    Attributes:
        step_seconds: median of a training step of one worker.
        timed: how many steps were timed.
        steps: of an epoch.
        validation_seconds: of an epoch; extrapolated if dev has more images than are timed.
        threads: that were computed with.
    """

    step_seconds: float
    timed: int
    steps: int
    validation_seconds: float
    threads: int


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What was counted for a card that is not here: no measurement.

    Attributes:
        step_seconds: of a training step of one worker, about.
        flops, bytes: of such a step.
        steps: of an epoch.
        validation_seconds: of an epoch, about.
    """

    step_seconds: float
    flops: float
    bytes: float
    steps: int
    validation_seconds: float


def time_training(
    config: ExperimentConfig,
    *,
    data_folder: Path,
    cache_dir: Path,
    device: torch.device,
    workers: int,
    threads: int,
    enough_seconds: float = _ENOUGH_SECONDS,
) -> Timing:
    """Times a few steps and a part of a validation, in this process.

    Args:
        config: the experiment.
        data_folder: a checked folder in the native format.
        cache_dir: for what can be made again.
        device: where to compute.
        workers: processes that would share the batch.
        threads: that each may have, unless OMP_NUM_THREADS says how many.
        enough_seconds: of steps, once there are ten.

    Raises:
        ConfigError, DataError: what is asked for does not fit the data.
    """
    with threads_chosen(config, workers=workers, available=threads) as used:
        experiment = _open(config, data_folder=data_folder, cache_dir=cache_dir, device=device)
        step_seconds, timed = _time_steps(
            experiment.model,
            experiment.train,
            config,
            device=device,
            workers=workers,
            enough_seconds=enough_seconds,
        )
        validation = _validation_seconds(
            time.monotonic, experiment, config, data_folder=data_folder, device=device
        )
    return Timing(
        step_seconds=step_seconds,
        timed=timed,
        steps=steps_of(config, data_folder),
        validation_seconds=validation / workers,
        threads=used,
    )


def count_training(
    config: ExperimentConfig,
    *,
    data_folder: Path,
    cache_dir: Path,
    workers: int,
    in_step: Rates,
    in_validation: Rates,
) -> Counted:
    """Counts one step and a part of a validation, computed in this process, for a card.

    The score is counted in plain torch, which reads and writes more than the kernels for cards do.

    Args:
        config: the experiment.
        data_folder: a checked folder in the native format.
        cache_dir: for what can be made again.
        workers: processes that would share the batch.
        in_step: the card's rates in the type of a step's products.
        in_validation: the same in the type in which a split is encoded and scored.

    Raises:
        ConfigError, DataError: what is asked for does not fit the data.
    """
    device = torch.device("cpu")
    # The rates stand for the types; a processor would take its time for half precision.
    config = config.with_overrides({"optim.precision": "fp32", "evaluation.products": "fp32"})
    experiment = _open(config, data_folder=data_folder, cache_dir=cache_dir, device=device)
    step, validation = Counter(in_step), Counter(in_validation)
    dataset = experiment.train
    batch = dataset.training_batch(next(_requests(len(dataset), config, workers=workers)))
    with _plain_scores(experiment.model):
        optimizer = build_optimizer(experiment.model, config.optim)
        experiment.model.train()
        with step:
            total = min(config.optim.batch_size, len(dataset))
            _step(experiment.model, optimizer, batch, config, scale=LossScale(), total=total)
        with validation:
            validation_seconds = _validation_seconds(
                lambda: validation.seconds,
                experiment,
                config,
                data_folder=data_folder,
                device=device,
            )
    return Counted(
        step_seconds=step.seconds,
        flops=step.flops,
        bytes=step.bytes,
        steps=steps_of(config, data_folder),
        validation_seconds=validation_seconds / workers,
    )


@contextmanager
def _plain_scores(model: Cpfean) -> Iterator[None]:
    """Without the kernel for processors, whose work nobody can count."""
    if model.scorer is None:
        yield
        return
    model.scorer.compiled_scores = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.scorer.compiled_scores


def steps_of(config: ExperimentConfig, data_folder: Path) -> int:
    """Training steps of an epoch."""
    pairs = _training_split(config, data_folder).num_captions
    return pairs // min(config.optim.batch_size, pairs)


def _open(
    config: ExperimentConfig, *, data_folder: Path, cache_dir: Path, device: torch.device
) -> Experiment:
    """The experiment, of a frozen text encoder with few captions.

    It goes over all captions once before the first step, which is neither timed nor counted.
    """
    if config.model.text.encoder != "scratch" and not config.model.text.trainable:
        few = {"data.train_images": _few_images(config, data_folder)}
        config = config.with_overrides(few)
    return open_experiment(config, data_folder=data_folder, cache_dir=cache_dir, device=device)


def checkpoint_bytes(config: ExperimentConfig, *, data_folder: Path) -> int:
    """Bytes of a checkpoint, from the shapes of the model; nothing of it is computed.

    Weights, the best epoch's weights, and AdamW's two moments of what is trained. The vocabulary of
    a text encoder from scratch is taken to be as large as it may become.

    Raises:
        ConfigError, DataError: what is asked for does not fit the data.
    """
    split = open_split(data_folder, "train", num_regions=config.data.num_regions, num_images=1)
    names = split.label_names if config.model.regions.prior else None
    text = config.model.text
    with torch.device("meta"):
        if text.encoder == "scratch":
            backbone = TextBackbone.build(text, vocab_size=text.scratch_vocabulary, pad_id=0)
            labels = {"pieces": torch.zeros(len(names or ()), _LABEL_PIECES, dtype=torch.int64)}
        else:
            backbone = TextBackbone.of_shape(text)
            labels = {
                "vectors": torch.zeros(len(names or ()), backbone.word_dim(static=text.static))
            }
        model = Cpfean(
            config.model,
            inputs=ModelInputs(
                feature_dim=split.regions.feature_dim,
                has_boxes=split.regions.geometry is not None,
                label_names=None if names is None else tuple(names),
            ),
            backbone=backbone,
            labels=None if names is None else LabelEmbeddings(**labels),
        )
    kept = sum(_bytes(tensor) for tensor in model.own_state().values())
    moments = sum(2 * _bytes(p) for p in model.parameters() if p.requires_grad)
    return 2 * kept + moments


def _training_split(config: ExperimentConfig, data_folder: Path) -> Split:
    """What the configuration trains on."""
    return open_split(
        data_folder,
        "train",
        num_regions=config.data.num_regions,
        num_images=config.data.train_images,
    )


def _few_images(config: ExperimentConfig, data_folder: Path) -> int:
    """Training images that make a few batches."""
    num_images = _training_split(config, data_folder).num_images
    return min(num_images, config.optim.batch_size)


def _time_steps(
    model: Cpfean,
    dataset: RetrievalDataset,
    config: ExperimentConfig,
    *,
    device: torch.device,
    workers: int,
    enough_seconds: float,
) -> tuple[float, int]:
    """Median seconds of a step, and of how many."""
    optimizer = build_optimizer(model, config.optim)
    total = min(config.optim.batch_size, len(dataset))
    on_gpu = device.type == "cuda"
    precision = chosen_precision(config.optim.precision, device)
    scale = LossScale.to_go_on(precision, LossScale())
    model.train()
    times: list[float] = []
    requests = _requests(len(dataset), config, workers=workers)
    with prefetched(map(dataset.training_batch, requests), pin=on_gpu) as gathered:
        for number in range(_WARM_UP + _MOST):
            # A batch that is not ready is waited for, as in training.
            started = time.monotonic()
            batch = next(gathered).to(device, non_blocking=on_gpu)
            _step(model, optimizer, batch, config, scale=scale, total=total)
            if on_gpu:
                torch.cuda.synchronize(device)
            if number >= _WARM_UP:
                times.append(time.monotonic() - started)
                enough = enough_seconds if len(times) >= _LEAST else _LONG_SECONDS
                if sum(times) >= enough:
                    break
    return statistics.median(times), len(times)


def _step(
    model: Cpfean,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: ExperimentConfig,
    *,
    scale: LossScale,
    total: int,
) -> None:
    """One training step of one worker."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    with autocast(scale.precision, batch.image_ids.device):
        loss = _share_of_loss(model, batch, config, total=total)
    largest = config.optim.clip_norm * scale.value
    norm = find_gradients(model, loss * scale.value, parameters, clip_norm=largest)
    scale.step(optimizer, parameters, norm)


def _requests(num_pairs: int, config: ExperimentConfig, *, workers: int) -> Iterator[BatchRequest]:
    """The first worker's rows of one batch after another, epoch after epoch."""
    return chain.from_iterable(
        GlobalBatches(
            num_pairs,
            config.optim.batch_size,
            seed=config.seed,
            epoch=epoch,
            rank=0,
            world_size=workers,
        )
        for epoch in count(1)
    )


def _share_of_loss(model: Cpfean, batch: Batch, config: ExperimentConfig, *, total: int) -> Tensor:
    """What `GlobalBatchLoss` computes on one of several workers, from this one's captions alone."""
    images = model.encode_images(**batch.images._asdict())
    captions = model.encode_captions(**batch.captions._asdict())
    rows = torch.arange(total, device=captions.pooled.device) % len(captions.pooled)
    everybody = CaptionEmbeddings(*(field[rows] for field in captions))
    scores = model.score(images, everybody)
    image_ids = torch.arange(total, device=scores.device)
    return triplet_loss(
        scores, image_ids, margin=config.loss.margin, mining=config.loss.mining, first=0
    )


def _validation_seconds(
    clock: Callable[[], float],
    experiment: Experiment,
    config: ExperimentConfig,
    *,
    data_folder: Path,
    device: torch.device,
) -> float:
    """Seconds of one process for all of dev, by a clock."""
    dev = experiment.dev

    def timed(num_images: int) -> float:
        part = _first_images(dev, experiment.tokenizer, num_images, config, data_folder=data_folder)
        started = clock()
        evaluate(
            experiment.model,
            part,
            protocol="full",
            batch_size=config.evaluation.batch_size,
            device=device,
            products=config.evaluation.products,
            precision=chosen_precision(config.optim.precision, device),
        )
        return clock() - started

    whole = dev.split.num_images
    fold = COCO_FOLD if config.evaluation.protocol == "coco-1k" else whole
    return seconds_of_all(timed, whole=whole, fold=fold)


def seconds_of_all(
    timed: Callable[[int], float], *, whole: int, fold: int, part: int = _PART
) -> float:
    """Seconds of a validation, from those of one or two parts of it.

    Encoding grows with the images n, scoring with n^2: a n + c n^2 through two timed sizes.

    Args:
        timed: seconds for so many images.
        whole: images of the split.
        fold: images that are scored with each other's captions.
        part: the most images that are timed.
    """
    large = min(whole, part)
    small = max(1, large // 2)
    timed(small)  # compiles and opens what is compiled and opened once
    for_large = timed(large)
    if large == whole:
        return for_large
    for_small = timed(small)
    scoring = max(0.0, (for_large / large - for_small / small) / (large - small))
    encoding = for_large / large - scoring * large
    return whole / fold * (encoding * fold + scoring * fold**2)


def _first_images(
    dev: RetrievalDataset,
    tokenizer: CaptionTokenizer,
    num_images: int,
    config: ExperimentConfig,
    *,
    data_folder: Path,
) -> RetrievalDataset:
    split = open_split(
        data_folder, "dev", num_regions=config.data.num_regions, num_images=num_images
    )
    features = dev.word_features
    if features is not None:
        features = WordFeatures(features.values, features.offsets[: split.num_captions + 1])
    tokens = tokenizer.encode(split.captions)
    return RetrievalDataset(split, tokens, tokenizer, word_features=features)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
