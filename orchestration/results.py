"""What every run came to, kept by what the run was: nothing is trained twice.

    <folder>/<key>.json    one finished run; the key is a hash of its configuration, of the data and
                           of the code that trained it

Files from several machines may be put into one folder: the same run has the same name everywhere.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
from pathlib import Path
from typing import Any

from cpfean.config import ExperimentConfig
from orchestration.records import TrialRecord, read_json, write_json

_FORMAT = 1


class Results:
    """The finished runs of a folder.

    Args:
        folder: made with the first result.
        data_fingerprint: of the data that all runs asked for are trained on.
        commit: said in what is kept; not part of the key.
    """

    def __init__(self, folder: Path, *, data_fingerprint: str, commit: str | None) -> None:
        self._folder = folder
        self._data = data_fingerprint
        self._commit = commit

    def file_of(self, config: ExperimentConfig) -> Path:
        """Where the result of a configuration is, or will be."""
        # Where data and text encoder lie says nothing: what they hold tells which they are.
        encoder = Path(config.model.text.encoder)
        here = {"data.path": "synthetic"}
        if encoder.is_dir():
            here["model.text.encoder"] = content_fingerprint(encoder)
        moved = config.with_overrides(here)
        text = "\n".join((moved.fingerprint(), self._data, code_fingerprint()))
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def fill(self, record: TrialRecord, *, tested: bool) -> bool:
        """Makes a finished record of a waiting one, if its run is known.

        Args:
            record: with its configuration.
            tested: whether the metrics on the test split are needed too.
        """
        file = self.file_of(record.experiment)
        known = read_json(file)
        if not isinstance(known, dict) or known.get("format") != _FORMAT:
            return False
        if tested and not known["test"]:
            return False
        record.history, record.test = known["history"], known["test"]
        record.seconds, record.checkpoint = known["seconds"], known["checkpoint"]
        record.complete, record.state, record.reused = True, "finished", file.name
        return True

    def keep(self, record: TrialRecord) -> None:
        """Keeps what a finished run came to; a known result that says more stays."""
        file = self.file_of(record.experiment)
        known = read_json(file)
        if isinstance(known, dict) and known.get("test") and not record.test:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        result: dict[str, Any] = {
            "format": _FORMAT,
            "name": record.name,
            "data_fingerprint": self._data,
            "code_fingerprint": code_fingerprint(),
            "commit": self._commit,
            "best_rsum": record.best_rsum,
            "test": record.test,
            "seconds": record.seconds,
            "checkpoint": record.checkpoint,
            "config": record.config,
            "history": record.history,
        }
        write_json(file, result)


@functools.cache
def code_fingerprint(package: str = "cpfean") -> str:
    """Twelve hexadecimal digits of a package's code; comments and layout do not count."""
    (folder,) = importlib.import_module(package).__path__
    root = Path(folder)
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n{_bare(file)}\n".encode())
    return digest.hexdigest()[:12]


@functools.cache
def content_fingerprint(folder: Path) -> str:
    """Twelve hexadecimal digits of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name}\n{content}\n".encode())
    return digest.hexdigest()[:12]


def _bare(file: Path) -> str:
    """A module's syntax tree without docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)


__all__ = ["Results", "code_fingerprint"]
