"""What a step of training or encoding is given: padded fragments and their masks.

Axes:  image, caption      in the batch           pair           an image and one of its captions
       region, piece, word padded to the most     feature        width of a stored region vector
       text                width of the text encoder  label        different ones of a batch

Masks are True where a fragment is real.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float16, Int64
from torch import Tensor


class ImageBatch(NamedTuple):
    """Regions of some images.

    Attributes:
        features: region vectors in the dtype they are stored in; the model casts them.
        geometry: (x1/W, y1/H, x2/W, y2/H, area/(W H)), each in [0, 1]; None without boxes.
        iou: overlap of every two regions of an image, in [0, 1]; None without boxes.
        labels: position of each region's object label in the vocabulary; None without labels.
        shown_labels: the labels that occur here, each once, in rising order: as `each_once` finds
            them where the batch is made, since on a GPU the host would wait for their number.
        confidences: the detector's confidence in the label, in [0, 1]; None without scores.
        region_mask: True for real regions; every image has at least one.
    """

    features: Float[Tensor, "image region feature"]
    geometry: Float[Tensor, "image region 5"] | None
    iou: Float16[Tensor, "image region region"] | None
    labels: Int64[Tensor, "image region"] | None
    shown_labels: Int64[Tensor, " label"] | None
    confidences: Float[Tensor, "image region"] | None
    region_mask: Bool[Tensor, "image region"]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ImageBatch:
        """The same batch on another device."""
        return ImageBatch(**_each(self, lambda x: x.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> ImageBatch:
        """The same batch in page-locked memory, for a copy to the GPU that does not block."""
        return ImageBatch(**_each(self, Tensor.pin_memory))


class CaptionBatch(NamedTuple):
    """Word pieces of some captions, and how they form words.

    Attributes:
        tokens: piece ids, padded with the tokenizer's own padding id.
        token_mask: True for real pieces, [CLS] and [SEP] included.
        word_index: the word, from 0, that a piece belongs to; -1 for pieces of no word.
        word_mask: True for real words; every caption has at least one.
        word_links: True where two words are neighbours in the syntax graph, a word and itself
            included; None for the graphs that need no parser.
        word_features: outputs of a frozen text encoder, mean over a word's pieces; None if the
            encoder runs in the model.
    """

    tokens: Int64[Tensor, "caption piece"]
    token_mask: Bool[Tensor, "caption piece"]
    word_index: Int64[Tensor, "caption piece"]
    word_mask: Bool[Tensor, "caption word"]
    word_links: Bool[Tensor, "caption word word"] | None
    word_features: Float[Tensor, "caption word text"] | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CaptionBatch:
        """The same batch on another device."""
        return CaptionBatch(**_each(self, lambda x: x.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> CaptionBatch:
        """The same batch in page-locked memory, for a copy to the GPU that does not block."""
        return CaptionBatch(**_each(self, Tensor.pin_memory))


class Batch(NamedTuple):
    """Matching pairs: caption k describes image k.

    Attributes:
        images, captions: both sides, in the order of the pairs.
        image_ids: the image's position in its split; pairs that share it are never negatives.
    """

    images: ImageBatch
    captions: CaptionBatch
    image_ids: Int64[Tensor, "pair"]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.images.to(device, non_blocking),
            self.captions.to(device, non_blocking),
            self.image_ids.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for a copy to the GPU that does not block."""
        return Batch(
            self.images.pin_memory(), self.captions.pin_memory(), self.image_ids.pin_memory()
        )


def each_once(labels: Int64[Tensor, "image region"] | None) -> Int64[Tensor, " label"] | None:
    """The labels that occur, in rising order; None for None."""
    return None if labels is None else labels.unique()


def _each(batch: ImageBatch | CaptionBatch, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    fields = batch._asdict().items()
    return {name: None if field is None else change(field) for name, field in fields}
