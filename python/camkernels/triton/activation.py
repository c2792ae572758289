# SPDX-License-Identifier: MIT
"""Activations of the modulated MLP and their derivatives in Triton: the formulas of csrc/math/activation.h."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .._modulation import ACTIVATIONS

NONE, RELU, LEAKY_RELU, GELU, SILU, SOFTPLUS, SIGMOID, TANH, EXPONENTIAL, SQUAREPLUS, SINE, RESIDUAL_SINE = (
    tl.constexpr(i) for i in range(len(ACTIVATIONS))
)
SOFTPLUS_LIMIT = tl.constexpr(20.0)  # the identity beyond, as in PyTorch


@triton.jit
def _logistic(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def activate(z, rate, A: tl.constexpr):
    """f(z) of activation A. rate: omega of a sine, frequencies that broadcast to z of a residual one."""
    if A == RELU:
        f = tl.where(z < 0, 0.0, z)
    elif A == LEAKY_RELU:
        f = tl.where(z < 0, 0.01 * z, z)
    elif A == GELU:
        f = 0.5 * z * (1 + tl.erf(z * 0.70710678118654752))
    elif A == SILU:
        f = z * _logistic(z)
    elif A == SOFTPLUS:
        f = tl.where(z > SOFTPLUS_LIMIT, z, tl.where(z < 0, 0.0, z) + libdevice.log1p(tl.exp(-tl.abs(z))))
    elif A == SIGMOID:
        f = _logistic(z)
    elif A == TANH:
        f = libdevice.tanh(z)
    elif A == EXPONENTIAL:
        f = tl.exp(z)
    elif A == SQUAREPLUS:
        f = 0.5 * (z + tl.sqrt(z * z + 4))
    elif A == SINE:
        f = tl.sin(rate * z)
    elif A == RESIDUAL_SINE:
        f = z + tl.sin(rate * z)
    else:
        f = z
    return f


@triton.jit
def slope(z, rate, A: tl.constexpr):
    """f'(z) of activation A; at a kink that of the left, as PyTorch's is."""
    if A == RELU:
        f = tl.where(z > 0, 1.0, tl.zeros_like(z))
    elif A == LEAKY_RELU:
        f = tl.where(z > 0, 1.0, tl.full(z.shape, 0.01, z.dtype))
    elif A == GELU:
        above = 0.5 * (1 + tl.erf(z * 0.70710678118654752))
        f = above + z * (0.39894228040143268 * tl.exp(-0.5 * z * z))
    elif A == SILU:
        s = _logistic(z)
        f = s + z * (s * (1 - s))
    elif A == SOFTPLUS:
        f = tl.where(z > SOFTPLUS_LIMIT, 1.0, _logistic(z))
    elif A == SIGMOID:
        s = _logistic(z)
        f = s * (1 - s)
    elif A == TANH:
        t = libdevice.tanh(z)
        f = 1 - t * t
    elif A == EXPONENTIAL:
        f = tl.exp(z)
    elif A == SQUAREPLUS:
        f = 0.5 * (1 + z / tl.sqrt(z * z + 4))
    elif A == SINE:
        f = rate * tl.cos(rate * z)
    elif A == RESIDUAL_SINE:
        f = 1 + rate * tl.cos(rate * z)
    else:
        f = tl.full(z.shape, 1.0, z.dtype)
    return f
