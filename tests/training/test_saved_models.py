"""Saved models and checkpoints that are damaged, odd or hostile: refused from their headers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cpfean.data.tokens import CaptionTokenizer
from cpfean.errors import CheckpointError, ConfigError
from cpfean.metrics.retrieval import RetrievalMetrics
from cpfean.model.cpfean import Cpfean
from cpfean.training.checkpoint import Checkpoint, newest_valid
from cpfean.training.loop import EpochReport, fit
from cpfean.training.setup import evaluate_checkpoint
from tests.model.encoders import (
    NESTED,
    PIECES,
    Damage,
    content,
    cut,
    in_place_of,
    setting,
    sparse,
    weights,
    without,
    write_encoder,
)
from tests.training.tiny import save_untrained, tiny_experiment

CPU = torch.device("cpu")
FC_W = "word_projection.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    return save_untrained(tiny_experiment(), data_folder, folder)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def evaluated(folder: Path, data_folder: Path) -> RetrievalMetrics:
    return evaluate_checkpoint(
        folder,
        data_folder=data_folder,
        split="test",
        protocol="full",
        cache_dir=folder.parent / "cache",
        device=CPU,
        num_regions=8,
    )


def nested(part: str, **values: Any) -> Damage:
    """Other values in a part of config.json."""

    def damage(folder: Path) -> None:
        plain = json.loads((folder / "config.json").read_text("utf-8"))
        at = plain
        for name in part.split("."):
            at = at[name]
        at.update(values)
        (folder / "config.json").write_text(json.dumps(plain), "utf-8")

    return damage


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return weights(lambda tensors: tensors | {name: change(tensors[name])})


def poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def lacking(name: str) -> Damage:
    return weights(lambda tensors: {k: v for k, v in tensors.items() if k != name})


def without_labels(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if not k.startswith(("labels.", "text_prior."))}


def another_vocabulary(folder: Path) -> None:
    """Of as many pieces, two of them exchanged."""
    path = folder / "tokenizer" / "tokenizer.json"
    plain = json.loads(path.read_text("utf-8"))
    vocabulary = plain["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(plain), "utf-8")


def smaller_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    plain = json.loads(path.read_text("utf-8"))
    plain["model"]["vocab"].popitem()
    path.write_text(json.dumps(plain), "utf-8")
    settings = folder / "tokenizer" / "caption_tokenizer.json"
    kept = json.loads(settings.read_text("utf-8"))
    del kept["vocabulary_sha256"]  # as older releases wrote it
    settings.write_text(json.dumps(kept), "utf-8")


def tokenizer_setting(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "tokenizer" / "caption_tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")

    return damage


TEXT = "text_encoder"
TABLE = "backbone.encoder.embeddings.word_embeddings.weight"
DAMAGED: dict[str, tuple[Damage, str]] = {
    # config.json as a file
    "no config": (without("config.json"), "config.json: missing"),
    "config null": (content("config.json", "null"), "found null"),
    "config a list": (content("config.json", "[]"), "found a list"),
    "config nested": (content("config.json", NESTED), "nested too deeply|found a list"),
    "config terabytes": (sparse("config.json"), "expected at most"),
    "config a FIFO": (in_place_of("config.json", os.mkfifo), "found a named pipe"),
    "config of bytes": (content("config.json", b"\xff\xfe"), "cannot be read"),
    # what it says
    "another format": (setting(format=99), "format 99"),
    "no model": (setting(model=None), "not a saved model"),
    "unknown setting": (nested("model", depth=3), "no setting 'model.depth'"),
    "another width": (nested("model", dim=64), "weights of another model"),
    "negative width": (nested("model", dim=-32), "model.dim must be"),
    "many layers": (nested("model.regions", layers=10**6), "model.regions.layers must be"),
    "another depth": (nested("model.regions", layers=2), "weights of another model"),
    "no depth": (nested("model.words", layers=0), "weights of another model: an unknown word_"),
    "another alignment": (nested("model.alignment", kind="hard_coding"), "of another model"),
    "inputs null": (setting(inputs=None), "inputs must be"),
    "huge features": (nested("inputs", feature_dim=10**9), "weights of another model"),
    "negative features": (nested("inputs", feature_dim=-1), "inputs.feature_dim must be"),
    "boxes a number": (nested("inputs", has_boxes=1), "inputs.has_boxes must be"),
    "without boxes": (nested("inputs", has_boxes=False), "an unknown image_encoder.geometry"),
    "labels a text": (nested("inputs", label_names="dog"), "inputs.label_names must be"),
    "other labels": (nested("inputs", label_names=["dog", "cat"]), "2 labels"),
    "no labels": (nested("inputs", label_names=None), "0 labels, and the model has embeddings"),
    "labels without vectors": (weights(without_labels), "the model has no embeddings of labels"),
    "frozen": (setting(text_fingerprint="0" * 16), "a frozen text encoder alone"),
    # its text encoder
    "no encoder": (setting(text_encoder=None), "describes no text encoder"),
    "another type": (nested(TEXT, model_type="roberta"), "not the one that model.saf"),
    "no type": (nested(TEXT, model_type="gpt2"), "expected a BERT-type encoder"),
    "a million layers": (nested(TEXT, num_hidden_layers=10**6), "num_hidden_layers = 1,000,000"),
    "another encoder": (nested(TEXT, num_hidden_layers=2), "weights of another model"),
    "encoder's width": (nested(TEXT, hidden_size=10**8), "weights of another model"),
    "encoder's vocabulary": (nested(TEXT, vocab_size=10**9), "weights of another model"),
    "encoder's places": (nested(TEXT, max_position_embeddings=7), "weights of another model"),
    "encoder's heads": (nested(TEXT, num_attention_heads=5), "multiple of num_attention_heads"),
    "encoder's other heads": (nested(TEXT, num_attention_heads=2), "not the one that model.saf"),
    "another temperature": (nested("model.alignment", word_temperature=3), "not the one that"),
    "another threshold": (nested("model.regions", iou_threshold=0.9), "not the one that model"),
    # its weights
    "no weights": (without("model.safetensors"), "model.safetensors: missing"),
    "weights cut": (cut("model.safetensors", to=5000), "model.safetensors: damaged"),
    "weights a FIFO": (in_place_of("model.safetensors", os.mkfifo), "found a named pipe"),
    "weights terabytes": (sparse("model.safetensors"), "model.safetensors: damaged"),
    "lacking": (lacking(FC_W), f"weights of another model: no {FC_W}"),
    "more": (
        weights(lambda tensors: tensors | {"more": torch.ones(1)}),
        "weights of another model: an unknown more",
    ),
    "integers": (tensor(FC_W, Tensor.long), f"{FC_W} is I64"),
    "half": (tensor(FC_W, Tensor.half), f"{FC_W} is F16"),
    "double": (tensor(FC_W, Tensor.double), f"{FC_W} is F64"),
    "another shape": (tensor(FC_W, lambda t: t.T.reshape(-1)), f"{FC_W} is F32"),
    "NaN": (tensor(FC_W, poisoned(float("nan"))), f"{FC_W} has 1 numbers that are not finite"),
    "infinity": (tensor(TABLE, poisoned(-float("inf"))), f"{TABLE} has 1 numbers"),
    "label pieces": (tensor("labels.pieces", poisoned(10**6)), "labels.pieces are not among"),
    # its tokenizer
    "no tokenizer": (
        lambda folder: shutil.rmtree(folder / "tokenizer"),
        "caption_tokenizer.json: missing",
    ),
    "no vocabulary": (without("tokenizer/tokenizer.json"), "expected one of tokenizer.json"),
    "vocabulary nested": (content("tokenizer/tokenizer.json", NESTED), "tokenizer cannot be read"),
    "vocabulary a FIFO": (
        in_place_of("tokenizer/tokenizer.json", os.mkfifo),
        "found a named pipe",
    ),
    "another vocabulary": (another_vocabulary, "not the one that was saved"),
    "a smaller vocabulary": (smaller_vocabulary, "it expects .* word pieces, found"),
    "settings null": (content("tokenizer/caption_tokenizer.json", "null"), "found null"),
    "tokens": (tokenizer_setting(max_tokens=10**9), "max_tokens must be from 4 to 1000"),
    "more tokens than places": (tokenizer_setting(max_tokens=900), "at most 512 pieces, found 900"),
    "units": (tokenizer_setting(units="pieces"), "model.text.units = 'words', found 'pieces'"),
    "graph": (tokenizer_setting(graph="window"), "model.words.graph = 'dense', found 'window'"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_model_that_is_not_what_was_saved_is_refused(
    damage: str, folder: Path, data_folder: Path
) -> None:
    spoil, told = DAMAGED[damage]
    spoil(folder)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=told) as refusal:
        evaluated(folder, data_folder)
    assert time.monotonic() - started < 5
    assert str(folder) in str(refusal.value)


def test_the_memory_for_a_model_is_not_taken_from_its_description(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested("text_encoder", vocab_size=10**9)(folder)
    allocate = torch.empty

    def limited(*sizes: Any, **more: Any) -> Tensor:
        result = allocate(*sizes, **more)
        assert result.is_meta or result.numel() < 10**7
        return result

    monkeypatch.setattr(torch, "empty", limited)
    with pytest.raises(CheckpointError):
        Cpfean.from_pretrained(folder)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_model_on_an_encoder_of_others_comes_back(
    trainable: bool, tmp_path: Path, data_folder: Path
) -> None:
    encoder = write_encoder(tmp_path / "bert")
    text = {"model.text.encoder": str(encoder), "model.text.trainable": trainable}
    config = tiny_experiment().with_overrides(text | {"data.word_noise": 0, "data.max_tokens": 60})
    folder = save_untrained(config, data_folder, tmp_path / "model")
    first = evaluated(folder, data_folder)
    assert evaluated(folder, data_folder) == first
    # A frozen encoder stays where it is, and is looked at there.
    weights(lambda tensors: {k: v * float("nan") for k, v in tensors.items()})(encoder)
    if trainable:
        assert evaluated(folder, data_folder) == first
    else:
        with pytest.raises(ConfigError, match="not finite"):
            evaluated(folder, data_folder)


def test_a_tokenizer_with_more_pieces_than_the_encoder_is_refused(
    tmp_path: Path, data_folder: Path
) -> None:
    encoder = write_encoder(tmp_path / "bert", vocab_size=len(PIECES) - 1)
    config = tiny_experiment().with_overrides(
        {"model.text.encoder": str(encoder), "data.max_tokens": 60}
    )
    with pytest.raises(ConfigError, match="knows 60 word pieces, its tokenizer makes 61"):
        save_untrained(config, data_folder, tmp_path / "model")


class Recorder:
    """Saves every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def report(self, report: EpochReport, checkpoint: Checkpoint | None) -> None:
        assert checkpoint is not None
        checkpoint.save(self.folder / f"epoch-{report.epoch}")


