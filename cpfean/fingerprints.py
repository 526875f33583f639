"""Fingerprints of code, of folders and of text encoders: the same digits, the same content."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
from collections.abc import Iterable
from pathlib import Path

from cpfean.config import ExperimentConfig


def encoder_fingerprint(config: ExperimentConfig) -> str:
    """What a text encoder that is a folder holds; empty for one that goes by its name."""
    name = config.model.text.encoder
    return content_fingerprint(Path(name)) if name != "scratch" and Path(name).is_dir() else ""


@functools.cache
def code_fingerprint(package: str = "cpfean") -> str:
    """Twelve hexadecimal digits of a package's code; comments and layout do not count."""
    root = _folder_of(package)
    return _of_code(root, root.rglob("*.py"))


@functools.cache
def training_fingerprint() -> str:
    """The same of what a training runs: `cpfean.training`, and each room that one of these imports.

    So a change of the search page, say, trains nothing anew.
    """
    root = _folder_of("cpfean")
    rooms, found = {"training"}, set[str]()
    while rooms - found:
        room = min(rooms - found)
        found.add(room)
        for file in _files_of(root / room):
            rooms |= {name for name in _imported(file) if _files_of(root / name)}
    return _of_code(root, (file for room in found for file in _files_of(root / room)))


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


def _folder_of(package: str) -> Path:
    (folder,) = importlib.import_module(package).__path__
    return Path(folder)


def _of_code(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)}\n{_bare(file)}\n".encode())
    return digest.hexdigest()[:12]


def _files_of(room: Path) -> list[Path]:
    """The modules of a package, or the one of that name; none if there is neither."""
    module = room.with_suffix(".py")
    return [module] if module.is_file() else list(room.rglob("*.py"))


def _imported(file: Path) -> set[str]:
    """The rooms of this package that a module names in its imports, wherever they stand."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("cpfean.")}


def _bare(file: Path) -> str:
    """A module's syntax tree without docstrings."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return ast.dump(tree)
