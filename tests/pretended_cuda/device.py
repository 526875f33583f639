"""A CUDA device that is not there: its tensors say `cuda:0` and compute on the processor.

What PyTorch decides by the device of a tensor happens as on a GPU: which operators autocast puts
into which type, which kernels an optimizer takes, what a copy is. What a GPU refuses is refused:
an operator on tensors of both devices, `.numpy()` of a tensor of the device. What makes the host
wait for the device is recorded, with the line of the product that asked for it, and so is every
operator that starts a kernel.

It cannot tell of what lies below the operators: numerics and speed of CUDA's kernels, which kernel
attention takes, streams, NCCL, and memory. Inference mode stands for `no_grad`, since tensors
like these cannot be made in it.

A tensor may also be without numbers, on the inside on the "meta" device: then only shapes are
computed, and a step of any size is counted at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from cpfean.training.counting import is_view
from tests.pretended_cuda import gru, scores

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten

# Their results have a size, or are a number, that the host has to know.
_WAITING = {
    _aten._local_scalar_dense.default: "reads a number",
    _aten.equal.default: "reads whether two tensors are equal",
    _aten.nonzero.default: "waits for the number of what is not zero",
    _aten.masked_select.default: "waits for the number of what is selected",
    _aten.repeat_interleave.Tensor: "waits for the number of repetitions",
    _aten._unique2.default: "waits for the number of different values",
    _aten.unique_dim.default: "waits for the number of different values",
    _aten.unique_consecutive.default: "waits for the number of different values",
}
_INDEXING = {
    _aten.index.Tensor,
    _aten._unsafe_index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
# Of both devices by their nature: the sizes of a packed sequence's steps, and of what is scored,
# are the host's.
_OF_BOTH = {
    _aten._pack_padded_sequence.default,
    _aten._pad_packed_sequence.default,
    *scores.KERNELS,
}
_KERNELS = {**gru.KERNELS, **scores.KERNELS}
# They give memory and start nothing.
_ALLOCATING = ("empty", "new_empty", "lift_fresh", "detach", "alias", "set_", "_unsafe_view")


@dataclass(frozen=True)
class Record:
    """What happened on the device.

    Attributes:
        waits: how often the host waited for it, by reason and line.
        launches: how many operators started kernels, by name.
    """

    waits: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Forgets all."""
        self.waits.clear()
        self.launches.clear()


class Pretended(Tensor):
    """A tensor of the device, around one that has its numbers, or its shape alone."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made: Pretended = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.inner!r})"

    def numpy(self, **_: Any) -> Any:
        """Refused, in the words of a GPU."""
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        """The numbers; the host waits for them."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the numbers, by which safetensors tells tensors that share memory."""
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        """That of the numbers."""
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} of a tensor of the pretended device, outside of pretended()")


