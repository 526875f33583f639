"""Files of weights, judged by what their headers say before a number of them is read.

safetensors and nothing else: eight bytes with the length of the header, the header (names, types,
shapes and offsets, as JSON), and the numbers. What can be wrong with the header is found by the
library itself, which is given none that would take gigabytes to understand.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpfean.errors import CpfeanError
from cpfean.files import is_there, open_file, what_it_is

_LONGEST_HEADER = 2**23  # bytes: room for 50,000 tensors
_CHUNK = 2**22  # numbers that are looked at together
_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
}
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})


class Spec(NamedTuple):
    """What a header says of a tensor: its type by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def read_header(path: Path, *, error: type[CpfeanError]) -> dict[str, Spec]:
    """The tensors of a safetensors file by name; takes no memory for the numbers.

    Args:
        path: of the file.
        error: what to raise.

    Raises:
        CpfeanError: of the type `error`: missing, no such file, cut short, or damaged.
    """
    if not is_there(path):
        raise error(f"{path}: missing.")
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(64)
    except OSError as reason:
        raise error(f"{path}: cannot be read: {reason.strerror or reason}.") from None
    length = int.from_bytes(start[:8], "little")
    # A header is a JSON object.
    if size < 10 or start[8:9] != b"{" or length > size - 8:
        cut = size >= 10 and start[8:9] == b"{"
        found = f"{size:,} bytes, cut short" if cut else what_it_is(start) or "something else"
        raise error(
            f"{path}: damaged: expected a safetensors file, found "
            f"{found if size else 'an empty file'}; fetch it again."
        )
    if length > _LONGEST_HEADER:
        raise error(
            f"{path}: expected a header of at most {_LONGEST_HEADER:,} bytes, found {length:,}."
        )
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Spec(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as reason:
        raise error(
            f"{path}: damaged: expected a whole safetensors file, found {size:,} bytes that are "
            f"none ({reason}); fetch it again."
        ) from None


def read_metadata(path: Path) -> dict[str, str]:
    """What was noted beside the tensors of a file whose header is sound."""
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata() or {})


def check_finite(
    path: Path, names: Iterable[str] | None = None, *, error: type[CpfeanError]
) -> None:
    """Refuses weights that are no finite numbers; reads the file in pieces of 16 MB or so.

    Args:
        path: of a file whose header is sound.
        names: which tensors to look at; all if None. Those that hold no floats are left out.
        error: what to raise.

    Raises:
        CpfeanError: of the type `error`: names the first such tensor.
    """
    with safe_open(path, framework="pt") as opened:
        for name in opened.keys() if names is None else names:
            part = opened.get_slice(name)
            shape = part.get_shape()
            if part.get_dtype() not in FLOATS or 0 in shape:
                continue
            rows = shape[0] if shape else 1
            step = max(1, _CHUNK * rows // _numel(shape))
            for first in range(0, rows, step):
                some = part[first : first + step] if shape else opened.get_tensor(name)
                check_tensor_finite(some, name, source=path, error=error)


def check_tensor_finite(
    tensor: Tensor, name: str, *, source: Path | str, error: type[CpfeanError]
) -> None:
    """Refuses a tensor that holds NaN or an infinity.

    Raises:
        CpfeanError: of the type `error`.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise error(f"{source}: {name} has {bad:,} numbers that are not finite (NaN or infinite).")


def specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """What a header says of such tensors; they may be without storage."""
    return {
        name: Spec(_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def check_same(
    found: Mapping[str, Spec],
    expected: Mapping[str, Spec],
    *,
    source: Path | str,
    error: type[CpfeanError],
) -> None:
    """Refuses weights whose names, types or shapes are not those expected.

    Raises:
        CpfeanError: of the type `error`: the first few that differ.
    """
    wrong = [f"no {name}" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"an unknown {name}" for name in sorted(found.keys() - expected.keys())]
    wrong += [
        f"{name} is {found[name]} and not {spec}"
        for name, spec in expected.items()
        if name in found and found[name] != spec
    ]
    if wrong:
        more = f", and {len(wrong) - 4:,} more" if len(wrong) > 4 else ""
        raise error(f"{source}: weights of another model: {', '.join(wrong[:4])}{more}.")


def _numel(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


__all__ = [
    "FLOATS",
    "Spec",
    "check_finite",
    "check_same",
    "check_tensor_finite",
    "read_header",
    "read_metadata",
    "specs",
]
