"""A tiny text encoder as a folder, and what can be done to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
PIECES += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + [".", ",", "dog", "beach"]

Damage = Callable[[Path], None]


def write_encoder(folder: Path, *, kind: str = "bert", **sizes: int) -> Path:
    """Saves an encoder with weights of its own, and its tokenizer."""
    from transformers import AutoConfig, AutoModel, BertTokenizerFast

    wanted = {
        "vocab_size": len(PIECES),
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(kind, **wanted | sizes))
    model.save_pretrained(folder)
    vocabulary = {piece: i for i, piece in enumerate(PIECES)}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return folder


def setting(**values: Any) -> Damage:
    """Other settings in config.json."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")

    return damage


def content(name: str, text: str | bytes) -> Damage:
    """Another content of a file."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return damage


def weights(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Damage:
    """Other tensors, in a file that is whole."""

    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = dict(change(load_file(path)))
        path.unlink()
        save_file(tensors, path, metadata=metadata)

    return damage


def without(*names: str) -> Damage:
    """No such files."""

    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return damage


def in_place_of(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else than a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def cut(name: str, *, to: int) -> Damage:
    """The first bytes alone."""

    def damage(folder: Path) -> None:
        os.truncate(folder / name, to)

    return damage


def sparse(name: str) -> Damage:
    """A file of terabytes that takes no room, its beginning left as it was."""

    def damage(folder: Path) -> None:
        os.truncate(folder / name, 2**41)

    return damage


def shards(index: object, *, file: str = "part.safetensors") -> Damage:
    """The weights in a file of another name, and an index that may lead to it."""

    def damage(folder: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").rename(folder / file)
        listed = index(names) if callable(index) else index
        text = json.dumps(listed)
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    return damage


NESTED = "[" * 1000 + "]" * 1000
