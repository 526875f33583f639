"""A split of random numbers and words in the native format, for benchmarks that time the data.

Features, boxes and captions have the sizes of real ones and no meaning: 36 regions of width 2048
from 1,600 labels, captions of 8 to 16 words.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpfean.config import TextConfig
from cpfean.data.dataset import RetrievalDataset, WordFeatures
from cpfean.data.split import Split, open_split
from cpfean.data.tokens import CaptionTokenizer, load_tokenizer

LABELS = 1600
SHORTEST, LONGEST = 8, 16
_VOCABULARY = 1000
_PER_IMAGE = 5


def write_split(
    folder: Path, *, images: int, regions: int, feature_dim: int, dtype: str = "float32"
) -> Split:
    """Writes a split named "test" and opens it.

    Args:
        folder: made if absent.
        images: how many, each with five captions.
        regions: of each image.
        feature_dim: width of a region's features.
        dtype: of the features, "float16" or "float32".
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    features = np.lib.format.open_memmap(
        folder / "test_ims.npy", mode="w+", dtype=dtype, shape=(images, regions, feature_dim)
    )
    for image in range(images):
        features[image] = rng.standard_normal((regions, feature_dim), dtype=np.float32)
    features.flush()
    del features
    sizes = rng.integers(400, 640, (images, 2))
    start = rng.random((images, regions, 2)) * 0.7
    stop = start + 0.05 + rng.random((images, regions, 2)) * 0.25
    boxes = np.concatenate([start, stop], axis=2) * np.tile(sizes, 2)[:, None]
    np.save(folder / "test_sizes.npy", sizes.astype(np.int32))
    np.save(folder / "test_boxes.npy", boxes.astype(np.float32))
    np.save(folder / "test_labels.npy", rng.integers(0, LABELS, (images, regions)))
    np.save(folder / "test_scores.npy", rng.random((images, regions), dtype=np.float32))
    vocabulary = np.array([f"word{number}" for number in range(_VOCABULARY)])
    captions = [
        " ".join(rng.choice(vocabulary, rng.integers(SHORTEST, LONGEST + 1)))
        for _ in range(images * _PER_IMAGE)
    ]
    for name, lines in {
        "objects_vocab.txt": [f"word{label % _VOCABULARY} {label}" for label in range(LABELS)],
        "test_caps.txt": captions,
        "test_ids.txt": [f"image{image}" for image in range(images)],
    }.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return open_split(folder, "test", num_regions=regions)


def as_dataset(
    split: Split, *, region_dropout: float = 0.0, text_dim: int | None = None
) -> tuple[RetrievalDataset, CaptionTokenizer]:
    """The split's pairs, and the tokenizer, trained on its captions.

    Args:
        split: of `write_split`.
        region_dropout: as in `RetrievalDataset`.
        text_dim: width of random word vectors that stand for those of a frozen text encoder, as
            the cache gives them; None leaves them out.
    """
    text = TextConfig(scratch_vocabulary=4 * _VOCABULARY)
    tokenizer = load_tokenizer(text, train_captions=split.captions, max_tokens=64, graph="dense")
    tokens = tokenizer.encode(split.captions)
    features = None
    if text_dim is not None:
        offsets = np.concatenate([[0], np.cumsum(tokens.num_words, dtype=np.int64)])
        rng = np.random.default_rng(1)
        values = rng.standard_normal((offsets[-1], text_dim), dtype=np.float32)
        features = WordFeatures(values, offsets)
    dataset = RetrievalDataset(
        split, tokens, tokenizer, region_dropout=region_dropout, word_features=features
    )
    return dataset, tokenizer
