"""A batch of photographs, what its regions are, and the bytes in which both travel and rest.

Axes:  region   of a photograph, as many as were found     feature   of a region vector

Every way of working calls `extract_batch` with the same batches on one processor thread, and hands
on what it gives as bytes: so this process and a cluster make the same files.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, Self

import numpy as np
import torch
from jaxtyping import UInt8

from cpfean.errors import DataError, NoMemoryError, message_of
from cpfean.photographs.decoding import UnreadablePhotographError, read_photograph
from cpfean.photographs.extractor import PhotographRegions

MOST_PIXELS = 2**25  # that are held at a time, unless a single photograph has more: 100 MB
READERS = 8  # threads that read photographs for a GPU, which would wait for one


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Photographs that are read and looked at together.

    Attributes:
        number: of the batch, from 0.
        paths: of the photographs, local or s3://.
        key: of its file; changes with the number, and with names and sizes of the photographs.
    """

    number: int
    paths: tuple[str, ...]
    key: str


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Stands for a photograph without regions; the reason does not say where the file is."""

    reason: str


Found = PhotographRegions | Unreadable
Picture = UInt8[np.ndarray, "height width 3"]


class Described(Protocol):
    """What an extractor tells of itself."""

    @property
    def label_names(self) -> list[str] | None: ...

    @property
    def feature_dim(self) -> int: ...

    def provenance(self) -> dict[str, Any]: ...


class Extractor(Described, Protocol):
    """What makes regions of photographs, as `cpfean.photographs.extractor.RegionExtractor` does."""

    def __call__(self, photographs: Sequence[Picture]) -> list[PhotographRegions]: ...


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an extractor tells, without its models, which take memory."""

    label_names: list[str] | None
    feature_dim: int
    told: dict[str, Any]

    @classmethod
    def of(cls, extractor: Described) -> Self:
        return cls(
            label_names=extractor.label_names,
            feature_dim=extractor.feature_dim,
            told=extractor.provenance(),
        )

    def provenance(self) -> dict[str, Any]:
        return self.told


def extract_batch(extractor: Extractor, batch: Batch, *, readers: int = 1) -> list[Found]:
    """The regions of each photograph of a batch; those that cannot be read are left out of it.

    What comes out depends on the batch and on the number of threads of torch, which the caller has
    set to one: see `one_thread`.

    Args:
        readers: threads that read photographs, where something else than this processor computes.

    Raises:
        DataError: a photograph has gone or cannot be seen from this host; features that are not
            finite numbers in float16.
        NoMemoryError: the batch is too large for the device.
    """
    found: list[Found] = []
    with ThreadPoolExecutor(readers, thread_name_prefix="reading") as pool:
        for group in _groups(batch.paths, pool, readers=readers):
            pictures = [one for _, one in group if not isinstance(one, Unreadable)]
            regions = iter(_regions(extractor, pictures))
            for path, one in group:
                if isinstance(one, Unreadable):
                    found.append(one)
                else:
                    found.append(_sound(next(regions), path=path))
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute with one thread in here: numbers differ with how many there are.

    Workers are side by side, so that no processor is idle. Threads that begin in here have to set
    theirs themselves.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def packed(found: Sequence[Found]) -> bytes:
    """A batch's regions as an npz archive, which knows when it is damaged."""
    regions = [one for one in found if isinstance(one, PhotographRegions)]
    reasons = [one.reason if isinstance(one, Unreadable) else "" for one in found]
    arrays: dict[str, np.ndarray] = {
        # A text of numpy ends before the zeros at its end, and is no text if it is empty.
        "reasons": np.frombuffer("\0".join(reasons).encode(), dtype=np.uint8),
        "counts": np.array([len(one.features) for one in regions], dtype=np.int32),
    }
    if regions:
        arrays["features"] = np.concatenate([one.features for one in regions]).astype(np.float16)
        arrays["boxes"] = np.concatenate([one.boxes for one in regions]).astype(np.float32)
        arrays["sizes"] = np.array([one.size for one in regions], dtype=np.int32)
    for name, kind in (("labels", np.int32), ("scores", np.float32)):
        each = [values for one in regions if (values := getattr(one, name)) is not None]
        if each:
            arrays[name] = np.concatenate(each).astype(kind)
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def unpacked(file: BinaryIO) -> list[Found]:
    """What `packed` was given.

    Raises:
        DataError: the bytes are damaged.
    """
    with _opened(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
        reasons = _reasons(arrays["reasons"])
        stops = np.cumsum(arrays["counts"]).tolist()
        parts = {  # behind the names of the fields; labels and scores there may be none of
            name: np.split(arrays[name], stops[:-1]) if name in arrays else [None] * len(stops)
            for name in ("features", "boxes", "labels", "scores")
        }
        rows = iter(range(len(stops)))
        found: list[Found] = []
        for reason in reasons:
            if reason:
                found.append(Unreadable(reason=reason))
                continue
            row = next(rows)
            width, height = arrays["sizes"][row].tolist()
            own: dict[str, Any] = {name: part[row] for name, part in parts.items()}
            found.append(PhotographRegions(size=(width, height), **own))
        return found


def unpacked_reasons(file: BinaryIO) -> list[str]:
    """Why each photograph of a batch is left out, empty if it is not; raises as `unpacked` does."""
    with _opened(file) as archive:
        return _reasons(archive["reasons"])


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Any]:
    """The archive; whatever is wrong with it, while it is read too, is damage."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            yield archive
    except Exception as error:  # whatever zipfile and numpy trip over in damaged bytes
        raise DataError(f"damaged: {message_of(error)}") from None


def _reasons(stored: UInt8[np.ndarray, " byte"]) -> list[str]:
    return stored.tobytes().decode().split("\0")


def _groups(
    paths: Sequence[str], pool: ThreadPoolExecutor, *, readers: int
) -> Iterator[list[tuple[str, Picture | Unreadable]]]:
    """The photographs of a batch, read; in parts, if they are large.

    A photograph from a phone takes 36 MB, eight from good cameras would take two gigabytes. The
    parts depend on the photographs alone, and not on how many are read at a time.
    """
    group: list[tuple[str, Picture | Unreadable]] = []
    pixels = 0
    for start in range(0, len(paths), readers):
        some = paths[start : start + readers]
        for path, one in zip(some, pool.map(_read, some), strict=True):
            size = 0 if isinstance(one, Unreadable) else one.shape[0] * one.shape[1]
            if group and pixels + size > MOST_PIXELS:
                yield group
                group, pixels = [], 0
            group.append((path, one))
            pixels += size
    yield group


def _regions(extractor: Extractor, pictures: Sequence[Picture]) -> list[PhotographRegions]:
    try:
        return extractor(pictures) if pictures else []
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NoMemoryError(
            f"{len(pictures)} photographs at once need more memory than there is: give a smaller "
            f"--batch-size, and another OUT ({message_of(error)})."
        ) from error


def _read(path: str) -> Picture | Unreadable:
    if "://" not in path and not os.path.lexists(path):
        # Not one to leave out: it was there when all were looked at, or is on another host.
        raise DataError(f"{path}: cannot be seen from {socket.gethostname()} (any more).")
    try:
        return read_photograph(path)
    except UnreadablePhotographError as error:
        return Unreadable(reason=str(error) or "cannot be read")


def _sound(regions: PhotographRegions, *, path: str) -> Found:
    assert len(regions.features), "every photograph has a region"
    if not np.isfinite(regions.features).all():
        raise DataError(
            f"{path}: expected features that are finite numbers in float16, found others: the "
            "detector or the backbone does not fit, or has damaged weights."
        )
    return regions
