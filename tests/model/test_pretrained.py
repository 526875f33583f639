"""Text encoders of others: sound ones are taken as they are, damaged ones refused by file."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cpfean.config import TextConfig
from cpfean.errors import ConfigError
from cpfean.model.pretrained import read_encoder
from cpfean.model.text_encoder import TextBackbone
from tests.model.encoders import (
    NESTED,
    PIECES,
    Damage,
    content,
    cut,
    in_place_of,
    setting,
    shards,
    sparse,
    weights,
    without,
    write_encoder,
)

Tensors = dict[str, Tensor]
TABLE = "embeddings.word_embeddings.weight"
QUERY = "encoder.layer.1.attention.self.query.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "bert"))


def build(folder: Path) -> TextBackbone:
    return TextBackbone.build(TextConfig(encoder=str(folder)), vocab_size=len(PIECES), pad_id=0)


def lacking(name: str) -> Damage:
    return weights(lambda tensors: {k: v for k, v in tensors.items() if k != name})


def with_one(name: str, value: float) -> Damage:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[-1] = value
        return tensors

    return weights(change)


def of_type(dtype: torch.dtype) -> Damage:
    return weights(lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})


def renamed(pattern: str) -> Damage:
    return weights(lambda tensors: {pattern.format(k): v for k, v in tensors.items()})


def old_names(tensors: Tensors) -> Tensors:
    spelled = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in spelled.items():
            name = name.replace(new, old)
        renamed[f"bert.{name}"] = tensor
    return renamed | {"cls.predictions.bias": torch.zeros(len(PIECES))}


def index_of(file: str) -> object:
    return lambda names: {"metadata": {}, "weight_map": dict.fromkeys(names, file)}


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGED: dict[str, tuple[Damage, str]] = {
    # config.json
    "no config": (without("config.json"), "it has no config.json"),
    "config not JSON": (content("config.json", "{"), "config.json: cannot be read: no JSON"),
    "config a list": (content("config.json", "[]"), "expected a JSON object, found a list"),
    "config null": (content("config.json", "null"), "expected a JSON object, found null"),
    "config nested": (content("config.json", NESTED), "nested too deeply|found a list"),
    "config huge": (sparse("config.json"), "expected at most 16,777,216 bytes"),
    "config a FIFO": (in_place_of("config.json", os.mkfifo), "found a named pipe"),
    "no type": (setting(model_type=None), "expected the model_type .* found None"),
    "unknown type": (setting(model_type="bort"), "expected the model_type .* found 'bort'"),
    "another type": (setting(model_type="gpt2"), "expected a BERT-type encoder"),
    "no BERT": (setting(model_type="distilbert"), "expected a BERT-type encoder"),
    "decoder": (setting(is_decoder=True), "found a decoder"),
    "quantized": (setting(quantization_config={"bits": 4}), "quantization_config is not supp"),
    "foreign attention": (setting(attn_implementation="some/kernel"), "'some/kernel' is not supp"),
    "weights elsewhere": (setting(transformers_weights="../x.safetensors"), "transformers_weights"),
    "method as a setting": (setting(to_dict="no"), "'to_dict' is no setting"),
    "negative width": (setting(hidden_size=-8), "hidden_size must be a whole number"),
    "width a text": (setting(hidden_size="8"), "hidden_size|no configuration of a bert"),
    "huge width": (setting(hidden_size=10**9), "hidden_size is|is of another encoder"),
    "huge number": (setting(hidden_size=10**30), "hidden_size must be a whole number"),
    "huge vocabulary": (setting(vocab_size=10**9), r"word_embeddings.* not F32 \[1000000000, 8\]"),
    "million layers": (setting(num_hidden_layers=10**6), "num_hidden_layers = 1,000,000"),
    "no layers": (setting(num_hidden_layers=0), "num_hidden_layers must be"),
    "heads do not divide": (setting(num_attention_heads=3), "multiple of num_attention_heads"),
    "no heads": (setting(num_attention_heads=0), "num_attention_heads must be"),
    "no places": (setting(max_position_embeddings=0), "max_position_embeddings must be"),
    "other places": (setting(max_position_embeddings=32), "position_embeddings.* not F32"),
    "dropout": (setting(hidden_dropout_prob=7.0), "no encoder can be built|no configuration"),
    "activation": (setting(hidden_act="jump"), "no encoder can be built: .*jump"),
    "epsilon": (setting(layer_norm_eps=-1.0), "layer_norm_eps must be"),
    "more layers": (setting(num_hidden_layers=3), "lacks encoder.layer.2.*are not made up"),
    "fewer layers": (setting(num_hidden_layers=1), "more than config.json tells of"),
    # weights
    "no weights": (without("model.safetensors"), "it has no model.safetensors"),
    "empty": (cut("model.safetensors", to=0), "found an empty file"),
    "headerless": (cut("model.safetensors", to=8), "found something else"),
    "cut in the header": (cut("model.safetensors", to=200), "200 bytes, cut short"),
    "cut in the numbers": (cut("model.safetensors", to=9000), "9,000 bytes"),
    "terabytes": (sparse("model.safetensors"), "model.safetensors: damaged"),
    "other bytes": (content("model.safetensors", "x" * 99), "found something else"),
    "a pointer": (content("model.safetensors", "version https://git-lfs\n"), "pointer of Git LFS"),
    "huge header": (
        content("model.safetensors", (2**27).to_bytes(8, "little") + b"{" + b" " * 2**27),
        "a header of at most",
    ),
    "nested header": (
        content("model.safetensors", (5000).to_bytes(8, "little") + b'{"a":' * 1000),
        "model.safetensors: damaged",
    ),
    "weights a FIFO": (in_place_of("model.safetensors", os.mkfifo), "found a named pipe"),
    "weights a folder": (in_place_of("model.safetensors", Path.mkdir), "found a folder"),
    "weights a device": (
        in_place_of("model.safetensors", lambda path: path.symlink_to("/dev/zero")),
        "found a device",
    ),
    "weights a dangling link": (
        in_place_of("model.safetensors", lambda path: path.symlink_to("nowhere")),
        "leads nowhere",
    ),
    "a pickle": (pickled, "found pytorch_model.bin, which can hold more than numbers"),
    "an adapter": (adapter, "found an adapter"),
    "missing weight": (lacking(QUERY), f"lacks {QUERY}; weights are not made up"),
    "missing table": (lacking(TABLE), f"lacks {TABLE}"),
    "unknown weight": (
        weights(lambda tensors: tensors | {"encoder.layer.7.bias": torch.zeros(2)}),
        r"more than config.json tells of \(encoder.layer.7.bias\)",
    ),
    "foreign names": (renamed("module.{}"), "lacks"),
    "integers": (of_type(torch.int32), r"is I32 .* and not F32"),
    "bytes": (of_type(torch.float8_e4m3fn), r"is F8_E4M3 .* and not F32"),
    "NaN": (with_one(QUERY, float("nan")), f"{QUERY} has 1 numbers that are not finite"),
    "infinity": (with_one(TABLE, float("inf")), f"{TABLE} has 1 numbers that are not finite"),
    # shards
    "index a list": (shards([]), "index.json: cannot be read: expected a JSON object"),
    "index without a map": (shards({"metadata": {}}), "expected a weight_map"),
    "index without metadata": (shards({"weight_map": {}}), "expected metadata"),
    "index leads away": (shards(index_of("../part.safetensors")), "files of weights beside it"),
    "index of numbers": (
        shards({"metadata": {}, "weight_map": {TABLE: 7}}),
        "files of weights beside it",
    ),
    "index to nothing": (shards(index_of("other.safetensors")), "it has no other.safetensors"),
    "index lacks some": (
        shards({"metadata": {}, "weight_map": {TABLE: "part.safetensors"}}),
        "the weights are 1 tensors",
    ),
    "index names more": (
        shards({"metadata": {}, "weight_map": {"more": "part.safetensors"}}),
        "expected more in part.safetensors",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_encoder_is_refused_before_it_is_loaded(damage: str, folder: Path) -> None:
    spoil, told = DAMAGED[damage]
    spoil(folder)
    started = time.monotonic()
    with pytest.raises(ConfigError, match=told) as refusal:
        read_encoder(str(folder)).check_finite()
    assert time.monotonic() - started < 5
    assert str(folder) in str(refusal.value)
    # What the look at the files refuses, workers refuse too.
    with pytest.raises(ConfigError):
        build(folder)


SOUND: dict[str, Damage] = {
    "as it is": lambda folder: None,
    "half precision": of_type(torch.float16),
    "bfloat16": of_type(torch.bfloat16),
    "saved with heads": renamed("bert.{}"),
    "of BERT's first release": weights(old_names),
    "with positions": weights(
        lambda tensors: tensors | {"embeddings.position_ids": torch.arange(64)[None]}
    ),
    "without a pooling layer": weights(
        lambda tensors: {k: v for k, v in tensors.items() if "pooler" not in k}
    ),
    "in shards": shards(index_of("part.safetensors")),
    "for many labels": setting(num_labels=10**9),
}


@pytest.mark.parametrize("change", SOUND)
def test_a_sound_encoder_is_taken_with_its_own_weights(
    change: str, sound: Path, folder: Path
) -> None:
    SOUND[change](folder)
    read_encoder(str(folder)).check_finite()
    expected = load_file(sound / "model.safetensors")
    half = {"half precision": torch.float16, "bfloat16": torch.bfloat16}.get(change, torch.float32)
    for name, tensor in build(folder).encoder.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].to(half).float(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["roberta", "mpnet", "xlm-roberta", "camembert", "ernie"])
def test_encoders_of_the_same_family_are_taken(kind: str, tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / kind, kind=kind)
    files = read_encoder(str(folder))
    files.check_finite()
    # RoBERTa and its kin leave the places up to the padding's unused.
    assert build(folder).num_places == (64 if kind == "ernie" else 62)


def test_looking_at_an_encoder_draws_nothing(sound: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    read_encoder(str(sound)).check_finite()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_file_or_a_path_in_place_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder, found a file"):
        read_encoder(str(folder / "config.json"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        read_encoder(str(folder / "nothing"))


def test_a_name_whose_files_are_in_the_cache_is_looked_at_as_a_folder_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    snapshot = cache / "models--somebody--tiny" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    assert set(read_encoder("somebody/tiny").tensors) == set(read_encoder(str(folder)).tensors)
    lacking(QUERY)(snapshot)
    with pytest.raises(ConfigError, match=f"lacks {QUERY}"):
        read_encoder("somebody/tiny")


def test_a_frozen_encoder_goes_by_the_weights_it_was_loaded_with(folder: Path) -> None:
    def frozen() -> TextBackbone:
        config = TextConfig(encoder=str(folder), trainable=False)
        return TextBackbone.build(config, vocab_size=len(PIECES), pad_id=0)

    sound = frozen()
    known = sound.fingerprint()
    assert frozen().fingerprint() == known
    # A process that holds a share of the weights has no others to find it from.
    assert sound.to("meta").fingerprint() == known
    with_one(QUERY, 3.0)(folder)
    assert frozen().fingerprint() != known
    with pytest.raises(ValueError, match="only a frozen encoder"):
        build(folder).fingerprint()
