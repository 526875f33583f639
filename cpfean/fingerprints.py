"""Fingerprints of code, of folders and of text encoders: the same digits, the same content."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
from pathlib import Path

from cpfean.config import ExperimentConfig


def encoder_fingerprint(config: ExperimentConfig) -> str:
    """What a text encoder that is a folder holds; empty for one that goes by its name."""
    name = config.model.text.encoder
    return content_fingerprint(Path(name)) if name != "scratch" and Path(name).is_dir() else ""


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


def listing(folder: Path) -> bytes:
    """Digests and names of all files in a folder and below it: the same bytes, the same content."""
    lines = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        lines.append(f"{content}  {file.relative_to(folder).as_posix()}\n")
    return "".join(lines).encode()


def _bare(file: Path) -> str:
    """A module's syntax tree without docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)
