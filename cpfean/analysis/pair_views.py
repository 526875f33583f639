"""What a trained model sees in one image and one caption: gates and prominent words.

Axes:  image, caption   one of each
       region           real ones of the image, in the detector's order
       word             of the caption
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, Real

from cpfean.data.split import Split
from cpfean.errors import ConfigError
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.model.scorers.prominent import ProminentAlignment


@dataclass(frozen=True, kw_only=True)
class ShownImage:
    """An image as a picture shows it.

    Attributes:
        name: of the image.
        position: in the split; None for an image that is not of it.
        boxes: of all its regions, x1, y1, x2, y2 in shares of its width and height; None without
            boxes.
        labels: name of each region's object; None without labels.
        aspect: its width by its height, as the boxes were made; 1 if it is not known.
    """

    name: str
    position: int | None
    boxes: Float[np.ndarray, "region 4"] | None
    labels: list[str] | None
    aspect: float


@dataclass(frozen=True, kw_only=True)
class PairView:
    """One image and one caption, as the alignment sees them.

    Attributes:
        image, caption: positions in the split; None for what is not of it.
        image_id: the image's name.
        is_match: whether the caption describes the image; None if nobody knows.
        score: of the pair, in [-1, 1].
        fragment_score: what the fragments alone say, before it is weighed into the score.
        words: the caption's, as texts.
        named: how much of what the gates let through names each word; sums to 1.
        regions: numbers of the image's regions that take part.
        gates: g of each region, in [0, 1].
        prominent: for each region, the position of the word that it says.
        boxes: x1, y1, x2, y2 in shares of the image's width and height; None without boxes.
        labels: name of each region's object; None without labels.
        aspect: width of the image by its height, as the boxes were made; 1 if it is not known.
    """

    image: int | None
    caption: int | None
    image_id: str
    is_match: bool | None
    score: float
    fragment_score: float
    words: list[str]
    named: Float[np.ndarray, "word"]
    regions: Int[np.ndarray, "region"]
    gates: Float[np.ndarray, "region"]
    prominent: Int[np.ndarray, "region"]
    boxes: Float[np.ndarray, "region 4"] | None
    labels: list[str] | None
    aspect: float

    def widest(self, count: int) -> list[int]:
        """Positions of the regions with the highest gates, the highest first."""
        return np.argsort(-self.gates, kind="stable")[:count].tolist()


@torch.inference_mode()
def view_pair(
    model: Cpfean,
    image: ImageEmbeddings,
    caption: CaptionEmbeddings,
    *,
    shown: ShownImage,
    words: list[str],
    position: int | None,
    is_match: bool | None,
) -> PairView:
    """What the model sees in a pair.

    Args:
        model: with gates.
        image, caption: one of each, encoded by it.
        shown: the image.
        words: the caption's, as texts.
        position: of the caption in the split; None if it is not of it.
        is_match: whether the caption describes the image; None if nobody knows.
    """
    seen = model.align(image, caption)
    regions = np.flatnonzero(image.mask[0].cpu().numpy())
    prominent = seen.prominence[0, 0].argmax(dim=0).cpu().numpy()
    return PairView(
        image=shown.position,
        caption=position,
        image_id=shown.name,
        is_match=is_match,
        score=float(model.score(image, caption)),
        fragment_score=float(seen.local),
        words=words,
        named=seen.named[0, 0, : len(words)].double().cpu().numpy(),
        regions=regions,
        gates=seen.gates[0, 0].double().cpu().numpy()[regions],
        prominent=prominent[regions],
        boxes=None if shown.boxes is None else shown.boxes[regions],
        labels=None if shown.labels is None else [shown.labels[region] for region in regions],
        aspect=shown.aspect,
    )


def shown_image(
    split: Split, image: int, *, sizes: Real[np.ndarray, "image 2"] | None
) -> ShownImage:
    """An image of a split, to be shown.

    Args:
        split: any.
        image: its position.
        sizes: width and height of the split's images, if they are known.
    """
    stored, names = split.regions, split.label_names
    labels = None
    if names is not None and stored.labels is not None:
        # What stands for the label of a region that is padding may be any number.
        real = int(stored.counts[image])
        labels = [names[label] for label in stored.labels[image, :real]]
        labels += [""] * (stored.num_regions - real)
    return ShownImage(
        name=split.image_ids[image],
        position=image,
        boxes=None if stored.geometry is None else stored.geometry[image, :, :4],
        labels=labels,
        aspect=1.0 if sizes is None else float(np.divide(*sizes[image])),
    )


def has_gates(model: Cpfean) -> bool:
    """Whether a model has gates and prominent words to look at."""
    return isinstance(model.scorer, ProminentAlignment)


def check_gates(model: Cpfean, *, name: str) -> None:
    """Refuses a model without gates.

    Raises:
        ConfigError: says which setting makes it so.
    """
    if has_gates(model):
        return
    alignment = model.config.alignment
    reason = f'model.alignment.kind = "{alignment.kind}"'
    if alignment.global_weight == 1:
        reason = "model.alignment.global_weight = 1, which leaves the fragments out"
    raise ConfigError(
        f"{name} was trained with {reason}: it has no gates and no prominent words to look at. "
        'Choose a model with kind = "prominent"; as --against any model will do.'
    )
