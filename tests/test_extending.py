"""The examples of docs/extending.md, put where they say, do what is said of them."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cpfean.data.sources import resolve_data
from cpfean.data.split import open_split, validate_folder
from cpfean.errors import DataError
from cpfean.training.setup import open_experiment
from tests.orchestration.samples import TINY

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"
COPIED = ("cpfean", "orchestration", "experiments", "tests", "pyproject.toml")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A block of the page.

    Attributes:
        section: the heading above it.
        file: that it belongs to.
        into: the table it is an entry of, as NAME or NAME.keyword; "" for a file of its own.
        code: without its first line.
    """

    section: str
    file: str
    into: str
    code: str


def examples() -> list[Example]:
    found = []
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        for block in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            first, code = block.split("\n", 1)
            told = re.fullmatch(
                r"# (\S+\.py), (?:into (\S+)|a new file|a script of your own)", first
            )
            assert told, first
            found.append(
                Example(
                    section=section.splitlines()[0], file=told[1], into=told[2] or "", code=code
                )
            )
    return found


EXAMPLES = {(each.section, each.file): each for each in examples()}


def with_entry(source: str, example: Example) -> str:
    """The text of a module, an entry added at the end of one of its tables."""
    name, _, keyword = example.into.partition(".")
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            table = node.value
            if keyword:
                (table,) = (each.value for each in table.keywords if each.arg == keyword)
            lines = source.splitlines(keepends=True)
            return "".join(
                [*lines[: table.end_lineno - 1], example.code, *lines[table.end_lineno - 1 :]]
            )
    raise AssertionError(f"{example.file} has no {name}")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project that has all examples in it."""
    folder = tmp_path_factory.mktemp("extended")
    for name in COPIED:
        if (ROOT / name).is_dir():
            # What numba has compiled lies beside the kernels, and is good for their copy.
            ignored = shutil.ignore_patterns("*.pyc")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    for example in EXAMPLES.values():
        path = folder / example.file
        if example.into:
            source = with_entry(path.read_text(encoding="utf-8"), example)
        else:
            assert not path.exists()
            source = example.code
        path.write_text(source, encoding="utf-8")
    return folder


def test_every_section_has_its_example_and_a_scorer_is_three_files() -> None:
    files: dict[str, list[str]] = {}
    for section, file in EXAMPLES:
        files.setdefault(section, []).append(file)
    assert list(files) == [
        "An ablation",
        "A swept setting",
        "A scorer",
        "A text encoder",
        "A data converter",
    ]
    assert len(files["A scorer"]) == 3


@pytest.mark.long
def test_an_ablation_a_setting_and_a_scorer_pass_the_tests_that_they_will_have(
    project: Path,
) -> None:
    chosen = [
        "test_every_ablation_trains_and_builds_nothing_that_it_switches_off[no_geometry]",
        "test_every_ablation_and_search_space_fits_every_baseline[synthetic]",
        "test_scores_and_gradients_equal_those_of_the_naive_form[max_similarity-0]",
        "test_blocks_equal_the_scorer_with_gradients[max similarity-scattered-few pairs]",
    ]
    files = ("experiments/test_registry.py", "model/scorers", "model/test_scoring.py")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider"),
            *(f"tests/{file}" for file in files),
            *("-k", "no_geometry or synthetic or entry or max_similarity or (max and similarity)"),
        ],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout
    passed = re.findall(r"^PASSED \S+?::(.*)$", done.stdout, re.MULTILINE)
    assert [name for name in chosen if name not in passed] == []


def test_a_text_encoder_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "save_encoder.py"
    script.write_text(EXAMPLES["A text encoder", script.name].code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    config = TINY.with_overrides({"model.text.encoder": str(tmp_path / "my-encoder")})
    experiment = open_experiment(
        config,
        data_folder=resolve_data(config.data, cache_dir=tmp_path),
        cache_dir=tmp_path,
        device=torch.device("cpu"),
    )
    images = experiment.model.encode_images(**experiment.train.image_batch(range(4))._asdict())
    captions = experiment.model.encode_captions(
        **experiment.train.caption_batch(range(8))._asdict()
    )
    experiment.model.score(images, captions).sum().backward()
    table = experiment.model.backbone.piece_embeddings().weight
    assert table.shape[1] == 32
    assert table.grad is not None
    assert table.grad.isfinite().all()


def test_a_converter_of_ones_own_makes_a_sound_folder_or_none(
    project: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    features = {}
    for split in ("train", "dev", "test"):
        names = [f"{split}-{i}" for i in range(3)]
        captions = {name: [f"Caption {j} of {name}." for j in range(5)] for name in names}
        (source / f"{split}.json").write_text(json.dumps(captions), encoding="utf-8")
        for i, name in enumerate(names):
            features[name] = np.random.default_rng(i).random((4 + i, 8), dtype=np.float32)
            np.save(source / f"{name}.npy", features[name])
    file = project / "cpfean/data/convert/single_arrays.py"
    convert = runpy.run_path(str(file))["convert_single_arrays"]

    convert(source, tmp_path / "data", num_regions=5)
    assert validate_folder(tmp_path / "data") == []
    split = open_split(tmp_path / "data", "dev", num_regions=None)
    assert split.captions[5] == "Caption 0 of dev-1."
    np.testing.assert_array_equal(split.regions.features[2], features["dev-2"][:5])

    (source / "test-1.npy").unlink()
    with pytest.raises(DataError, match=r"test-1\.npy"):
        convert(source, tmp_path / "other")
    assert not (tmp_path / "other").exists()
