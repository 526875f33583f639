"""Runs a benchmark as a user does, small; in this process, which has its imports already."""

from __future__ import annotations

import gc
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import data_folder, tiny_config

__all__ = ["data_folder", "run_benchmark", "tiny_config"]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Runs `benchmarks/NAME.py` with these options; what it printed and what it wrote."""

    def run(name: str, *options: object) -> tuple[str, dict[str, Any]]:
        output = tmp_path / "result.json"
        words = [f"{name}.py", "--output", output, *options]
        threads = torch.get_num_threads()
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(ROOT)
            patch.syspath_prepend(ROOT / "benchmarks")
            patch.setattr(sys, "argv", [str(word) for word in words])
            # Benchmarks collect garbage before each run: in a process of tests there is much to
            # look at that is none of theirs.
            gc.freeze()
            importlib.import_module(name).main()
            gc.unfreeze()
        torch.set_num_threads(threads)
        return capsys.readouterr().out, json.loads(output.read_text(encoding="utf-8"))

    return run
