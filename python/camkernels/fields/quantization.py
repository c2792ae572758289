# SPDX-License-Identifier: MIT
"""Quantisation of parameters while they are trained: values of few bits, gradients as if they were not rounded."""

from __future__ import annotations

import torch
from torch import Tensor

FULL = 32  # bits that mean no quantisation


def quantize_tanh(p: Tensor, bits: int) -> Tensor:
    """q = sign(w) floor(|w| n) / n,  w = tanh(p),  n = 2^(bits - 1) - 1; the gradient is that of w.

    FFNeRV's; bits=32 gives p itself. A p of 1 becomes 0.742 with 6 bits: a scale does not start at 1.
    """
    if bits == FULL:
        return p
    n, w = 2.0 ** (bits - 1) - 1, torch.tanh(p)
    return _straight_through(w, torch.floor(w.abs() * n) / n * w.sign())


def quantize_range(p: Tensor, bits: int) -> Tensor:
    """q = sign(p) round(|p| n / s) s / n,  s = max |p| but at least 1e-6,  n = 2^(bits - 1) - 1, half to even; the
    gradient is that of p. mip-NeRF's in CAM; bits=32 gives p itself."""
    if bits == FULL:
        return p
    n, s = 2.0 ** (bits - 1) - 1, p.detach().abs().amax().clamp_min(1e-6)
    return _straight_through(p, torch.round((p / s).abs() * n) / n * s * p.sign())


def _straight_through(p: Tensor, rounded: Tensor) -> Tensor:
    return p + (rounded - p).detach()
