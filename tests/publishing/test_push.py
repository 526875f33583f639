"""A model's way to the Hub and back: real client, a hub in a folder, the same scores."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpfean.config import ExperimentConfig
from cpfean.errors import CheckpointError, ConfigError
from cpfean.model.cpfean import Cpfean
from cpfean.publishing.push import prepared
from cpfean.training.evaluation import score_matrix
from cpfean.training.setup import open_checkpoint, read_model
from tests.local_hub import TOKEN, LocalHub, files_in, local_hub
from tests.model.encoders import write_encoder
from tests.publishing.conftest import write_run
from tests.training.tiny import save_untrained, tiny_experiment

ROOT = Path(__file__).resolve().parents[2]
# Several commands in one process, which imports torch once: exit code and output of each.
PROGRAM = """
import contextlib, importlib, io, json, sys
answers = []
for script, *words in json.loads(sys.argv[1]):
    sys.argv = [script, *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(f"experiments.{script.removesuffix('.py')}").main()
        except SystemExit as stopped:
            answers.append([stopped.code, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""
SENT = {
    "README.md",
    "config.json",
    "config.toml",
    "model.safetensors",
    "tokenizer/caption_tokenizer.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with local_hub(tmp_path / "hub") as hub:
        yield hub


def called(
    hub: LocalHub, home: Path, *lines: list[str], token: str | None = TOKEN
) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of commands, by a user who has this home."""
    (home / "work").mkdir(parents=True, exist_ok=True)
    environment = hub.environment(home / "hf", token=token)
    own = {"PYTHONPATH": str(ROOT), "CPFEAN_CACHE": str(home / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(lines)],
        cwd=home / "work",
        env=environment | own,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout.splitlines()[-1])]


def on_hub(hub: LocalHub, repo: str) -> Path:
    """The folder of what a repository holds now."""
    commit = hub.resolve(repo, "main")
    assert commit is not None
    return hub.root / repo / commit


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in files_in(folder)}


def scores(model: Path, data: Path, cache: Path, **how: Any) -> torch.Tensor:
    device = torch.device("cpu")
    trained = open_checkpoint(
        model,
        data_folder=data,
        split="test",
        cache_dir=cache,
        device=device,
        num_regions=8,
        **how,
    )
    gallery = range(trained.dataset.split.num_images)
    return score_matrix(
        trained.model, trained.dataset, gallery=gallery, batch_size=7, device=device
    )


@pytest.mark.slow
def test_a_model_comes_back_from_the_hub_with_the_same_scores(
    hub: LocalHub, run_folder: Path, data: Path, tmp_path: Path
) -> None:
    (refused,) = called(
        hub, tmp_path / "stranger", ["push.py", str(run_folder), "me/model"], token=None
    )
    assert refused[0] == 5
    assert "log in with `hf auth login`" in refused[2].lower()
    evaluate = ["evaluate.py", "me/model", "--data", str(data)]
    pushed, (code, out, err), again, (_, local, _) = called(
        hub,
        tmp_path / "mine",
        ["push.py", str(run_folder), "me/model", "--private", "--licence", "mit"],
        evaluate,
        ["push.py", str(run_folder), "me/model"],
        [evaluate[0], str(run_folder), *evaluate[2:]],
    )
    assert pushed[0] == 0, pushed[2]
    assert pushed[1].strip().startswith(f"{hub.url}/me/model/commit/")
    assert again[0] == 0, again[2]  # ours may be replaced by ours
    assert hub.private == {"me/model"}
    assert names_in(on_hub(hub, "me/model")) - {".gitattributes"} == SENT
    commits = [line for line in hub.asked if line == "POST /api/models/me/model/commit/main"]
    assert len(commits) == 2  # one each
    assert code == 0, err
    assert json.loads(out) == json.loads(local)
    (fetched,) = (tmp_path / "mine" / "hf" / "hub").glob("models--me--model/snapshots/*")
    assert names_in(fetched) == SENT - {"README.md"}
    before = scores(run_folder / "best_model", data, tmp_path / "cache")
    assert torch.equal(scores(fetched, data, tmp_path / "cache"), before)
    card = (on_hub(hub, "me/model") / "README.md").read_text(encoding="utf-8")
    told = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))["test"]
    assert f"**{told['rsum']:.1f}**" in card


@pytest.mark.long
@pytest.mark.slow
def test_a_frozen_text_encoder_is_named_and_not_sent(
    hub: LocalHub, data: Path, tmp_path: Path
) -> None:
    encoder, other = (
        write_encoder(tmp_path / "encoder"),
        write_encoder(tmp_path / "other", hidden_size=16),
    )
    hub.publish("me/encoder", encoder)
    hub.publish("me/other", other)
    config = tiny_experiment().with_overrides(
        {
            "data.path": str(data),
            "data.word_noise": 0,
            "model.text.encoder": str(encoder),
            "model.text.trainable": False,
        }
    )
    run = write_run(tmp_path / "runs" / "frozen", config, data)
    push = ["push.py", str(run), "me/model"]
    evaluate = ["evaluate.py", "me/model", "--data", str(data)]
    place, wrong, pushed, evaluated, moved = called(
        hub,
        tmp_path / "mine",
        push,
        [*push, "--text-encoder", "me/other"],
        [*push, "--text-encoder", "me/encoder"],
        evaluate,
        [*evaluate, "--text-encoder", str(encoder)],
    )
    assert place[0] == 2
    assert "--text-encoder USER/NAME" in place[2]
    assert wrong[0] == 5
    assert "was trained with" in wrong[2]
    assert pushed[0] == 0, pushed[2]
    sent = on_hub(hub, "me/model")
    assert names_in(sent) - {".gitattributes"} == SENT
    for path in files_in(sent):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert evaluated[0] == 0, evaluated[2]
    expected = json.loads((run / "summary.json").read_text(encoding="utf-8"))["test"]
    assert json.loads(evaluated[1])["rsum"] == expected["rsum"]
    assert moved[:2] == evaluated[:2]
    back = scores(sent, data, tmp_path / "cache", text_encoder=str(encoder))
    assert torch.equal(back, scores(run / "best_model", data, tmp_path / "cache"))
    fingerprint = Cpfean.from_pretrained(run / "best_model").backbone.fingerprint()
    card = (sent / "README.md").read_text(encoding="utf-8")
    assert "`me/encoder`, **whose weights are not included**" in card
    assert fingerprint in card


@pytest.mark.long
def test_a_model_of_another_kind_is_not_replaced(
    hub: LocalHub, run_folder: Path, tmp_path: Path
) -> None:
    hub.commit("me/bert", {"config.json": b'{"model_type": "bert"}'})
    before = hub.resolve("me/bert", "main")
    (answer,) = called(hub, tmp_path / "mine", ["push.py", str(run_folder), "me/bert"])
    assert answer[0] == 5
    assert "holds a model of another kind" in answer[2]
    assert hub.resolve("me/bert", "main") == before


def test_what_goes_out_names_no_place_of_this_machine(
    run_folder: Path, config: ExperimentConfig, data: Path
) -> None:
    model = run_folder / "best_model"
    with prepared(model, "me/model", config=config) as publication:
        assert {p.relative_to(publication.folder).as_posix() for p in publication.files} == SENT
        for path in publication.files:
            assert str(data.parent).encode() not in path.read_bytes(), path
        told = ExperimentConfig.from_toml(publication.folder / "config.toml")
        assert told == config.with_overrides({"data.path": data.name})
        for name in ("config.json", "model.safetensors"):
            assert (publication.folder / name).read_bytes() == (model / name).read_bytes()
        kept = publication.folder
    assert not kept.exists()


def test_of_a_trained_text_encoder_goes_out_what_it_was_called(data: Path, tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "some-bert")
    config = tiny_experiment().with_overrides(
        {"data.path": str(data), "model.text.encoder": str(encoder)}
    )
    model = save_untrained(config, data, tmp_path / "model")
    # As releases have written it that noted where the encoder was read.
    described = json.loads((model / "config.json").read_text(encoding="utf-8"))
    described["text_encoder"]["_name_or_path"] = str(encoder)
    (model / "config.json").write_text(json.dumps(described), encoding="utf-8")
    weights = load_file(model / "model.safetensors")
    save_file(weights, model / "model.safetensors")
    with prepared(model, "me/model", config=config) as publication:
        for path in publication.files:
            assert str(tmp_path).encode() not in path.read_bytes(), path
        assert "trained further from `some-bert`, is included" in publication.card
        assert "base_model" not in publication.card
        sent, _ = read_model(publication.folder)
        assert sent.config.text.encoder == "some-bert"
        for name, tensor in sent.own_state().items():
            assert torch.equal(tensor, weights[name]), name


def test_what_cannot_go_out_is_refused_before_anything_is_sent(
    run_folder: Path, config: ExperimentConfig, tmp_path: Path
) -> None:
    model = run_folder / "best_model"

    def refused(error: type[Exception], words: str, repo: str = "me/model", **how: Any) -> None:
        with (
            pytest.raises(error, match=words),
            prepared(how.pop("model", model), repo, config=config, **how),
        ):
            pass

    refused(ConfigError, "expected the name of a model on the Hub", repo="model")
    refused(ConfigError, "expected the name of a model on the Hub", repo="me/model@v1")
    refused(ConfigError, "must be an identifier of the Hub", licence="My own licence")
    refused(ConfigError, "names a frozen text encoder", text_encoder="me/encoder")
    refused(ConfigError, "cannot be read", card=tmp_path / "missing.md")
    (tmp_path / "empty.md").write_text(" \n", encoding="utf-8")
    refused(ConfigError, "found an empty file", card=tmp_path / "empty.md")
    refused(CheckpointError, "missing", model=tmp_path)


def test_a_card_of_ones_own_takes_the_place_of_the_made_one(
    run_folder: Path, config: ExperimentConfig, tmp_path: Path
) -> None:
    (tmp_path / "card.md").write_text("# Mine\n", encoding="utf-8")
    with prepared(
        run_folder / "best_model", "me/model", config=config, card=tmp_path / "card.md"
    ) as publication:
        assert (publication.folder / "README.md").read_text(encoding="utf-8") == "# Mine\n"
