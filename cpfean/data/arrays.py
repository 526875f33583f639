"""One `.npy` file, checked before a byte of its content is trusted.

A header may promise any shape and any type, pickled objects included. So it is read by numpy's own
header parser, the promised size is compared with the file's, and only then is the file mapped.
Nothing is ever unpickled and nothing is allocated by what a header says.
"""

from __future__ import annotations

import errno
import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cpfean.data.findings import Findings
from cpfean.files import NotAFileError, open_file, what_it_is

_LONGEST_HEADER = 10_000  # bytes, numpy's own limit; ours are about 120
_SMALL = 2**24  # bytes that are read in no time, whatever they hold
_MOST_HOLES = 10_000


def map_array(path: Path, findings: Findings) -> np.ndarray | None:
    """Maps an array of numbers, read-only; None, and a finding, for anything else."""
    name = path.name
    try:
        with open_file(path) as file:
            return _mapped(file, name, findings)
    except NotAFileError as error:
        findings.add("not-npy", name, f"{error.strerror}; replace it")
    except FileNotFoundError as error:
        findings.add("missing", name, f"{error.strerror}; put the file there")
    except OSError as error:
        findings.unreadable(name, error)
    return None


def _mapped(file: BinaryIO, name: str, findings: Findings) -> np.ndarray | None:
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    if start[:6] != np.lib.format.MAGIC_PREFIX:
        known = what_it_is(start)
        found = known or (f"a file that starts with {start[:6]!r}" if size else "an empty file")
        advice = (
            "take the array out of it and write it with numpy.save"
            if known
            else "write it with numpy.save"
        )
        findings.add("not-npy", name, f"expected an npy file, found {found}; {advice}")
        return None
    # Versions 1 and 2 differ in the width of the header's length; 3 is for field names.
    width = {b"\x01\x00": 2, b"\x02\x00": 4}.get(start[6:8])
    if width is None:
        findings.add(
            "not-npy",
            name,
            f"expected npy format 1.0 or 2.0, found the version bytes {start[6:8]!r}; "
            "write it again with numpy.save",
        )
        return None
    length = int.from_bytes(start[8 : 8 + width], "little")
    offset = 8 + width + length
    if length > _LONGEST_HEADER or offset > size:
        findings.add(
            "bad-header",
            name,
            f"expected a short header, found {length:,} bytes in a file of {size:,}; "
            "copy the file again",
        )
        return None
    file.seek(8)
    header = io.BytesIO(file.read(width + length))
    read = (
        np.lib.format.read_array_header_1_0 if width == 2 else np.lib.format.read_array_header_2_0
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers that Python 2 wrote
            shape, fortran, dtype = read(header)
    except Exception as error:  # a damaged header is Python text of any kind: any error can follow
        first = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        findings.add("bad-header", name, f"the header cannot be read: {first}; copy the file again")
        return None
    if dtype.hasobject:
        findings.add(
            "pickle",
            name,
            "expected numbers, found pickled Python objects, which are never loaded; save the "
            "array with a number type and rows of one length",
        )
        return None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        findings.add(
            "dtype", name, f"expected whole numbers or floats, found {dtype}; save it as such"
        )
        return None
    if not all(axis >= 1 for axis in shape):
        findings.add("shape", name, f"expected at least one of everything, found shape {shape}")
        return None

    count = 1
    for axis in shape:
        count *= axis  # Python's integers do not overflow, numpy's would
    expected = offset + count * dtype.itemsize
    if size != expected:
        kind, advice = (
            ("truncated", "copy it again") if size < expected else ("extra-bytes", "save it again")
        )
        findings.add(
            kind,
            name,
            f"expected {expected:,} bytes by its header ({dtype}, {shape}), found {size:,}; "
            f"{advice}",
        )
        return None
    written = _written(file, size)
    if written < size // 2:
        findings.add(
            "truncated",
            name,
            f"expected {size:,} bytes of numbers, found a file of which {written:,} were ever "
            "written (the others are a hole, as a copy that was broken off leaves it); copy it "
            "again",
        )
        return None
    try:
        mapped = np.memmap(
            file, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C"
        )
    except (OSError, ValueError) as error:
        findings.add("unreadable", name, f"cannot be mapped: {error}; check the disk")
        return None
    return mapped.view(np.ndarray)  # indexing a memmap object costs more than the copy it makes


def _written(file: BinaryIO, size: int) -> int:
    """Bytes of a file that are no hole; all of them where the system does not tell."""
    if size < _SMALL or not hasattr(os, "SEEK_DATA"):
        return size
    number, holes, end = file.fileno(), 0, 0
    try:
        for _ in range(_MOST_HOLES):
            start = os.lseek(number, end, os.SEEK_HOLE)
            if start >= size:
                break
            try:
                end = os.lseek(number, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # nothing but the hole up to the end
                    raise
                end = size
            holes += end - start
            if end >= size:
                break
    except OSError:
        return size
    return size - holes
