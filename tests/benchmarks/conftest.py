"""Runs a benchmark as a user does, small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run_benchmark(tmp_path: Path) -> Callable[..., tuple[str, dict[str, Any]]]:
    """Runs `benchmarks/NAME.py` with these options; what it printed and what it wrote."""

    def run(name: str, *options: object) -> tuple[str, dict[str, Any]]:
        output = tmp_path / "result.json"
        command = [sys.executable, f"benchmarks/{name}.py", "--output", output, *options]
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(output.read_text(encoding="utf-8"))

    return run
