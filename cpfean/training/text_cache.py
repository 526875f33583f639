"""What a frozen text encoder makes of a split's captions, computed once and kept on disk.

A frozen encoder gives the same word vectors in every epoch of every trial, at many times the cost
of the rest of a step. The file's name says which tokens and which weights it was made from, so that
it can be shared by everything that runs on a machine.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Float, Int64

from cpfean.data.dataset import RetrievalDataset, WordFeatures
from cpfean.data.prefetch import prefetched
from cpfean.errors import ConfigError
from cpfean.folders import cannot_write, made
from cpfean.model.text_encoder import TextBackbone
from cpfean.progress import Progress

logger = logging.getLogger(__name__)


def encode_frozen(
    dataset: RetrievalDataset,
    backbone: TextBackbone,
    *,
    cache_dir: Path,
    device: torch.device,
    batch_size: int = 256,
) -> WordFeatures:
    """The word vectors of all captions, from the cache or through the encoder.

    Where the cache cannot be written they are made again in memory, which is said.

    Args:
        dataset: whose captions.
        backbone: frozen, on `device`.
        cache_dir: where the file is or will be; processes may share it.
        device: where to run the encoder.
        batch_size: captions encoded at a time.
    """
    key = f"{dataset.tokens.content_key[:16]}-{backbone.fingerprint()}"
    path = cache_dir / f"words-{key}.npy"
    # A file that is there is whole. Where it may be read it is, without a lock: that is a file too.
    if not os.path.exists(path):
        try:
            made(cache_dir)
            # Workers of one host arrive together: the first one encodes, the others wait for its
            # file.
            with FileLock(cache_dir / f"words-{key}.lock"):
                if not path.exists():
                    _write(path, dataset, backbone, device=device, batch_size=batch_size)
        except (ConfigError, PermissionError) as error:
            if isinstance(error, PermissionError):
                error = cannot_write(path, error)
            logger.warning("%s Until then each training encodes the captions again.", error)
            words = np.empty((int(_offsets(dataset)[-1]), backbone.text_dim), dtype=np.float32)
            _encode(words, dataset, backbone, device=device, batch_size=batch_size)
            return WordFeatures(words, _offsets(dataset))
    return WordFeatures(np.load(path, mmap_mode="r"), _offsets(dataset))


def _write(
    path: Path,
    dataset: RetrievalDataset,
    backbone: TextBackbone,
    *,
    device: torch.device,
    batch_size: int,
) -> None:
    starts = _offsets(dataset)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    words = np.lib.format.open_memmap(
        partial, mode="w+", dtype=np.float32, shape=(int(starts[-1]), backbone.text_dim)
    )
    _encode(words, dataset, backbone, device=device, batch_size=batch_size)
    words.flush()
    del words
    partial.replace(path)


def _encode(
    words: Float[np.ndarray, "word dim"],
    dataset: RetrievalDataset,
    backbone: TextBackbone,
    *,
    device: torch.device,
    batch_size: int,
) -> None:
    """Fills in the vectors of all words, one caption after the other.

    In the type of the weights, outside of autocast: the file is for every training, whatever its
    precision.
    """
    num_words, starts = dataset.tokens.num_words, _offsets(dataset)
    order = np.argsort(num_words, kind="stable")
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    progress = Progress("encoding captions", total=len(order))
    done = 0
    on_gpu = device.type == "cuda"
    with prefetched(map(dataset.caption_batch, parts), pin=on_gpu) as batches:
        for captions, given in zip(parts, batches, strict=True):
            batch = given.to(device, non_blocking=on_gpu)
            with torch.inference_mode():
                features = backbone(
                    batch.tokens, batch.token_mask, batch.word_index, batch.word_mask.shape[1]
                )
            # All at once: each copy from a GPU is waited for.
            vectors = features.float().cpu().numpy()
            for vector, caption in zip(vectors, captions, strict=True):
                start, stop = starts[caption], starts[caption + 1]
                words[start:stop] = vector[: stop - start]
            done += len(captions)
            progress.step(done)


def _offsets(dataset: RetrievalDataset) -> Int64[np.ndarray, "caption+1"]:
    """Where the words of each caption start."""
    return np.concatenate(([0], np.cumsum(dataset.tokens.num_words, dtype=np.int64)))
