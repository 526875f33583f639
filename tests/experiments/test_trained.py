"""Commands on trained models, encoders and captions that do not do: an exit code, no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from cpfean.data.synthetic import write_synthetic
from tests.experiments.conftest import Run
from tests.model.encoders import (
    NESTED,
    Damage,
    content,
    in_place_of,
    setting,
    sparse,
    weights,
    without,
    write_encoder,
)
from tests.training.conftest import TINY
from tests.training.tiny import save_untrained, tiny_experiment

Called = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a model that was trained on it, and a text encoder."""
    home = tmp_path_factory.mktemp("trained")
    write_synthetic(home / "data", TINY)
    config = tiny_experiment().with_overrides({"data.path": str(home / "data")})
    save_untrained(config, home / "data", home / "model")
    write_encoder(home / "bert")
    (home / "tiny.toml").write_text(config.to_toml(), encoding="utf-8")
    return home


@pytest.fixture
def called(home: Path, run: Run) -> Called:
    """Runs a command there; gives its exit code and what it said."""

    def call(script: str, *words: str) -> tuple[int, str]:
        answer = run(script, *words, cwd=home)
        return answer.returncode, answer.stdout + answer.stderr

    return call


def toml(**changes: object) -> Damage:
    """Other settings in config.toml."""

    def damage(folder: Path) -> None:
        config = tiny_experiment().with_overrides({"data.path": str(folder.parent / "data")})
        changed = config.with_overrides({k.replace("__", "."): v for k, v in changes.items()})
        (folder / "config.toml").write_text(changed.to_toml(), encoding="utf-8")

    return damage


def not_finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v / 0 if v.is_floating_point() else v for k, v in tensors.items()}


@pytest.mark.parametrize("script", ["evaluate.py", "show.py"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (content("config.toml", "x = " + NESTED), "config.toml: not valid TOML"),
        (content("config.toml", "[model]\ndim = -1\n"), "model.dim must be"),
        (sparse("config.toml"), "config.toml: cannot be read: expected at most"),
        (in_place_of("config.toml", os.mkfifo), "is no folder of a finished run"),
        (toml(model__alignment__word_temperature=3), "not of one model: model.alignment.word_t"),
        (content("config.json", "null"), "found null"),
        (setting(format=7), "format 7"),
        (without("model.safetensors"), "model.safetensors: missing"),
        (weights(not_finite), "not finite"),
    ],
)
def test_a_model_that_does_not_do_is_refused(
    script: str, damage: Damage, told: str, called: Called, home: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    damage(model)
    code, said = called(script, str(model), "--data", str(home / "data"))
    assert (code, "Traceback" in said) == (5, False)
    assert told in said


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (setting(num_attention_heads=3), "multiple of num_attention_heads"),
        (without("tokenizer.json"), "expected one of tokenizer.json"),
        (weights(lambda t: {k: v * float("nan") for k, v in t.items()}), "not finite"),
        (weights(lambda t: dict(list(t.items())[:9])), "weights are not made up"),
    ],
)
def test_an_encoder_that_does_not_do_is_refused_before_a_run_is_begun(
    damage: Damage, told: str, called: Called, home: Path, tmp_path: Path
) -> None:
    encoder = Path(shutil.copytree(home / "bert", tmp_path / "bert"))
    damage(encoder)
    code, said = called("train.py", *begun(home, tmp_path, home / "data", encoder=encoder))
    assert (code, "Traceback" in said) == (2, False)
    assert told in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("max_tokens", [64, 65])
def test_an_encoder_has_to_have_a_place_for_every_piece(
    max_tokens: int, called: Called, home: Path, tmp_path: Path
) -> None:
    words = begun(home, tmp_path, home / "data", encoder=home / "bert")
    code, said = called("train.py", *words, "--set", f"data.max_tokens={max_tokens}", "--dry-run")
    assert code == (0 if max_tokens == 64 else 2)
    assert ("has places for 64" in said) == (max_tokens == 65)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_captions_of_another_script_are_refused_before_a_run_is_begun(
    split: str, called: Called, home: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(home / "data", tmp_path / "data"))
    captions = data / f"{split}_caps.txt"
    foreign = "\u0441\u043e\u0431\u0430\u043a\u0430\n" * len(captions.read_text().splitlines())
    captions.write_text(foreign, encoding="utf-8")
    code, said = called("train.py", *begun(home, tmp_path, data))
    assert (code, "Traceback" in said) == (3, False)
    assert f"{split}: the vocabulary knows no word of 30 of 30 captions (100 %)" in said
    assert not (tmp_path / "runs").exists()
    code, said = called("evaluate.py", str(home / "model"), "--data", str(data), "--split", split)
    assert (code, "Traceback" in said) == (3, False)
    assert "another language" in said
    code, said = called("validate.py", str(data))
    assert code == 0  # a pretrained encoder may know them
    assert f"{split}: the vocabulary knows no word of 30 of 30" in said


def test_very_long_captions_are_trained_on(
    called: Called, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = Path(shutil.copytree(home / "data", tmp_path / "data"))
    lines = (data / "train_caps.txt").read_text(encoding="utf-8").splitlines()
    lines[0], lines[7] = "a" * 900_000, "a dog " * 150_000
    (data / "train_caps.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, said = called("train.py", *begun(home, tmp_path, data))
    assert code == 0, said
    assert "1 of 80 captions were cut to 64 pieces" in caplog.text
    assert "knows no word of 1 of 80 captions (1.25 %): line 1 'aaa" in caplog.text
    results = json.loads((tmp_path / "runs" / "long" / "summary.json").read_text("utf-8"))
    assert results["test"]["rsum"] > 0


def begun(home: Path, output: Path, data: Path, *, encoder: Path | None = None) -> list[str]:
    words = ["--config", str(home / "tiny.toml"), "--data", str(data), "--epochs", "1"]
    words += ["--name", "long", "--output", str(output / "runs")]
    return words + ([] if encoder is None else ["--set", f"model.text.encoder={encoder}"])
