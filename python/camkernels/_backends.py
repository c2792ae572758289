# SPDX-License-Identifier: MIT
"""Which backend computes a call. One predicate, `can_run`, serves the choice, the errors, the tests and `info`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _gpu, _ops
from . import triton as _triton

BACKENDS = ("cpu", "cuda", "triton", "reference")
PAIRS = {"hash_grid_mlp": ("hash_grid", "modulated_mlp")}  # ops that compiled kernels compute one after the other
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


@dataclass(frozen=True)
class Call:
    """What a choice depends on: the operator and where its tensors are; index: of the GPU, None for the current one;
    widest: how many channels a point has at most on its way through an MLP, 0 for other ops."""

    op: str
    device_type: str
    index: int | None = None
    widest: int = 0


def can_run(backend: str, call: Call) -> str | None:
    """None if the backend can compute the call, else the reason why not."""
    if backend == "reference":
        return None
    if backend == "triton":
        return _triton.reason_against(call.op, call.device_type, call.widest)
    if call.op in PAIRS:
        reasons = [can_run(backend, replace(call, op=op)) for op in PAIRS[call.op]]
        return next((reason for reason in reasons if reason is not None), None)
    if backend != call.device_type:
        return f"the tensors are on {call.device_type}, backend {backend!r} computes on {backend}"
    if not _ops.has_kernel(call.op, backend):
        missing = {"cpu": _ops.cpu_missing, "cuda": _ops.cuda_missing}[backend] if _ops.is_declared(call.op) else None
        return missing or f"{call.op} has no {backend} kernels yet"
    return _gpu.reason_against(call.index) if backend == "cuda" else None


def choose(call: Call, backend: str | None) -> str:
    """The backend to use: the one asked for, else CAMKERNELS_BACKEND, else the first that can run, or RuntimeError."""
    asked = backend or os.environ.get("CAMKERNELS_BACKEND") or None
    if asked is None:
        return next(b for b in PREFERENCE.get(call.device_type, ("reference",)) if can_run(b, call) is None)
    if asked not in BACKENDS:
        source = "backend" if backend else "CAMKERNELS_BACKEND"
        raise ValueError(f"{call.op}: {source} must be one of {', '.join(BACKENDS)}, got {asked!r}")
    reason = can_run(asked, call)
    if reason is not None:
        able = [b for b in BACKENDS if can_run(b, call) is None]
        raise RuntimeError(f"{call.op}: backend {asked!r} cannot run: {reason}; available: {', '.join(able)}")
    return asked


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of autocast where it is on for this device, else None."""
    if device_type == "meta":  # has no autocast, and asking raises
        return None
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def round_to_autocast(y: Tensor) -> Tensor:
    """Under autocast an output is rounded to its dtype; arguments are read as they are: nothing is copied or lost."""
    dtype = autocast_dtype(y.device.type)
    return y if dtype is None or y.dtype == torch.float64 else y.to(dtype)


def define(definition: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Tensor:
    """The result of a definition, without autocast, which would round each product inside."""
    if autocast_dtype(x.device.type) is None:
        return definition(x, *args, **options)
    with torch.autocast(x.device.type, enabled=False):
        return definition(x, *args, **options)
