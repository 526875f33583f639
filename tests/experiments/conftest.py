"""Commands of experiments/, run in this process: what they import is there already."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest


class Answer(NamedTuple):
    """What a command came to, under the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """The one line of a refusal."""
        (line,) = self.stderr.strip().splitlines()
        return line


Run = Callable[..., Answer]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script of experiments/ to its end, as `python experiments/SCRIPT WORDS` does.

    Its environment has no settings of Ray and MLflow and a cache of the test's own; what it changes
    in it, and in what is logged, ends with it. What starts Ray needs a process of its own.
    """

    def call(
        script: str,
        *words: str | bytes,
        cwd: Path = tmp_path,
        environment: Mapping[str, str] | None = None,
    ) -> Answer:
        before = dict(os.environ)
        levels = {name: logging.getLogger(name).level for name in ("", "cpfean")}
        handlers = list(logging.getLogger().handlers)
        foreign = [name for name in before if name.startswith(("RAY_", "MLFLOW_"))]
        capsys.readouterr()
        try:
            for name in foreign:
                del os.environ[name]
            os.environ["CPFEAN_CACHE"] = str(cwd / "cache")
            os.environ.update(environment or {})
            with monkeypatch.context() as patch:
                patch.chdir(cwd)
                patch.setattr(sys, "argv", [script, *map(os.fsdecode, words)])
                module = importlib.import_module(f"experiments.{script.removesuffix('.py')}")
                with pytest.raises(SystemExit) as stopped:
                    module.main()
        finally:
            os.environ.clear()
            os.environ.update(before)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
            logging.getLogger().handlers[:] = handlers
        code = stopped.value.code
        assert code is None or isinstance(code, int), code
        answer = Answer(code or 0, *capsys.readouterr())
        assert "starting Ray on this machine" not in answer.stdout
        return answer

    return call
