"""What the parts of the model do, judged on a data set whose truth is known.

For `mechanisms.py`, `draw_mechanism.py` and the tests of the model.

Recall says that a model works, not why. On the synthetic set it is known which regions a caption
names and by which word, so the gate and the prominent word can be judged by themselves; and its
features can be made noisier and its labels wrong, so that the textual prior can be.

Axes:  region of an image, word of a caption
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float

from cpfean.config import (
    DataConfig,
    ExperimentConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Plain,
    RegionConfig,
    SyntheticConfig,
    TextConfig,
)
from cpfean.data.dataset import RetrievalDataset
from cpfean.data.sources import resolve_data
from cpfean.data.split import open_split
from cpfean.data.synthetic import SyntheticTruth, load_truth
from cpfean.model.cpfean import Cpfean
from cpfean.model.scorers.prominent import Alignment
from cpfean.training.checkpoint import Checkpoint
from cpfean.training.evaluation import evaluate
from cpfean.training.loop import EpochReport, fit

# Trains in seconds: short captions, few regions, and all negatives, since four epochs are too few
# for the hardest.
QUICK = ExperimentConfig(
    data=DataConfig(
        num_regions=12,
        max_tokens=32,
        region_dropout=0.0,
        word_noise=0.0,
        synthetic=SyntheticConfig(
            train_images=200, dev_images=2, test_images=100, num_regions=12, label_error=0.0
        ),
    ),
    model=ModelConfig(dim=64, text=TextConfig(scratch_dim=64), regions=RegionConfig(heads=4)),
    loss=LossConfig(mining="all"),
    optim=OptimConfig(epochs=4, batch_size=32, learning_rate=3e-3, decay_epoch=3),
)

_CLEAR: dict[str, Plain] = {"data.synthetic.feature_noise": 0.3}
_NOISY: dict[str, Plain] = {"data.synthetic.feature_noise": 3.0}
_WRONG: dict[str, Plain] = {"data.synthetic.label_error": 0.6}
_NO_PRIOR: dict[str, Plain] = {"model.regions.prior": False}
_NO_CONFIDENCE: dict[str, Plain] = {"model.regions.label_confidence": False}

# What the prior is judged by: changes to a configuration whose labels are right.
SETTINGS: dict[str, dict[str, Plain]] = {
    "clear": _CLEAR,
    "clear, no prior": _CLEAR | _NO_PRIOR,
    "noisy": _NOISY,
    "noisy, no prior": _NOISY | _NO_PRIOR,
    "noisy, no confidence": _NOISY | _NO_CONFIDENCE,
    "noisy, wrong labels": _NOISY | _WRONG,
    "noisy, wrong labels, no confidence": _NOISY | _WRONG | _NO_CONFIDENCE,
}


@dataclass(frozen=True)
class PriorEffects:
    """What the textual prior is worth, in rSum.

    Attributes:
        rsum: of the test split, by the name of one of `SETTINGS`; asked for what is needed only.
    """

    rsum: Callable[[str], float]

    @property
    def gain_clear(self) -> float:
        """What the prior adds where features are clear."""
        return self.rsum("clear") - self.rsum("clear, no prior")

    @property
    def gain_noisy(self) -> float:
        """What the prior adds where features are noisy."""
        return self.rsum("noisy") - self.rsum("noisy, no prior")

    @property
    def harm(self) -> float:
        """What wrong labels take away where the model is told the detector's confidence."""
        return self.rsum("noisy") - self.rsum("noisy, wrong labels")

    @property
    def harm_without_confidence(self) -> float:
        """What they take away where it is not."""
        wrong = self.rsum("noisy, wrong labels, no confidence")
        return self.rsum("noisy, no confidence") - wrong


@dataclass(frozen=True, kw_only=True)
class Mechanisms:
    """What a model's parts do on a split of the synthetic set.

    Attributes:
        rsum: of the split, from 0 to 600.
        gate_auc: chance that the gate of a described region is wider open than that of an
            undescribed one, each drawn from all matching pairs; 1/2 for a gate that knows nothing.
        word_accuracy: share of the described regions, over all matching pairs, whose prominent
            word is a noun that names them.
        word_chance: the same for a word drawn at random from the caption.
    """

    rsum: float
    gate_auc: float
    word_accuracy: float
    word_chance: float


