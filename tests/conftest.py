"""What all tests share: shape checks, Hypothesis, threads, and no network.

Every shape in a signature of cpfean.model, .losses, .metrics and .photographs is checked at each
call. The hook acts on imports, so it has to be in place before any test file is read.
Configurations and settings are left out: their own messages are what users see.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tests.environment import FAIR

# Before the libraries that read them are imported; Ray's workers inherit them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # whatever token this user has for clusters
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(FAIR)
os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels for GPUs, on the processor

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(
    [
        "cpfean.losses",
        "cpfean.metrics",
        "cpfean.model",
        *(
            f"cpfean.photographs.{name}"
            for name in (
                *("backbones", "detectors", "extractor", "grid", "pooling"),
                *("selection", "suppression", "zero_shot"),
            )
        ),
    ],
    "beartype.beartype",
)

# The first torch call is slow, which a deadline would take for a slow test; and a suite that is
# green today has to be green tomorrow.
hypothesis.settings.register_profile("cpfean", derandomize=True, deadline=None)
hypothesis.settings.load_profile("cpfean")

# The tensors of the tests are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


if TYPE_CHECKING:
    from orchestration.settings import Settings


@pytest.fixture
def where(tmp_path: Path) -> Settings:
    """Where studies of tests run; MLflow's store is there, which takes two seconds to make."""
    from orchestration.settings import Settings
    from tests.orchestration.tracking_store import new_store

    return Settings(
        output=tmp_path / "runs",
        cache_dir=tmp_path / "cache",
        tracking_uri=new_store(tmp_path / "mlflow.db"),
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="run what takes long too, as `make test-all` does"
    )
    parser.addoption(
        "--drill",
        action="store_true",
        help="run the drills too: long fault tests on a cluster of hosts or on many sweeps",
    )


_LEFT_OUT = {
    "drill": "a drill takes minutes; run it with --drill",
    "long": "takes long, beside quicker tests of the same; make test-all runs it",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for name, reason in _LEFT_OUT.items():
            if item.get_closest_marker(name) and not config.getoption(f"--{name}"):
                item.add_marker(pytest.mark.skip(reason=reason))
    # Files are handed out whole, in this order: those that take longest first, so that the quick
    # ones fill the gaps at the end.
    weights = Counter(item.path for item in items if _takes_time(item))
    items.sort(key=lambda item: -weights[item.path])


def _takes_time(item: pytest.Item) -> bool:
    return bool(item.get_closest_marker("slow")) and not item.get_closest_marker("skip")
