"""A gallery's embeddings: made once, and kept on disk under the name of what they were made from.

Axes:  image, caption   of the gallery         region, word   fragments of each
       dim              width of the joint embedding space
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from cpfean.data.dataset import RetrievalDataset
from cpfean.data.prefetch import prefetched
from cpfean.errors import DataError
from cpfean.model.cpfean import Cpfean
from cpfean.model.embeddings import CaptionEmbeddings, ImageEmbeddings
from cpfean.search.array_folders import Shapes, kept_arrays

StoredPrecision = Literal["float32", "float16"]
Rows = slice | Int64[np.ndarray, "row"]


@dataclass(frozen=True, kw_only=True)
class KeptImages:
    """The images of a gallery, encoded.

    Attributes:
        pooled: unit-norm pool of each image's regions.
        regions: unit-norm embeddings, arbitrary where masked; without numbers for a model whose
            score is that of the pools alone.
        mask: True where a region takes part.
        thresholds: as in `ImageEmbeddings`.
    """

    pooled: Float32[np.ndarray, "image dim"]
    regions: Float[np.ndarray, "image region dim"]
    mask: Bool[np.ndarray, "image region"]
    thresholds: Float32[np.ndarray, "image region"]

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def bytes_each(self) -> int:
        """What an image takes in memory."""
        return 4 * int(self.pooled[0].size + self.regions[0].size + self.thresholds[0].size)

    def rows(self, images: Rows, *, device: torch.device) -> ImageEmbeddings:
        """Some of them, in single precision; of a mapped file, only these are read."""
        pooled, regions, mask, thresholds = (
            torch.from_numpy(array[images]).to(device)
            for array in (self.pooled, self.regions, self.mask, self.thresholds)
        )
        return ImageEmbeddings(regions.float(), mask, pooled, thresholds)


@dataclass(frozen=True, kw_only=True)
class KeptCaptions:
    """The captions of a gallery, encoded; words one caption after the other.

    Attributes:
        pooled: unit-norm pool of each caption's words.
        words: unit-norm embeddings of all captions' words.
        salience: of these words.
        offsets: where each caption starts; one more than there are captions.
    """

    pooled: Float32[np.ndarray, "caption dim"]
    words: Float32[np.ndarray, "word dim"]
    salience: Float32[np.ndarray, " word"]
    offsets: Int64[np.ndarray, "caption+1"]

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def lengths(self) -> Int64[np.ndarray, "caption"]:
        """Words of each caption."""
        return np.diff(self.offsets)

    def rows(self, captions: Rows, *, device: torch.device) -> CaptionEmbeddings:
        """Some of them, padded to the longest."""
        starts, lengths = self.offsets[:-1][captions], self.lengths[captions]
        mask = np.arange(lengths.max(initial=1)) < lengths[:, None]
        words = np.zeros((*mask.shape, self.words.shape[1]), dtype=np.float32)
        salience = np.ones(mask.shape, dtype=np.float32)
        place = (starts[:, None] + np.arange(mask.shape[1]))[mask]
        words[mask], salience[mask] = self.words[place], self.salience[place]
        return CaptionEmbeddings(
            torch.from_numpy(words).to(device),
            torch.from_numpy(mask).to(device),
            torch.from_numpy(self.pooled[captions]).to(device),
            torch.from_numpy(salience).to(device),
        )


def keep_images(
    folder: Path,
    model: Cpfean,
    dataset: RetrievalDataset,
    *,
    batch_size: int,
    device: torch.device,
    precision: StoredPrecision = "float32",
    about: Mapping[str, Any],
) -> KeptImages:
    """The images of a split from their folder, which is made if it is not there.

    Args:
        folder: of the cache, its name made of all that has a say in what it holds.
        model: in evaluation mode, on `device`.
        dataset: the split.
        batch_size: images encoded at a time; that of the evaluation gives its very numbers.
        device: where to compute.
        precision: of the regions on disk.
        about: what the folder is made from, for people.

    Raises:
        ConfigError: the cache cannot be written.
        DataError: an image whose embedding is not finite, or a damaged folder.
        ServiceError: too little disk.
    """
    split = dataset.split
    num_images, num_regions, dim = split.num_images, split.regions.num_regions, model.config.dim
    kept_dim = 0 if model.scorer is None else dim
    shapes: Shapes = {
        "pooled": ((num_images, dim), "<f4"),
        "regions": (
            (num_images, num_regions, kept_dim),
            "<f2" if precision == "float16" else "<f4",
        ),
        "mask": ((num_images, num_regions), "|b1"),
        "thresholds": ((num_images, num_regions), "<f4"),
    }

    def batches() -> Iterator[tuple[int, dict[str, Tensor]]]:
        starts = range(0, num_images, batch_size)
        blocks = [range(start, min(start + batch_size, num_images)) for start in starts]
        on_gpu = device.type == "cuda"
        with prefetched(map(dataset.image_batch, blocks), pin=on_gpu) as ready:
            for block, batch in zip(blocks, ready, strict=True):
                encoded = model.encode_images(**batch.to(device, non_blocking=on_gpu)._asdict())
                _check_finite(encoded, block, names=split.image_ids)
                regions = encoded.regions[..., :kept_dim]
                yield block.stop, encoded._replace(regions=regions)._asdict()

    arrays = kept_arrays(
        folder,
        shapes,
        batches,
        what=f"encoding images of {split.name}",
        total=num_images,
        about=about,
    )
    return KeptImages(**arrays)


def keep_captions(
    folder: Path,
    model: Cpfean,
    dataset: RetrievalDataset,
    *,
    batch_size: int,
    device: torch.device,
    about: Mapping[str, Any],
) -> KeptCaptions:
    """The captions of a split from their folder; otherwise as `keep_images`."""
    split, num_words = dataset.split, dataset.tokens.num_words
    offsets = np.concatenate(([0], np.cumsum(num_words, dtype=np.int64)))
    shapes: Shapes = {
        "pooled": ((split.num_captions, model.config.dim), "<f4"),
        "words": ((int(offsets[-1]), model.config.dim), "<f4"),
        "salience": ((int(offsets[-1]),), "<f4"),
    }

    def batches() -> Iterator[tuple[int, dict[str, Tensor]]]:
        for start in range(0, split.num_captions, batch_size):
            block = range(start, min(start + batch_size, split.num_captions))
            batch = dataset.caption_batch(block).to(device)
            words, mask, pooled, salience = model.encode_captions(**batch._asdict())
            flat = {"words": words[mask], "salience": salience[mask]}
            yield block.stop, flat | {"pooled": pooled}

    arrays = kept_arrays(
        folder,
        shapes,
        batches,
        what=f"encoding captions of {split.name}",
        total=split.num_captions,
        about=about,
    )
    return KeptCaptions(offsets=offsets, **arrays)


def model_fingerprint(folder: Path) -> str:
    """Sixteen digits of a model's weights, settings and tokenizer, wherever it lies.

    A frozen text encoder is named by its own fingerprint in the settings.
    """
    model = folder / "best" if (folder / "best").is_dir() else folder
    files = [model / "config.json", model / "model.safetensors"]
    digest = hashlib.sha256()
    for file in [*files, *sorted((model / "tokenizer").iterdir())]:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()[:16]


def content_name(about: Mapping[str, Any]) -> str:
    """Sixteen digits of what a folder is made from."""
    return hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:16]


def _check_finite(images: ImageEmbeddings, block: range, *, names: Sequence[str]) -> None:
    """Refuses images that the model makes no numbers of: they would be nowhere in any order."""
    regions = images.regions.isfinite().all(dim=-1) | ~images.mask
    sound = regions.all(dim=1) & images.pooled.isfinite().all(dim=1)
    if not bool(sound.all()):
        image = block[int((~sound).nonzero()[0])]
        raise DataError(
            f"image {image} ({names[image]}): its embedding is not finite; look at its features "
            "with experiments/validate.py."
        )
