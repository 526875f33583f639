"""Folders of large arrays in the cache: there whole or not at all, and mapped when they are read.

A million images with 36 regions of width 256 are 37 GB, of which a search from a shortlist reads a
few megabytes. They are written as files and not through a mapping, whose writer is killed where the
disk is full.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from cpfean.errors import DataError, ServiceError
from cpfean.folders import made
from cpfean.progress import Progress
from cpfean.writing import is_disk_error, write_json

Shapes = Mapping[str, tuple[tuple[int, ...], str]]
Batches = Callable[[], Iterable[tuple[int, Mapping[str, Tensor]]]]

_UNFINISHED = ".unfinished-"
_ABOUT = "about.json"
_SPARE = 2**26  # bytes that a disk must have left


def kept_arrays(
    folder: Path,
    shapes: Shapes,
    batches: Batches,
    *,
    what: str,
    total: int,
    about: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """The arrays of a folder, which is made if it is not there.

    Args:
        folder: of the cache, its name made of all that has a say in what it holds.
        shapes: shape and type of each array, by name.
        batches: begins to make the arrays; gives how many of `total` are done, and the next rows.
        what: is done, as a phrase.
        about: what the folder is made from, for people.

    Raises:
        ConfigError: the cache cannot be written.
        DataError: a damaged folder.
        ServiceError: too little disk.
    """
    # A folder that is there is whole, and where it may be read no lock is needed.
    if not os.path.isdir(folder):
        cache = made(folder.parent)
        # Two who start together: the first one makes it, the other one waits.
        with FileLock(cache / f"{folder.name}.lock"):
            if not os.path.isdir(folder):
                _make(folder, shapes, batches, what=what, total=total, about=about)
    return {name: _map(folder, name, *shape) for name, shape in shapes.items()}


@torch.inference_mode()
def _make(
    folder: Path,
    shapes: Shapes,
    batches: Batches,
    *,
    what: str,
    total: int,
    about: Mapping[str, Any],
) -> None:
    cache, prefix = folder.parent, f"{_UNFINISHED}{folder.name}-"
    for leftover in cache.glob(f"{prefix}*"):  # of who was killed: the lock is ours
        shutil.rmtree(leftover)
    needed = sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in shapes.values())
    free = shutil.disk_usage(cache).free
    if free < needed + _SPARE:
        raise ServiceError(
            f"{cache}: the embeddings take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            "free. Free some, name a cache on another disk by CPFEAN_CACHE, or keep the regions "
            "in half precision."
        )
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=cache))
    try:
        progress = Progress(what, total=total)
        with _writing(unfinished, shapes) as files:
            for done, arrays in batches():
                for name, file in files.items():
                    kind = shapes[name][1]
                    file.write(arrays[name].cpu().numpy().astype(kind).tobytes())
                progress.step(done)
        write_json(unfinished / _ABOUT, dict(about))
        unfinished.rename(folder)
    except OSError as error:
        if not is_disk_error(error):
            raise
        raise ServiceError(
            f"{cache}: the embeddings cannot be written: {error.strerror or error}. They take "
            f"{needed / 1e9:.1f} GB; CPFEAN_CACHE names another cache."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def _writing(folder: Path, shapes: Shapes) -> Iterator[dict[str, IO[bytes]]]:
    """Files that begin as npy files of these shapes do; the numbers are yet to be written."""
    with ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for name, (shape, kind) in shapes.items():
            file = (folder / f"{name}.npy").open("xb")
            files[name] = stack.enter_context(file)
            header = {"descr": kind, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
        yield files
        for each in files.values():
            each.flush()
            os.fsync(each.fileno())


def _map(folder: Path, name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """A mapped array of a folder; writing to it changes the memory alone, which torch asks for.

    Raises:
        DataError: it is not what was written there.
    """
    path = folder / f"{name}.npy"
    try:
        if 0 in shape:
            return np.zeros(shape, dtype=kind)  # nothing to map
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); remove {folder}, and it is made again."
        ) from None
    if array.shape != shape or array.dtype != np.dtype(kind):
        raise DataError(
            f"{path}: expected {kind} of shape {shape}, found {array.dtype.str} of shape "
            f"{array.shape}; remove {folder}, and it is made again."
        )
    return array.view(np.ndarray)
