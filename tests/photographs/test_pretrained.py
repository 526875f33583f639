"""Models that are not there, are something else, or are damaged."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cpfean.errors import CheckpointError
from cpfean.photographs.extractor import ExtractionSettings, RegionExtractor
from cpfean.photographs.model_files import find_model

Made = Callable[[str], Path]
Damage = Callable[[Path], object]


def load(folder: Path | str) -> RegionExtractor:
    settings = ExtractionSettings(detector="grid", backbone=str(folder))
    return RegionExtractor(settings, device=torch.device("cpu"))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def config(**changes: object) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    return damage


def renamed(old: str, new: str) -> Damage:
    return lambda folder: (folder / old).rename(folder / new)


def shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:9],
        "model-00002-of-00002.safetensors": names[9:],
    }
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, metadata={"format": "pt"})
    listed = {name: file for file, own in parts.items() for name in own}
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def shard_elsewhere(folder: Path) -> None:
    shards(folder)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text("utf-8"))
    index["weight_map"][next(iter(index["weight_map"]))] = "../other.safetensors"
    path.write_text(json.dumps(index), "utf-8")


def huge(folder: Path) -> None:
    """An image processor that would ask for 120 GB."""
    path = folder / "preprocessor_config.json"
    size = {"height": 100_000, "width": 100_000}
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"crop_size": size}), "utf-8")


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda f: (f / "config.json").unlink(), r"config.json: missing"),
        (lambda f: (f / "config.json").write_text("{"), r"config.json: cannot be read"),
        (config(model_type=None), "expected the model_type"),
        (config(model_type="roberta", vocab_size=9), "expected a vision backbone.*'roberta'"),
        (config(model_type="dinov9"), "expected a model that transformers knows, found .*dinov9"),
        (config(quantization_config={"bits": 4}), "quantized weights"),
        (config(num_hidden_layers=3), r"the weights lack encoder.layer.2.*and \d+ more"),
        (config(hidden_size=32), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "with model.safetensors, found none"),
        (renamed("model.safetensors", "pytorch_model.bin"), "found pytorch_model.bin.*save_pre"),
        (lambda f: os.truncate(f / "model.safetensors", 9000), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded"),
        (pipe, "found a named pipe"),
        (shard_elsewhere, r"found '../other.safetensors'"),
        (weights(lambda t: t.pop("layernorm.weight")), "the weights lack layernorm.weight"),
        (weights(lambda t: t["layernorm.weight"].fill_(torch.nan)), "not finite"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "expected preprocessor_config.json"),
        (lambda f: (f / "preprocessor_config.json").write_text("[]"), "no image processor"),
        (huge, "expected sizes from 1 to 4,096 pixels, found 100000"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "found an adapter"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Damage, part: str, made: Made, tmp_path: Path) -> None:
    shutil.copytree(made("dinov2"), tmp_path / "it")
    damage(tmp_path / "it")
    with pytest.raises(CheckpointError, match=part) as caught:
        load(tmp_path / "it")
    assert str(tmp_path / "it") in str(caught.value)


def test_code_beside_the_weights_is_not_run(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made("dinov2"), tmp_path / "it")
    (tmp_path / "it/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n", "utf-8")
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    config(model_type="evil", auto_map=auto)(tmp_path / "it")
    with pytest.raises(CheckpointError, match="code of its own that is not run"):
        load(tmp_path / "it")
    settings = ExtractionSettings(detector=str(tmp_path / "it"), features="detector")
    with pytest.raises(CheckpointError, match="code of its own that is not run"):
        RegionExtractor(settings, device=torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("/no/such/folder", "no such folder; check the path"),
        ("./rtdetr", "no such folder; check the path"),
        ("a/b/c", "no such folder; check the path"),
        ("no such name", "no such folder; check the path"),
        ("someone/never-fetched", "HF_HUB_OFFLINE is set.*hf download someone/never-fetched"),
        ("someone/never-fetched@v2", r"hf download someone/never-fetched --revision v2"),
    ],
)
def test_a_name_of_nothing_says_what_was_looked_for(name: str, part: str) -> None:
    with pytest.raises(CheckpointError, match=part):
        find_model(name, what="detector")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="expected a folder, found a file"):
        find_model(str(tmp_path / "model.safetensors"), what="detector")


def test_shards_give_what_one_file_gives(
    made: Made, tmp_path: Path, photographs: list[np.ndarray]
) -> None:
    shutil.copytree(made("dinov2"), tmp_path / "it")
    shards(tmp_path / "it")
    for one, other in zip(
        load(made("dinov2"))(photographs), load(tmp_path / "it")(photographs), strict=True
    ):
        np.testing.assert_array_equal(one.features, other.features)


def test_the_hash_is_that_of_the_file(made: Made) -> None:
    files = find_model(str(made("dinov2")), what="backbone")
    content = (made("dinov2") / "model.safetensors").read_bytes()
    assert files.sha256 == hashlib.sha256(content).hexdigest()


def test_a_pooling_head_that_is_missing_is_not_missed(made: Made) -> None:
    assert "pooler.dense.weight" not in load_file(made("vit") / "model.safetensors")
    assert load(made("vit")).feature_dim == 16


_FROM_THE_CACHE = """
import sys
from cpfean.photographs.model_files import find_model
files = find_model(sys.argv[1], what="backbone")
print(files.revision, files.kind, files.sha256[:8])
"""


@pytest.mark.long
def test_a_name_in_the_hubs_cache_is_found_with_its_commit(made: Made, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    home = tmp_path / "hub/models--someone--dinov2-tiny"
    shutil.copytree(made("dinov2"), home / f"snapshots/{commit}")
    (home / "refs").mkdir()
    (home / "refs/main").write_text(commit, "utf-8")
    sha256 = find_model(str(made("dinov2")), what="backbone").sha256
    for name in ("someone/dinov2-tiny", f"someone/dinov2-tiny@{commit}"):
        done = subprocess.run(
            [sys.executable, "-c", _FROM_THE_CACHE, name],
            env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            encoding="utf-8",
        )
        assert done.stdout.split() == [commit, "dinov2", sha256[:8]], done.stderr
