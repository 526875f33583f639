"""A small gallery, and untrained models of every kind of score before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cpfean.data.synthetic import write_synthetic
from cpfean.search.searcher import Searcher
from tests.training.conftest import TINY
from tests.training.tiny import save_untrained, tiny_experiment

# By name: what is changed of the tiny configuration.
MODELS: dict[str, dict[str, object]] = {
    "prominent": {},
    "crossed": {"model.alignment.kind": "cross_attention", "seed": 1},
    "pooled": {"model.alignment.global_weight": 1},
    "mixed": {"model.alignment.global_weight": 0.5},
}

Open = Callable[..., Searcher]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder and a model of each kind, by name."""
    home = tmp_path_factory.mktemp("search")
    write_synthetic(home / "data", replace(TINY, test_images=30))
    config = tiny_experiment().with_overrides({"data.path": str(home / "data")})
    for name, changed in MODELS.items():
        save_untrained(config.with_overrides(changed), home / "data", home / name)
    return home


@pytest.fixture(scope="session")
def opened(home: Path) -> Open:
    """Opens a searcher; its cache is that of all tests."""

    def call(model: str, **options: object) -> Searcher:
        given = {"data": home / "data", "cache_dir": home / "cache", "device": "cpu"} | options
        return Searcher.from_pretrained(home / model, **given)

    return call


@pytest.fixture(scope="session")
def searcher(opened: Open) -> Searcher:
    """The model with gates before the test split."""
    return opened("prominent")
