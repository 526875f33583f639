"""SIMD vectors of a processor as values of numba: what a compiled kernel is written in.

    z = splat(0.0, array)
    z = z + load(array, at) * 2.0
    store(array, at, exp(z))

A vector holds 16 float32 or 8 float64, 512 bits; LLVM splits it where registers are narrower. With
loops over plain arrays LLVM has to prove, or to check at run time, that the arrays do not overlap,
and pays for it in every one of the short loops over regions: written so, the same kernel took 1.5
times as long.

Arithmetic (+ - * /) works between vectors and with numbers. Sums of products may be contracted.
NaN and infinity are respected: no operation hides them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import (
    intrinsic,
    lower_builtin,
    models,
    register_jitable,
    register_model,
)

VECTOR_BITS = 512
_FLAGS = ("contract", "nsz", "arcp")
_FLOATS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
# log2(e), and the Taylor coefficients of 2^f, |f| <= 1/2, until they stop to matter.
_LOG2_E = 1 / math.log(2)
_TERMS_32 = tuple(math.log(2) ** n / math.factorial(n) for n in range(7, -1, -1))
_TERMS_64 = tuple(math.log(2) ** n / math.factorial(n) for n in range(13, -1, -1))


class SimdVector(types.Type):
    """The numba type of a vector.

    Attributes:
        number: type of its elements, float32 or float64.
        count: of its elements.
        vector: the LLVM type.
    """

    def __init__(self, number: types.Float) -> None:
        super().__init__(name=f"SimdVector({number})")
        self.number = number
        self.count = VECTOR_BITS // number.bitwidth
        self.vector = ir.VectorType(_FLOATS[number], self.count)
        # A vector of integers as wide, for the bits of an exponent.
        self.bits = ir.VectorType(ir.IntType(number.bitwidth), self.count)
        self.suffix = f"v{self.count}f{number.bitwidth}"

    @property
    def key(self) -> types.Float:
        """Two types are the same if this is."""
        return self.number


@register_model(SimdVector)
class _SimdVectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, simd: SimdVector) -> None:
        super().__init__(manager, simd, simd.vector)


def _spread(context: Any, builder: Any, simd: SimdVector, value: Any, kind: types.Type) -> Any:
    """IR of a number in every element; of a vector, the vector."""
    if isinstance(kind, SimdVector):
        return value
    number = context.cast(builder, value, kind, simd.number)
    undefined = ir.Constant(simd.vector, ir.Undefined)
    index = ir.IntType(32)
    first = builder.insert_element(undefined, number, ir.Constant(index, 0))
    pattern = ir.Constant(ir.VectorType(index, simd.count), [0] * simd.count)
    return builder.shuffle_vector(first, undefined, pattern)


def _constant(simd: SimdVector, value: float) -> Any:
    return ir.Constant(simd.vector, [value] * simd.count)


def _define_operator(operation: Callable[..., Any], instruction: str) -> None:
    """Teaches numba an operator between vectors, and between a vector and a number."""

    @infer_global(operation)
    class _Typing(AbstractTemplate):
        def generic(self, arguments: Any, keywords: Any) -> Any:
            vectors = [kind for kind in arguments if isinstance(kind, SimdVector)]
            numbers = [kind for kind in arguments if isinstance(kind, types.Number)]
            if not vectors or len(vectors) + len(numbers) < 2 or len(set(vectors)) > 1:
                return None
            return signature(vectors[0], *arguments)

    def lower(context: Any, builder: Any, sig: Any, arguments: Any) -> Any:
        simd = sig.return_type
        left, right = (
            _spread(context, builder, simd, value, kind)
            for value, kind in zip(arguments, sig.args, strict=True)
        )
        return getattr(builder, instruction)(left, right, flags=_FLAGS)

    lower_builtin(operation, SimdVector, SimdVector)(lower)
    lower_builtin(operation, SimdVector, types.Number)(lower)
    lower_builtin(operation, types.Number, SimdVector)(lower)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


def _vector_of(array):
    return SimdVector(array.dtype)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.gep(data, [index])
    return builder.bitcast(pointer, _vector_of(array_type).vector.as_pointer())


@intrinsic
def load(typing, array, index):
    """A vector of what a contiguous array has from an index on; nobody checks its end."""

    def emit(context, builder, sig, arguments):
        pointer = _address(context, builder, sig.args[0], *arguments)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return signature(_vector_of(array), array, types.intp), emit


@intrinsic
def store(typing, array, index, value):
    """Writes a vector into a contiguous array; nobody checks its end."""

    def emit(context, builder, sig, arguments):
        pointer = _address(context, builder, sig.args[0], *arguments[:2])
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return signature(types.void, array, types.intp, value), emit


@intrinsic
def splat(typing, value, array):
    """A vector of one number, as wide as those of an array."""

    def emit(context, builder, sig, arguments):
        return _spread(context, builder, sig.return_type, arguments[0], sig.args[0])

    return signature(_vector_of(array), value, array), emit


def _unary(name: str) -> Any:
    """An LLVM operation on every element."""

    @intrinsic
    def operation(typing, x):
        def emit(context, builder, sig, arguments):
            kind = ir.FunctionType(x.vector, [x.vector])
            function = cgutils.get_or_insert_function(builder.module, kind, f"{name}.{x.suffix}")
            return builder.call(function, arguments)

        return signature(x, x), emit

    return operation


floor = _unary("llvm.floor")
sqrt = _unary("llvm.sqrt")
absolute = _unary("llvm.fabs")


def _reduction(name: str, start: float | None) -> Any:
    """An LLVM reduction over the elements."""

    @intrinsic
    def operation(typing, x):
        def emit(context, builder, sig, arguments):
            number = _FLOATS[x.number]
            first = [] if start is None else [ir.Constant(number, start)]
            kind = ir.FunctionType(number, [*(value.type for value in first), x.vector])
            function = cgutils.get_or_insert_function(builder.module, kind, f"{name}.{x.suffix}")
            return builder.call(function, first + list(arguments), fastmath=("reassoc", *_FLAGS))

        return signature(x.number, x), emit

    return operation


total = _reduction("llvm.vector.reduce.fadd", 0.0)
largest = _reduction("llvm.vector.reduce.fmax", None)


@intrinsic
def where_above(typing, x, limit, yes, no):
    """`yes` where x > limit, `no` elsewhere and for NaN; vectors or numbers."""
    simd = next(kind for kind in (x, limit, yes, no) if isinstance(kind, SimdVector))

    def emit(context, builder, sig, arguments):
        spread = [
            _spread(context, builder, simd, value, kind)
            for value, kind in zip(arguments, sig.args, strict=True)
        ]
        return builder.select(builder.fcmp_ordered(">", *spread[:2]), *spread[2:])

    return signature(simd, x, limit, yes, no), emit


@intrinsic
def _two_to(typing, n):
    """2^n for a whole n that is an exponent of the type."""
    bias, shift = {32: (127, 23), 64: (1023, 52)}[n.number.bitwidth]

    def emit(context, builder, sig, arguments):
        whole = builder.fptosi(arguments[0], n.bits)
        biased = builder.add(whole, ir.Constant(n.bits, [bias] * n.count))
        placed = builder.shl(biased, ir.Constant(n.bits, [shift] * n.count))
        return builder.bitcast(placed, n.vector)

    return signature(n, n), emit


@intrinsic
def _polynomial(typing, f):
    """The Taylor series of 2^f, by Horner's rule."""
    terms = _TERMS_32 if f.number == types.float32 else _TERMS_64

    def emit(context, builder, sig, arguments):
        result = _constant(f, terms[0])
        for term in terms[1:]:
            product = builder.fmul(result, arguments[0], flags=_FLAGS)
            result = builder.fadd(product, _constant(f, term), flags=_FLAGS)
        return result

    return signature(f, f), emit


@register_jitable
def exp(x):
    """e^x for x <= 0, to rounding; below the smallest normal number, that."""
    y = x * _LOG2_E
    y = where_above(_lowest(x), y, _lowest(x), y)
    n = floor(y + 0.5)
    return _polynomial(y - n) * _two_to(n)


@intrinsic
def _lowest(typing, x):
    """The smallest exponent of a normal number."""
    lowest = {32: -126.0, 64: -1022.0}[x.number.bitwidth]
    return signature(x, x), lambda context, builder, sig, arguments: _constant(x, lowest)


@register_jitable
def maximum(x, y):
    """The larger one of each two elements; y where x is NaN."""
    return where_above(x, y, x, y)


__all__ = [
    "VECTOR_BITS",
    "SimdVector",
    "absolute",
    "exp",
    "floor",
    "largest",
    "load",
    "maximum",
    "splat",
    "sqrt",
    "store",
    "total",
    "where_above",
]
