# SPDX-License-Identifier: MIT
"""How much a backend may differ from the definition, and why; public as part of `camkernels.testing`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

# (rtol, atol) of |a - b| <= atol + rtol * (|b| + spread(b)), by the table's or weights' dtype
TOLERANCES: dict[torch.dtype, dict[str, tuple[float, float]]] = {
    # Different order of summation only: 2^7 corners times an ulp of 1.1e-16 leaves two digits to spare.
    torch.float64: {
        "value": (1e-12, 1e-12),
        "jacobian": (1e-12, 1e-12),
        "grad.points": (1e-12, 1e-12),
        "grad.parameters": (1e-12, 1e-12),
        "second": (1e-12, 1e-12),
    },
    # Positions agree to the bit (fused multiply-add), so an ulp (6e-8) counts once per factor and per term: up to 7
    # factors and 2^7 terms for a value; derivatives cancel and are scaled by the resolution, which spread() carries;
    # sums over points come in any order (atomics, threads), the same entry up to some hundred times. Longer sums, as of
    # wide layers, err as the root of their length.
    torch.float32: {
        "value": (2e-6, 2e-6),
        "jacobian": (5e-6, 5e-6),
        "grad.points": (1e-5, 1e-5),
        "grad.parameters": (1e-5, 1e-5),
        "second": (2e-5, 2e-5),
    },
    # Sums are float32 on both sides; results stored in the parameters' dtype may differ by one ulp of storage, 2^-10
    # and 2^-7 relative. The gradient of the points is float32 and sees the same stored rows: float32's tolerance.
    # Second order is fed by a first-order cotangent and stored again: two ulps.
    torch.float16: {
        "value": (1e-3, 1e-5),
        "jacobian": (5e-6, 5e-6),
        "grad.points": (1e-5, 1e-5),
        "grad.parameters": (1e-3, 1e-5),
        "second": (2e-3, 1e-4),
    },
    torch.bfloat16: {
        "value": (8e-3, 1e-5),
        "jacobian": (5e-6, 5e-6),
        "grad.points": (1e-5, 1e-5),
        "grad.parameters": (8e-3, 1e-5),
        "second": (1.6e-2, 1e-4),
    },
}
# Where PyTorch allows TF32, at least so much, whatever the parameters are stored in. A factor of 10 bits is off by up
# to 2^-11 of itself, a product by 2^-10. A value comes from as many products in a row as there are layers (4 in the
# cases), a gradient from twice, a second derivative from four times as many: errors of either sign add up, and steep
# activations multiply those of derivatives, SIREN's first sine by up to 30.
TF32: dict[str, tuple[float, float]] = {
    "value": (2e-3, 2e-3),
    "grad.points": (1.5e-2, 1.5e-2),
    "grad.parameters": (1.5e-2, 1.5e-2),
    "second": (3e-2, 3e-2),
}
# Where it allows bfloat16: three bits fewer.
BFLOAT16 = {quantity: (8 * rtol, 8 * atol) for quantity, (rtol, atol) in TF32.items()}


def tolerance(
    dtype: torch.dtype, quantity: str, *, tf32: bool = False, bfloat16: bool = False
) -> tuple[float, float]:  # fmt: skip
    """(rtol, atol) of a quantity: "value" | "jacobian" | "grad.points" | "grad.parameters" | "second".

    tf32, bfloat16: where products of float32 may be of those; products of float64 never are."""
    rtol, atol = TOLERANCES[dtype][quantity]
    if not (tf32 or bfloat16) or dtype == torch.float64:
        return rtol, atol
    least = (BFLOAT16 if bfloat16 else TF32)[quantity]
    return max(rtol, least[0]), max(atol, least[1])


@contextmanager
def _precision(matmul: Any, name: str) -> Iterator[None]:
    before = matmul.fp32_precision
    matmul.fp32_precision = name
    try:
        yield
    finally:
        matmul.fp32_precision = before


def tf32(allowed: bool) -> AbstractContextManager[None]:
    """PyTorch's setting for products of float32 on a GPU."""
    return _precision(torch.backends.cuda.matmul, "tf32" if allowed else "ieee")


def bfloat16(allowed: bool) -> AbstractContextManager[None]:
    """PyTorch's setting for products of float32 on the CPU."""
    return _precision(torch.backends.mkldnn.matmul, "bf16" if allowed else "ieee")