def with_seed(config: ExperimentConfig, seed: int) -> ExperimentConfig:
    """The configuration with this seed for the synthetic set and for the training."""
    return config.with_overrides({"seed": seed, "data.synthetic.seed": seed})


def train_and_measure(config: ExperimentConfig, *, cache_dir: Path) -> Mechanisms:
    """Trains on a configuration's synthetic set, on the CPU, and measures on its test split."""
    model, dataset, truth = train_on_synthetic(config, cache_dir=cache_dir)
    return measure_mechanisms(model, dataset, truth)


def train_on_synthetic(
    config: ExperimentConfig, *, cache_dir: Path
) -> tuple[Cpfean, RetrievalDataset, SyntheticTruth]:
    """The model after its last epoch, and the test split with its truth.

    Args:
        config: its data is the synthetic set and its model the prominent alignment.
        cache_dir: where the set is generated, unless it is there already.
    """
    device = torch.device("cpu")
    folder = resolve_data(config.data, cache_dir=cache_dir)
    last = _Last()
    fit(config, data_folder=folder, cache_dir=cache_dir, reporter=last, device=device)
    split = open_split(folder, "test", num_regions=config.data.num_regions)
    tokenizer = last.checkpoint.tokenizer
    dataset = RetrievalDataset(split, tokenizer.encode(split.captions), tokenizer)
    return last.checkpoint.model.eval(), dataset, load_truth(folder, "test")


class _Last:
    """A reporter that keeps the latest checkpoint, whose model goes on being trained."""

    checkpoint: Checkpoint

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        assert checkpoint is not None, "one process"
        self.checkpoint = checkpoint


def measure_mechanisms(
    model: Cpfean, dataset: RetrievalDataset, truth: SyntheticTruth
) -> Mechanisms:
    """Judges gates and prominent words against the truth.

    Args:
        model: in evaluation mode, with the prominent alignment; on the CPU.
        dataset: a split of the synthetic set, its words told apart as by white space.
        truth: of the same split.
    """
    metrics = evaluate(model, dataset, protocol="full", batch_size=128, device=torch.device("cpu"))
    opened, shut, hits, chances = [], [], [], []
    for image in range(dataset.split.num_images):
        alignment = align_pairs(model, dataset, image)
        gates, prominent = alignment.gates[0].numpy(), alignment.prominence[0].numpy()
        for row in range(len(gates)):
            caption = dataset.split.captions_of(image)[row]
            naming = naming_words(truth, caption, num_regions=gates.shape[1])
            described = naming.any(axis=0)
            opened.append(gates[row, described])
            shut.append(gates[row, ~described])
            word = prominent[row, : len(naming), described].argmax(axis=1)
            hits.append(naming[word, np.flatnonzero(described)])
            chances.append(naming[:, described].mean(axis=0))
    return Mechanisms(
        rsum=metrics.rsum,
        gate_auc=area_under_curve(np.concatenate(opened), np.concatenate(shut)),
        word_accuracy=float(np.concatenate(hits).mean()),
        word_chance=float(np.concatenate(chances).mean()),
    )


@torch.inference_mode()
def align_pairs(model: Cpfean, dataset: RetrievalDataset, image: int) -> Alignment:
    """Gates and prominent words of one image with each of its captions."""
    captions = dataset.split.captions_of(image)
    return model.align(
        model.encode_images(**dataset.image_batch([image])._asdict()),
        model.encode_captions(**dataset.caption_batch(captions)._asdict()),
    )


def naming_words(
    truth: SyntheticTruth, caption: int, *, num_regions: int
) -> Bool[np.ndarray, "word region"]:
    """True where the word is a noun that names the region."""
    naming = np.zeros((len(truth.named[caption]), truth.objects.shape[1]), dtype=bool)
    for word, regions in enumerate(truth.named[caption]):
        naming[word, list(regions)] = True
    return naming[:, :num_regions]


def area_under_curve(
    positives: Float[np.ndarray, "positive"], negatives: Float[np.ndarray, "negative"]
) -> float:
    """Chance that a positive is above a negative; a tie counts half."""
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    not_above = np.searchsorted(ordered, positives, side="right")
    return float((below + not_above).mean() / (2 * len(negatives)))