class _Mode(TorchDispatchMode):
    """Runs every operator."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
        on_device = _on_device(func, args, kwargs, ours)
        if not ours and not on_device:
            return func(*args, **kwargs)
        _refuse_mixed(func, tensors, ours)
        if reason := _wait(func, args, kwargs, ours, on_device=on_device):
            self.record.waits[f"{place()}: {reason}"] += 1
        if (on_device or func in _WAITING) and starts_kernel(func):
            self.record.launches[str(func)] += 1
        return _run(func, args, kwargs, on_device=on_device)


def _on_device(func: Any, args: Any, kwargs: dict[str, Any], ours: list[Pretended]) -> bool:
    """Whether the result is on the device."""
    if func is _aten.copy_.default:
        return isinstance(args[0], Pretended)
    wanted = kwargs.get("device")
    return bool(ours) if wanted is None else torch.device(wanted).type == "cuda"


def _refuse_mixed(func: Any, tensors: list[Tensor], ours: list[Pretended]) -> None:
    """Refuses tensors of both devices, but for single numbers of the host and indices."""
    theirs = [tensor for tensor in tensors if not isinstance(tensor, Pretended) and tensor.ndim]
    if not ours or not theirs or func in _COPIES | _OF_BOTH:
        return
    if func in _INDEXING and isinstance(tensors[0], Pretended):
        return
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
        f"cpu! ({func} at {place()})"
    )


def _wait(
    func: Any, args: Any, kwargs: dict[str, Any], ours: list[Pretended], *, on_device: bool
) -> str | None:
    """Why the host waits for the device, if it does."""
    if ours and func in _WAITING:
        return _WAITING[func]
    if ours and func in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "waits for the number of what a mask selects"
        if any(not isinstance(index, Pretended) for index in indices):
            return "copies an index to the device"
    if func in _COPIES:
        source = args[1] if func is _aten.copy_.default else args[0]
        if not on_device and isinstance(source, Pretended):
            return "copies from the device"
        at_once = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        at_once = at_once and getattr(source, "pretends_pinned", False)
        if on_device and not isinstance(source, Pretended) and not at_once:
            return "copies to the device from memory that is not pinned, or blocking"
    elif func is _aten.where.self and any(
        isinstance(x, Tensor) and not isinstance(x, Pretended) for x in args
    ):
        return "copies a number to the device"
    return None


@cache
def starts_kernel(func: Any) -> bool:
    """Whether it does more than to look at memory in another way, or to give some."""
    name = func._schema.name.removeprefix("aten::")
    return not is_view(func) and not name.startswith(_ALLOCATING)


def _run(func: Any, args: Any, kwargs: dict[str, Any], *, on_device: bool) -> Any:
    """Computes with what is inside; without numbers, if something has none."""
    shapes_only = any(
        (tensor.inner if isinstance(tensor, Pretended) else tensor).device.type == "meta"
        for tensor in _tensors((args, tuple(kwargs.values())))
    )

    def inside(tensor: Tensor) -> Tensor:
        inner = tensor.inner if isinstance(tensor, Pretended) else tensor
        if shapes_only and inner.device.type != "meta":
            inner = inner.to("meta")
            if isinstance(tensor, Pretended) and _mutates(func):
                tensor.inner = inner
        return inner

    inner = {name: _each(inside, value) for name, value in kwargs.items() if name != "pin_memory"}
    if kwargs.get("device") is not None:
        inner["device"] = torch.device("meta" if shapes_only else "cpu")
    found = _KERNELS.get(func, func)(*_each(inside, args), **inner)
    if func is _aten._pack_padded_sequence.default:
        return Pretended(found[0]), found[1]
    if _mutates(func):
        return kwargs.get("out", args[0]) if func._schema.returns else None
    return _each(Pretended, found) if on_device else found


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in tuples and lists of whatever."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


def _each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The same with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)([_each(change, one) for one in value])
    return value


@cache
def _mutates(func: Any) -> bool:
    return any(
        argument.alias_info is not None and argument.alias_info.is_write
        for argument in func._schema.arguments
    )


def place() -> str:
    """The line of this project that is being run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT / "cpfean") or (
            file.is_relative_to(ROOT / "tests") and file != Path(__file__)
        ):
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


@contextmanager
def pretended() -> Iterator[Record]:
    """Inside, there is a GPU; what happens on it is recorded."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, and need not be pretended")
    exchange = _switch()
    record = Record()

    def inference(self: Any) -> None:
        self.instead = torch.no_grad()
        self.instead.__enter__()

    def pinned(tensor: Tensor, *_: Any) -> Tensor:
        copy = tensor.clone()
        copy.pretends_pinned = True  # type: ignore[attr-defined]
        return copy

    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        (torch.cuda, "get_device_name", lambda *_: "a pretended card"),
        # What an H100 tells.
        (
            torch.cuda,
            "get_device_properties",
            lambda *_: SimpleNamespace(shared_memory_per_block_optin=232_448),
        ),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "manual_seed_all", lambda _: None),
        (torch.cuda, "max_memory_allocated", lambda *_: 0),
        (torch.cuda, "synchronize", lambda *_: None),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.inference_mode, "__enter__", inference),
        (
            torch.inference_mode,
            "__exit__",
            lambda self, *_: self.instead.__exit__(None, None, None),
        ),
        (torch.Tensor, "pin_memory", pinned),
        # By exact type, not by whether it is a tensor.
        (
            _foreach_utils,
            "_foreach_supported_types",
            [*_foreach_utils._foreach_supported_types, Pretended],
        ),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        exchange()
        stack.callback(exchange)
        # Numbers become tensors of the host first, and are copied from there, as on a GPU.
        stack.callback(
            torch._C._set_only_lift_cpu_tensors,
            torch._C._only_lift_cpu_tensors(),  # type: ignore[attr-defined]
        )
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        stack.callback(
            torch.__future__.set_overwrite_module_params_on_conversion,
            torch.__future__.get_overwrite_module_params_on_conversion(),
        )
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        # In this thread: autograd has none for a device that was not there when it began.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Mode(record))
        yield record


def _switch() -> Callable[[], None]:
    """What switches the device on, and off again: `exchange_cuda` of switch.cpp, compiled once."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("pretending a GPU takes a C++ compiler (c++, or what $CXX says)")
    source = Path(__file__).with_name("switch.cpp")
    torch_folder = Path(torch.__file__).parent
    made_from = source.read_bytes() + f"{torch.__version__} {torch_folder} {compiler}".encode()
    library = ROOT / "build" / f"pretended-cuda-{hashlib.sha256(made_from).hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.partial")
        words = [compiler, "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(partial)]
        words += [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
        done = subprocess.run(
            [*words, "-lc10", "-ltorch_cpu"], capture_output=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stderr
        partial.replace(library)
    exchange: Callable[[], None] = ctypes.CDLL(str(library)).exchange_cuda
    return exchange
