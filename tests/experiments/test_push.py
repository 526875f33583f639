"""What push.py shows and refuses before anything is sent; tests/publishing has what is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cpfean.data.synthetic import write_synthetic
from tests.experiments.conftest import Run
from tests.training.conftest import TINY
from tests.training.tiny import save_untrained, tiny_experiment


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model without the record of a run."""
    home = tmp_path_factory.mktemp("push")
    write_synthetic(home / "data", TINY)
    config = tiny_experiment().with_overrides({"data.path": str(home / "data")})
    save_untrained(config, home / "data", home / "model")
    return home


def test_a_dry_run_prints_the_card_alone_and_lists_the_files(run: Run, home: Path) -> None:
    before = sorted(home.rglob("*"))
    answer = run("push.py", "model", "me/model", "--dry-run", "--licence", "mit", cwd=home)
    assert answer.returncode == 0
    assert ModelCard(answer.stdout).data.license == "mit"
    listed = [line.split()[-1] for line in answer.stderr.splitlines() if " bytes  " in line]
    assert listed == sorted(listed)
    assert {"README.md", "config.json", "config.toml", "model.safetensors"} <= set(listed)
    assert "model has no record of a test: its card has no such figures." in answer.stderr
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["model", "model"], 2, "expected the name of a model on the Hub"),
        (["model", "me/model", "--licence", "Mine"], 2, "must be an identifier of the Hub"),
        (["model", "me/model", "--card", "none.md"], 2, "--card"),
        (["model", "me/model", "--privat"], 2, "did you mean '--private'"),
        (["none", "me/model"], 5, "is no folder of a finished run"),
        (["data", "me/model"], 5, "is no folder of a finished run"),
        (["model", "me/model"], 5, "HF_HUB_OFFLINE"),
    ],
)
def test_what_cannot_go_out_is_refused(
    run: Run, home: Path, words: list[str], code: int, told: str
) -> None:
    answer = run("push.py", *words, cwd=home)
    assert answer.returncode == code, answer.stderr
    assert told in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("script", ["evaluate.py", "show.py"])
def test_a_name_that_cannot_be_fetched_is_told_from_a_folder_that_is_not_there(
    run: Run, home: Path, script: str
) -> None:
    assert "no folder me/none here" in run(script, "me/none", cwd=home).message
    assert "write hf://data/none" in run(script, "data/none", cwd=home).message
    assert "no folder" not in run(script, "hf://me/none", cwd=home).message


@pytest.mark.parametrize("script", ["sweep.py", "train.py", "compare.py"])
@pytest.mark.parametrize("name", ["a/b", "two words", "models:/x"])
def test_a_name_that_no_registry_takes_is_refused(
    run: Run, home: Path, script: str, name: str
) -> None:
    answer = run(script, "--register", name, "--dry-run", cwd=home)
    assert answer.returncode == 2
    assert "--register must be 1 to 80 letters" in answer.stderr
