"""A trained model over a gallery: a sentence finds its images, an image finds its captions.

Axes:  image, caption   of the gallery, which is a split of a data folder
       candidate        those of them that are scored

    searcher = Searcher.from_pretrained("runs/NAME", data="DIR")
    for hit in searcher.images("a dog in the snow", k=10):
        print(hit.rank, hit.score, hit.text)

Every pair is scored, and the order is that of `evaluate.py --protocol full`, but that on a GPU this
encodes in the precision of training. With a shortlist, the cosines of the pooled vectors choose the
candidates, and the same score orders these alone.
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from cpfean import folders
from cpfean.analysis.pair_views import (
    PairView,
    check_gates,
    has_gates,
    shown_image,
    view_pair,
)
from cpfean.config import Products, nearest
from cpfean.data.agreement import GALLERY
from cpfean.data.split import Split, data_fingerprint, split_stem, splits_of
from cpfean.errors import ConfigError, DataError
from cpfean.fingerprints import code_fingerprint
from cpfean.photographs.extractor import RegionExtractor
from cpfean.search.hits import EncodedImage, Hit, Hits, check_counts
from cpfean.search.kept import (
    KeptCaptions,
    StoredPrecision,
    content_name,
    keep_captions,
    keep_images,
    model_fingerprint,
)
from cpfean.search.matching import find_captions, find_images
from cpfean.search.photographs import encode_photograph, open_extractor
from cpfean.search.sentences import read_sentence
from cpfean.training.setup import TrainedModel, default_device, open_checkpoint
from cpfean.training.trained import check_split, data_folder, model_folder, trained_configuration

_FORMAT = 1  # to be counted up when the kept embeddings change their files


class Searcher:
    """A trained model over a gallery.

    Args:
        trained: the model and the split; `from_pretrained` opens both.
        name: of the model, for messages.
        folder: the data, in the native format.
        cache_dir: for embeddings.
        key: of all that the embeddings are made from, the region count included.
        batch_size: images or captions encoded at a time.
        products: type of the matrix products of scoring; that of the evaluation gives its numbers.
        precision: of the regions on disk.

    Raises:
        as `keep_images`: the gallery is encoded here.
    """

    def __init__(
        self,
        trained: TrainedModel,
        *,
        name: str,
        folder: Path,
        cache_dir: Path,
        key: dict[str, Any],
        batch_size: int = 128,
        products: Products = "fp32",
        precision: StoredPrecision = "float32",
    ) -> None:
        self.trained = trained
        self.name = name
        self.folder = folder
        self._cache_dir = cache_dir
        self._key = key
        self._batch_size = batch_size
        self._products = products
        self._device = next(trained.model.parameters()).device
        about = key | {"holds": "images", "precision": precision}
        self._images = keep_images(
            cache_dir / f"gallery-{content_name(about)}",
            trained.model,
            trained.dataset,
            batch_size=batch_size,
            device=self._device,
            precision=precision,
            about=about,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        data: str | Path | None = None,
        split: str | None = None,
        device: torch.device | str | None = None,
        cache_dir: Path | None = None,
        precision: StoredPrecision = "float32",
        text_encoder: str | None = None,
    ) -> Searcher:
        """Opens a model and a gallery, and encodes the gallery if that was not done before.

        Args:
            model: folder of a run, checkpoint or model.
            data: folder in the native format, s3:// URL of one, or "synthetic"; None for what the
                model was trained on.
            split: which of its splits is the gallery; None for "test", or for "gallery" where the
                folder has no other.
            device: where to compute; the GPU if there is one.
            cache_dir: where embeddings are kept, by content; CPFEAN_CACHE or ~/.cache/cpfean.
            precision: of the regions on disk. "float16" takes half the room, and scores differ
                from those of the evaluation in the fourth decimal.
            text_encoder: where a frozen text encoder is now, if it has moved.

        Raises:
            CheckpointError: no such model, or one for data with other fields.
            ConfigError: the cache cannot be written.
            DataError: every fault of the split that was found.
            ServiceError: too little disk.
        """
        cache_dir = cache_dir or folders.cache_folder()
        found = model_folder(model)
        config = trained_configuration(found)
        folder = data_folder(config, None if data is None else str(data), cache_dir=cache_dir)
        split = split or (GALLERY if splits_of(folder) == (GALLERY,) else "test")
        check_split(folder, split, config=config, cache_dir=cache_dir)
        trained = open_checkpoint(
            found,
            data_folder=folder,
            split=split,
            cache_dir=cache_dir,
            device=default_device() if device is None else torch.device(device),
            num_regions=config.data.num_regions,
            text_encoder=text_encoder,
        )
        return cls(
            trained,
            name=str(model),
            folder=folder,
            cache_dir=cache_dir,
            key={
                "format": _FORMAT,
                "model": model_fingerprint(found),
                "code": [code_fingerprint(f"cpfean.{room}") for room in ("data", "model")],
                "data": data_fingerprint(folder),
                # Of large files the fingerprint reads a part; who writes to one changes its time.
                "written": (folder / f"{split_stem(folder, split)}_ims.npy").stat().st_mtime_ns,
                "split": split,
                "num_regions": config.data.num_regions,
            },
            batch_size=config.evaluation.batch_size,
            products=config.evaluation.products,
            precision=precision,
        )

    @property
    def split(self) -> Split:
        """The gallery."""
        return self.trained.dataset.split

    @property
    def has_gates(self) -> bool:
        """Whether the model has gates and prominent words to look at."""
        return has_gates(self.trained.model)

    def images(self, sentence: str, k: int = 10, shortlist: int | None = None) -> Hits:
        """The images that a sentence describes best.

        Args:
            sentence: anything; words beyond what the model reads are cut, which the answer tells,
                as it does words that the vocabulary does not know.
            k: how many, if the gallery has as many.
            shortlist: score only the so many images whose pooled vectors are nearest; None scores
                all.

        Raises:
            ConfigError: a sentence that says nothing, or in words of which the model knows none;
                fewer than one image asked for, or a shortlist shorter than that.
        """
        started = time.perf_counter()
        check_counts(k, shortlist)
        read = read_sentence(sentence, self.trained)

        names = self.split.image_ids
        found = find_images(
            self.trained.model,
            self._images,
            read.encoded,
            k=k,
            shortlist=shortlist,
            products=self._products,
        )
        hits = [
            Hit(rank=rank, score=score, position=image, text=names[image], image_id=names[image])
            for rank, image, score in found.ranked()
        ]
        seconds = time.perf_counter() - started
        return Hits(hits, total=len(names), scored=found.scored, seconds=seconds, sentence=read)

    def captions(
        self,
        image: str | EncodedImage,
        k: int = 10,
        shortlist: int | None = None,
    ) -> Hits:
        """The captions of the split that describe an image best.

        Args:
            image: its name in the gallery, or one that `image_named` or `photograph` encoded.
            k, shortlist: as in `images`, of captions.

        Raises:
            ConfigError: no such image; fewer than one caption asked for, or a shortlist shorter
                than that.
            DataError: a gallery without captions.
        """
        started = time.perf_counter()
        check_counts(k, shortlist)
        asked = self.image_named(image) if isinstance(image, str) else image
        kept, split = self._captions, self.split

        found = find_captions(
            self.trained.model,
            kept,
            asked.encoded,
            k=k,
            shortlist=shortlist,
            products=self._products,
        )
        hits = [
            Hit(
                rank=rank,
                score=score,
                position=caption,
                text=split.captions[caption],
                image_id=split.image_ids[split.groups.image_of(caption)],
            )
            for rank, caption, score in found.ranked()
        ]
        seconds = time.perf_counter() - started
        return Hits(hits, total=len(kept), scored=found.scored, seconds=seconds)

    def image_named(self, name: str) -> EncodedImage:
        """An image of the gallery by its name.

        Raises:
            ConfigError: there is none.
        """
        position = self._positions.get(name)
        if position is None:
            close = nearest(name, self.split.image_ids) if len(self._positions) <= 10_000 else "."
            raise ConfigError(f"{self.split.name} has no image {name!r:.120}{close}")
        return self.image_at(position)

    def image_at(self, position: int) -> EncodedImage:
        """An image of the gallery by its position in the split, from 0."""
        return EncodedImage(
            shown=shown_image(self.split, position, sizes=self.split.regions.sizes),
            encoded=self._images.rows(slice(position, position + 1), device=self._device),
        )

    def photograph(
        self, pixels: UInt8[np.ndarray, "height width 3"], *, name: str = "photograph"
    ) -> EncodedImage:
        """One's own photograph, its regions made as those of the gallery were.

        Args:
            pixels: RGB, upright; `cpfean.photographs.decoding.read_photograph` gives such.
            name: what to call it.

        Raises:
            CheckpointError, ConfigError, DataError: nothing tells what made the regions of the
                data, or it cannot be loaded; the message says why.
        """
        return encode_photograph(
            pixels, self.extractor, self.trained.model, split=self.split, name=name
        )

    @cached_property
    def extractor(self) -> RegionExtractor:
        """What made the regions of the data; raises as `photograph`."""
        return open_extractor(self.folder, self.split, device=self._device)

    def view(self, sentence: str, image: str | EncodedImage) -> PairView:
        """What the model sees in a sentence and an image: gates and prominent words.

        Args:
            sentence: as in `images`.
            image: as in `captions`.

        Raises:
            ConfigError: the model has no gates, no such image, or a sentence that says nothing.
        """
        check_gates(self.trained.model, name=self.name)
        asked = self.image_named(image) if isinstance(image, str) else image
        read = read_sentence(sentence, self.trained)
        return view_pair(
            self.trained.model,
            asked.encoded,
            read.encoded,
            shown=asked.shown,
            words=read.words,
            position=None,
            is_match=None,
        )

    @cached_property
    def _positions(self) -> dict[str, int]:
        names = self.split.image_ids
        return {name: position for position, name in reversed(list(enumerate(names)))}

    @cached_property
    def _captions(self) -> KeptCaptions:
        if not self.split.num_captions:
            raise DataError(
                f"{self.folder}: {self.split.name} has no captions that an image could find; "
                "choose a split that has."
            )
        # They do not depend on the regions.
        about = self._key | {"holds": "captions", "tokens": self.trained.dataset.tokens.content_key}
        return keep_captions(
            self._cache_dir / f"captions-{content_name(about)}",
            self.trained.model,
            self.trained.dataset,
            batch_size=self._batch_size,
            device=self._device,
            about=about,
        )