def train(folder: Path, data_folder: Path, resume_from: Path | None = None) -> None:
    fit(
        tiny_experiment().with_overrides({"optim.epochs": 1 if resume_from is None else 2}),
        data_folder=data_folder,
        cache_dir=folder,
        reporter=Recorder(folder),
        device=CPU,
        resume_from=resume_from,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    train(folder, data_folder)
    return folder / "epoch-1"


def sealed(folder: Path) -> None:
    """Describes the files as they are now, as somebody who means harm would."""
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}), "utf-8")


def state(**values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")

    return damage


def in_file(name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = change(load_file(folder / name))
        (folder / name).unlink()
        save_file(tensors, folder / name)

    return damage


def spoilt(name: str, key: str, change: Callable[[Tensor], Tensor]) -> Damage:
    return in_file(name, lambda tensors: tensors | {key: change(tensors[key])})


MODEL, BEST, ADAM = "model.safetensors", "best/model.safetensors", "optimizer.safetensors"
STATES: dict[str, tuple[Damage, str]] = {
    "state null": (content("state.json", "null"), "found null"),
    "state nested": (content("state.json", NESTED), "nested too deeply|found a list"),
    "no epoch": (state(epoch=None), "epoch cannot be so"),
    "epoch a text": (state(epoch="2"), "epoch cannot be so|not a checkpoint's state"),
    "epoch negative": (state(epoch=-1), "epoch cannot be so"),
    "underway a list": (state(underway=[1]), "not a checkpoint's state"),
    "underway unknown": (state(underway={"more": 1}), "not a checkpoint's state"),
    "history a number": (state(history=7), "not a checkpoint's state"),
    "history of lists": (state(history=[[]]), "history cannot be so"),
    "more history": (state(history=[{}] * 9), "the number of epochs cannot be so"),
    "config null": (state(config=None), "not a checkpoint's state"),
    "config unknown": (state(config={"modl": {}}), "no setting 'modl'"),
    "config hostile": (state(config={"model": {"dim": 10**9}}), "model.dim must be"),
    "format": (state(format="x" * 1000), "checkpoint format"),
    "fingerprint": (state(data_fingerprint=3), "data_fingerprint cannot be so"),
}
TENSORS: dict[str, tuple[Damage, str]] = {
    "integers": (spoilt(MODEL, FC_W, Tensor.int), f"{FC_W} is I32"),
    "NaN": (spoilt(MODEL, FC_W, poisoned(float("nan"))), f"{FC_W} has 1 numbers"),
    "lacking": (in_file(MODEL, lambda t: {"a": torch.ones(1)}), "weights of another model"),
    "best NaN": (spoilt(BEST, FC_W, poisoned(float("nan"))), f"{FC_W} has 1 numbers"),
    "best lacking": (in_file(BEST, lambda t: {"a": torch.ones(1)}), "weights of another model"),
    "moments NaN": (spoilt(ADAM, "0.exp_avg", poisoned(float("nan"))), "0.exp_avg has 1 numbers"),
    "moments integers": (spoilt(ADAM, "0.exp_avg", Tensor.int), "moments of another model"),
    "moments of more": (
        in_file(ADAM, lambda tensors: tensors | {"999.exp_avg": torch.ones(1)}),
        "moments of another model: 999.exp_avg",
    ),
    "moments unnumbered": (
        in_file(ADAM, lambda tensors: tensors | {"exp_avg": torch.ones(1)}),
        "moments of another model: exp_avg",
    ),
    "moments lacking": (
        in_file(ADAM, lambda tensors: {k: v for k, v in tensors.items() if k != "0.step"}),
        "moments are missing",
    ),
    "groups null": (state(optimizer_groups=None), "optimizer_groups"),
    "groups of numbers": (state(optimizer_groups=[1, 2]), "optimizer_groups"),
    "rates": (
        lambda folder: state(
            optimizer_groups=[
                group | {"initial_lr": 9.0}
                for group in json.loads((folder / "state.json").read_text("utf-8"))[
                    "optimizer_groups"
                ]
            ]
        )(folder),
        "optimizer_groups",
    ),
}


@pytest.mark.parametrize("damage", [*STATES, *TENSORS])
def test_a_checkpoint_that_no_training_wrote_is_refused(
    damage: str, trained: Path, tmp_path: Path, data_folder: Path
) -> None:
    spoil, told = (STATES | TENSORS)[damage]
    folder = Path(shutil.copytree(trained, tmp_path / "epoch-1"))
    spoil(folder)
    sealed(folder)
    with pytest.raises(CheckpointError, match=told):
        train(tmp_path, data_folder, resume_from=folder)
    if damage in STATES:  # found by whoever looks for the newest one
        assert newest_valid([folder]) is None


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (content("manifest.json", NESTED), "nested too deeply|found a list"),
        (content("manifest.json", '{"files": {"state.json": 3}}'), "not a checkpoint's manifest"),
        (in_place_of("model.safetensors", os.mkfifo), "found a named pipe"),
        (in_place_of("state.json", lambda p: p.symlink_to("/dev/zero")), "found a device"),
    ],
)
def test_what_stands_in_place_of_a_file_is_not_waited_for(
    damage: Damage, told: str, trained: Path, tmp_path: Path, data_folder: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "epoch-1"))
    damage(folder)
    with pytest.raises(CheckpointError, match=told):
        train(tmp_path, data_folder, resume_from=folder)


def test_a_saved_model_and_tokenizer_of_older_releases_are_taken(
    folder: Path, data_folder: Path
) -> None:
    path = folder / "tokenizer" / "caption_tokenizer.json"
    settings = json.loads(path.read_text("utf-8"))
    del settings["vocabulary_sha256"]
    path.write_text(json.dumps(settings), "utf-8")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    assert CaptionTokenizer.load(folder / "tokenizer").max_tokens == 64
    assert evaluated(folder, data_folder).rsum > 0
