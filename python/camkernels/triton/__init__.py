# SPDX-License-Identifier: MIT
"""The Triton backend. Kernels are in a module per op, imported when first used: whoever has no Triton needs none."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

from .. import _ops

# those with kernels here
OPS = ("hash_grid", "modulated_mlp", "modulate", "coordinate_modulation", "hash_grid_mlp", "radial_basis")
WIDEST = 256  # channels of a layer that is computed within a program
# Derivatives of a derivative, and of a Jacobian, have none: second_order.py computes them by the definition's formula.
SECOND_ORDER = "reference formula"
MISSING = (
    None
    if importlib.util.find_spec("triton")
    else 'Triton is not installed; install it with pip install "camkernels[triton]"'
)
# Triton's interpreter executes kernels on the CPU, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def reason_against(op: str, device_type: str, widest: int = 0) -> str | None:
    """Why Triton cannot compute an op on tensors of a device; None if it can. widest: channels of an MLP's layers."""
    if op not in OPS:
        return f"{op} has no Triton kernels yet"
    if MISSING is not None:
        return MISSING
    if widest > WIDEST:
        return f"the Triton kernels take layers of up to {WIDEST} channels, got {widest}"
    if device_type == "cuda" or (INTERPRETED and device_type == "cpu"):
        return None
    return f"the tensors are on {device_type}, backend 'triton' computes on cuda"


def implement(operator: str, module: str, function: str) -> None:
    """Makes a function of a module of this folder the kernel of an operator of the dispatcher."""

    def kernel(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(*arguments)

    for key in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
        _ops.library.impl(operator, kernel, key)
