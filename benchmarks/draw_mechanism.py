"""Draws what the alignment sees in one made-up scene: docs/images/mechanism.png.

    python benchmarks/draw_mechanism.py

Trains the baseline `synthetic` on one CPU core (about two minutes) and draws a test image with one
of its captions, twice: a matching pair, and the caption with another image. A box is as solid as
its gate is open and says its prominent word, a tinted one is described in truth; a word is as dark
as its weight. Of the captions that name three things of some size, the one is drawn whose gates are
clearest: a good example, not a typical one. Needs matplotlib, which comes with mlflow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from jaxtyping import Bool
from known_truth import align_pairs, train_on_synthetic
from matplotlib.axes import Axes

from cpfean.data.dataset import RetrievalDataset
from cpfean.data.synthetic import SyntheticTruth
from cpfean.model.cpfean import Cpfean
from cpfean.model.scorers.prominent import Alignment
from experiments.baselines import SYNTHETIC

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:cyan")


def main() -> None:
    """Trains and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--caption", type=int, default=None, help="of the test split; chosen if absent"
    )
    parser.add_argument("--cache", type=Path, default=Path("runs/mechanisms"))
    parser.add_argument("--out", type=Path, default=Path("docs/images/mechanism.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, dataset, truth = train_on_synthetic(SYNTHETIC, cache_dir=arguments.cache)
    caption = arguments.caption
    if caption is None:
        caption = clearest(model, dataset, truth)
    image = dataset.split.image_of(caption)
    other = (image + dataset.split.num_images // 2) % dataset.split.num_images
    draw(model, dataset, truth, caption, (image, other), arguments.out)
    print(f"{arguments.out}: {dataset.split.captions[caption]!r}")


def clearest(model: Cpfean, dataset: RetrievalDataset, truth: SyntheticTruth) -> int:
    """The caption, of those that name three things, whose gates tell best what it describes."""
    geometry = dataset.split.regions.geometry
    assert geometry is not None
    best, widest = 0, -np.inf
    for caption, words in enumerate(truth.named):
        image = dataset.split.image_of(caption)
        row = caption - dataset.split.captions_of(image).start
        described = truth.described_by[caption]
        areas = geometry[image, described, 4]
        if len(set(words) - {()}) < 3 or len(words) > 14 or areas.min() < 0.015:
            continue
        gates = align_pairs(model, dataset, image).gates[0, row].numpy()
        gap = gates[described].min() - gates[~described].max()
        if gap > widest:
            best, widest = caption, gap
    return best


def draw(
    model: Cpfean,
    dataset: RetrievalDataset,
    truth: SyntheticTruth,
    caption: int,
    images: tuple[int, int],
    out: Path,
) -> None:
    """Both images with the caption, side by side."""
    words = dataset.split.captions[caption].split()
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.6), dpi=90)
    for axis, image, title in zip(axes, images, ("its own image", "another image"), strict=True):
        with torch.inference_mode():
            encoded = model.encode_images(**dataset.image_batch([image])._asdict())
            spoken = model.encode_captions(**dataset.caption_batch([caption])._asdict())
            score = float(model.score(encoded, spoken))
            alignment = model.align(encoded, spoken)
        own = image == dataset.split.image_of(caption)
        described = truth.described_by[caption] & own
        draw_regions(axis, dataset, image, alignment, words, described)
        axis.set_title(f"{title}: score {score:.2f}", fontsize=10)
        write_words(axis, words, alignment.named[0, 0].numpy())
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    # Without the date and version of the library, so that the same figures make the same file.
    figure.savefig(out, metadata={"Software": None})


def draw_regions(
    axis: Axes,
    dataset: RetrievalDataset,
    image: int,
    alignment: Alignment,
    words: list[str],
    described: Bool[np.ndarray, "region"],
) -> None:
    """The boxes, in shares of the image; as solid as their gates."""
    gates = alignment.gates[0, 0].numpy()
    prominent = alignment.prominence[0, 0].numpy().argmax(axis=0)
    geometry, labels = dataset.split.regions.geometry, dataset.split.regions.labels
    names = dataset.split.label_names
    assert geometry is not None
    assert labels is not None
    assert names is not None
    spoken = sorted(set(prominent[gates > 0.3].tolist()))
    # Of several boxes with one prominent word, the last one drawn, whose gate is widest, says it.
    says = {int(prominent[region]): region for region in np.argsort(gates)}
    for region in np.argsort(gates):
        x1, y1, x2, y2 = geometry[image, region, :4].astype(float)
        word = int(prominent[region])
        open_ = gates[region] > 0.3
        colour = COLOURS[spoken.index(word) % len(COLOURS)] if open_ else "0.6"
        if described[region]:
            tint = plt.Rectangle((x1, y1), x2 - x1, y2 - y1, color="gold", alpha=0.12, linewidth=0)
            axis.add_patch(tint)
        axis.add_patch(
            plt.Rectangle(
                (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour,
                alpha=0.25 + 0.75 * float(gates[region]), linewidth=0.6 + 2 * float(gates[region]),
            )
        )  # fmt: skip
        if open_ and says[word] != region:
            continue
        axis.text(
            x1 + 0.012,
            y1 + 0.012,
            f"{words[word]} {gates[region]:.2f}" if open_ else names[labels[image, region]],
            fontsize=8 if open_ else 6,
            color=colour,
            va="top",
            weight="bold" if open_ else "normal",
        )
    axis.set_xlim(0, 1)
    axis.set_ylim(1, 0)
    axis.set_xticks([])
    axis.set_yticks([])


def write_words(axis: Axes, words: list[str], named: np.ndarray) -> None:
    """The caption under the image, each word shaded by how many gates name it."""
    place, row = 0, 0
    for word, share in zip(words, named[: len(words)], strict=True):
        if place + len(word) > 48:
            place, row = 0, row + 1
        # A word that is named as much as the others is shaded by a third.
        shade = min(1.0, float(share) * len(words) / 3)
        colour = (1, 1 - 0.45 * shade, 1 - 0.85 * shade)
        axis.text(
            place * 0.0205,
            1.07 + 0.075 * row,
            word,
            fontsize=10,
            family="monospace",
            va="baseline",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.2},
        )
        place += len(word) + 1


if __name__ == "__main__":
    main()
