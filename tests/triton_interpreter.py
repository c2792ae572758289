# SPDX-License-Identifier: MIT
"""Repairs of Triton's interpreter (3.6 to 3.9), which otherwise computes wrong numbers without saying so.

bfloat16 is carried as bit patterns in uint16, on which elementwise operators, sums and products compute as if they were
numbers; conversions to it truncate. Here they compute in float32 and round to nearest even. A fused multiply-add rounds
twice in float32; here once, through float64, in which the product of two float32 numbers is exact. Functions of the
device's library, which the interpreter does not have, are numpy's. Not repaired: unary functions and atomics of
bfloat16, which the kernels do not use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, InterpreterOptions, TensorHandle


def is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widen(handle: TensorHandle) -> np.ndarray:
    """The numbers of a handle, bfloat16 as float32."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if is_bfloat16(handle) else handle.data


def narrow(numbers: np.ndarray) -> np.ndarray:
    """bfloat16 patterns of float32 numbers, rounded to nearest even; NaN stays NaN."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def repair() -> None:
    """Repairs the interpreter of this process; once."""
    if getattr(InterpreterBuilder, "repaired", False):
        return
    InterpreterBuilder.repaired = True
    _repair_conversions()
    _repair_arithmetic()
    for name in ("tanh", "log1p"):
        setattr(libdevice, name, _unary(getattr(np, name)))
    # a third of the time: checks whose findings nobody reads; hashing overflows on purpose
    interpreter.interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)


def _unary(function: Callable[[np.ndarray], np.ndarray]) -> Callable[[tl.tensor], tl.tensor]:
    return lambda z: tl.tensor(TensorHandle(function(z.handle.data), z.dtype), z.type)


def _repair_conversions() -> None:
    builder, old_cast, old_convert = (
        InterpreterBuilder,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        have, want = source.dtype.scalar, target.scalar
        if have == want:
            return source
        if have == tl.bfloat16:
            return TensorHandle(widen(source).astype(interpreter._get_np_dtype(target)), want)
        if want == tl.bfloat16:
            return TensorHandle(narrow(source.data), want)
        return old_cast(self, source, target)

    def create_fp_to_fp(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if nearest and tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return old_convert(self, source, target, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_arithmetic() -> None:
    builder, reductions = InterpreterBuilder, interpreter.ReduceOps
    old_binary, old_dot, old_fma, old_sum = (
        builder.binary_op,
        builder.create_dot,
        builder.create_fma,
        reductions.sum,
    )

    def binary_op(self: Any, left: TensorHandle, right: TensorHandle, operator: Any) -> TensorHandle:
        if not is_bfloat16(left):
            return old_binary(self, left, right, operator)
        out = operator(widen(left), widen(right))
        return TensorHandle(out, tl.int1) if out.dtype == bool else TensorHandle(narrow(out), tl.bfloat16)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, accumulator: TensorHandle, *rest: Any) -> TensorHandle:
        if is_bfloat16(a) or is_bfloat16(b):
            product = np.matmul(widen(a), widen(b), dtype=np.float32)
            return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)
        return old_dot(self, a, b, accumulator, *rest)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if z.dtype.scalar != tl.float32:
            return old_fma(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(np.float32), tl.float32)

    def reduce_sum(self: Any, x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return old_sum(self, x)
        out = np.sum(widen(x.handle), axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(out).reshape(np.shape(out)), tl.bfloat16)

    builder.binary_op, builder.create_dot, builder.create_fma = binary_op, create_dot, create_fma
    reductions.sum = reduce_sum
