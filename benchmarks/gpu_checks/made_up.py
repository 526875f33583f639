"""Made-up data, a small frozen text encoder and a small configuration: nothing in them is dropped.

What two devices draw at random differs, so what is compared across devices has no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from cpfean.config import ExperimentConfig, SyntheticConfig
from cpfean.data.synthetic import write_synthetic

_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, kw_only=True)
class MadeUp:
    """Where it is, and how to train on it.

    Attributes:
        data: folder in the native format.
        config: of a training of two epochs.
    """

    data: Path
    config: ExperimentConfig


def make_up(folder: Path) -> MadeUp:
    """Writes data and encoder, or finds those that an earlier section has written."""
    data, encoder = folder / "made-up", folder / "encoder"
    synthetic = SyntheticConfig(train_images=60, dev_images=20, test_images=20)
    if not data.exists():
        write_synthetic(data, synthetic)
        _write_encoder(encoder, (data / "train_caps.txt").read_text(encoding="utf-8"))
    config = ExperimentConfig().with_overrides(
        {
            "data.num_regions": synthetic.num_regions,
            "data.word_noise": 0.0,
            "model.dim": 64,
            "model.regions.dropout": 0.0,
            "model.text.encoder": str(encoder),
            "model.text.trainable": False,
            "optim.batch_size": 32,
            "optim.epochs": 2,
            "optim.precision": "fp32",
        }
    )
    return MadeUp(data=data, config=config)


def _write_encoder(folder: Path, captions: str) -> None:
    """A BERT of random weights that knows the captions' words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    pieces = [*_SPECIALS, *sorted({word for word in captions.lower().split() if word.isalpha()})]
    torch.manual_seed(0)
    sizes = BertConfig(
        vocab_size=len(pieces),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
    )
    BertModel(sizes).save_pretrained(folder)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
