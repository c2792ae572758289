# SPDX-License-Identifier: MIT
"""Modulate in Triton: value and gradients. A program takes a group, what is normalised together.

Definition as in `camkernels.reference.modulate`. What a group adds to the gradients of scale and shift is stored for
each row, or number; PyTorch adds it up, in an order that never changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .._modulation import ACTIVATIONS
from .second_order import gradients

# Numbers of a row that a program takes at once, and up to how many of them one warp is enough: four to a thread.
# Estimated, not measured. A limit of registers keeps the assembler from spilling some for a higher occupancy.
MOST_NUMBERS, WARP_NUMBERS = 512, 128
MOST_REGISTERS = {torch.float32: 168, torch.float64: 255}

RELU, LEAKY_RELU, GELU, SILU, SOFTPLUS, SIGMOID, TANH, EXPONENTIAL, SQUAREPLUS, SINE, RESIDUAL_SINE = (
    tl.constexpr(i) for i in range(1, len(ACTIVATIONS))
)

# ---- formulas --------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(z):
    size = tl.abs(z)
    e = tl.exp(-2 * size)
    t = (1 - e) / (1 + e)
    if z.dtype == tl.float32:  # the difference loses digits where z is small: there by a continued fraction
        q = z * z
        near = size * (10395 + q * (1260 + q * 21)) / (10395 + q * (4725 + q * (210 + q)))
        t = tl.where(size < 0.625, near, t)
    return tl.where(z < 0, -t, t)


@triton.jit
def _log_one_plus(x):
    """ln(1 + x) for x in [0, 1]."""
    if x.dtype == tl.float32:  # 2 artanh(s)
        s = x / (2 + x)
        q = s * s
        series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
        return 2 * s * series
    else:
        u = 1 + x
        return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1, u - 1)))


@triton.jit
def _activate(z, rate, ACTIVATION: tl.constexpr):
    """f(z) and f'(z); rate: omega of a sine, the frequency of a residual one."""
    if ACTIVATION == RELU:
        return tl.where(z < 0, 0, z), tl.where(z > 0, 1, tl.zeros_like(z))
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z < 0, 0.01 * z, z), tl.where(z > 0, 1, tl.full(z.shape, 0.01, z.dtype))
    elif ACTIVATION == GELU:
        above = 0.5 * (1 + tl.erf(z * 0.70710678118654752))
        return z * above, above + z * (0.39894228040143268 * tl.exp(-0.5 * z * z))
    elif (ACTIVATION == SILU) | (ACTIVATION == SIGMOID):
        s = 1 / (1 + tl.exp(-z))
        slope = s * (1 - s)
        if ACTIVATION == SIGMOID:
            return s, slope
        else:
            return z * s, s + z * slope
    elif ACTIVATION == SOFTPLUS:  # the identity beyond 20, as in PyTorch
        e = tl.exp(-tl.abs(z))
        s = tl.where(z < 0, e, 1) / (1 + e)
        value = tl.where(z < 0, 0, z) + _log_one_plus(e)
        return tl.where(z > 20, z, value), tl.where(z > 20, 1, s)
    elif ACTIVATION == TANH:
        t = _tanh(z)
        return t, 1 - t * t
    elif ACTIVATION == EXPONENTIAL:
        e = tl.exp(z)
        return e, e
    elif ACTIVATION == SQUAREPLUS:
        root = tl.sqrt(z * z + 4)
        return 0.5 * (z + root), 0.5 * (1 + z / root)
    elif ACTIVATION == SINE:
        return tl.sin(rate * z), rate * tl.cos(rate * z)
    elif ACTIVATION == RESIDUAL_SINE:
        return z + tl.sin(rate * z), 1 + rate * tl.cos(rate * z)
    else:
        return z, tl.full(z.shape, 1, z.dtype)


@triton.jit
def _item(ptr, size, group, row, k, valid, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Scale or shift of numbers of a row. size: (groups that share an item, rows, width of a group)."""
    share, rows, width = size
    at = group // share
    if ROWS:
        at = at * rows + row
    if COLUMNS:
        return tl.load(ptr + at * width + k, mask=valid, other=0.0)
    else:
        return tl.broadcast_to(tl.load(ptr + at), k.shape)


@triton.jit
def _rate(frequencies_ptr, frequency_count, group, k, valid, like, OMEGA: tl.constexpr, PER_GROUP: tl.constexpr):
    if frequencies_ptr is None:
        return tl.full(like.shape, OMEGA, like.dtype)
    elif PER_GROUP:
        return tl.broadcast_to(tl.load(frequencies_ptr + group % frequency_count), like.shape)
    else:
        return tl.load(frequencies_ptr + k, mask=valid, other=0.0)


@triton.jit
def _deviation(h_ptr, first, numbers, C: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean of a group and one over its deviation; 0 and 1 without a norm."""
    mean, r = tl.full([], 0, C), tl.full([], 1, C)
    if NORM:
        total = tl.zeros([BLOCK], C)
        for at in range(0, numbers, BLOCK):
            k = at + tl.arange(0, BLOCK)
            total += tl.load(h_ptr + first + k, mask=k < numbers, other=0.0).to(C)
        mean = tl.sum(total, 0) / numbers
        squares = tl.zeros([BLOCK], C)
        for at in range(0, numbers, BLOCK):
            k = at + tl.arange(0, BLOCK)
            c = tl.where(k < numbers, tl.load(h_ptr + first + k, mask=k < numbers, other=0.0).to(C) - mean, 0)
            squares += c * c
        r = 1 / tl.sqrt(tl.sum(squares, 0) / numbers + EPS)
    return mean, r


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "width", "gamma_share", "beta_share", "frequency_count"])
def value_kernel(
    h_ptr, gamma_ptr, beta_ptr, frequencies_ptr, y_ptr, rows, width, gamma_share, beta_share, frequency_count,
    GAMMA_ROWS: tl.constexpr, GAMMA_COLUMNS: tl.constexpr, BETA_ROWS: tl.constexpr, BETA_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr, OMEGA: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y [groups, rows, width] of group program_id(0)."""
    C: tl.constexpr = gamma_ptr.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    first = group * rows * width
    mean, r = _deviation(h_ptr, first, rows * width, C, NORM, EPS, BLOCK)
    for row in range(rows):
        for at in range(0, width, BLOCK):
            k = at + tl.arange(0, BLOCK)
            valid = k < width
            n = (tl.load(h_ptr + first + row * width + k, mask=valid, other=0.0).to(C) - mean) * r
            gamma = _item(gamma_ptr, (gamma_share, rows, width), group, row, k, valid, GAMMA_ROWS, GAMMA_COLUMNS)
            beta = _item(beta_ptr, (beta_share, rows, width), group, row, k, valid, BETA_ROWS, BETA_COLUMNS)
            rate = _rate(frequencies_ptr, frequency_count, group, k, valid, n, OMEGA, PER_GROUP)
            y, _slope = _activate(gamma * n + beta, rate, ACTIVATION)
            tl.store(y_ptr + first + row * width + k, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "width", "gamma_share", "beta_share", "frequency_count"])
def gradients_kernel(
    h_ptr, gamma_ptr, beta_ptr, frequencies_ptr, g_ptr, gh_ptr, of_gamma_ptr, of_beta_ptr, rows, width, gamma_share,
    beta_share, frequency_count,
    GAMMA_ROWS: tl.constexpr, GAMMA_COLUMNS: tl.constexpr, BETA_ROWS: tl.constexpr, BETA_COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr, OMEGA: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, PER_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of <g, y>: gh; of_gamma and of_beta [groups, rows, width], or [groups, rows] where rows are alike."""
    C: tl.constexpr = gamma_ptr.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    first = group * rows * width
    mean, r = _deviation(h_ptr, first, rows * width, C, NORM, EPS, BLOCK)
    sum_w, sum_nw = tl.zeros([BLOCK], C), tl.zeros([BLOCK], C)
    mean_w, mean_nw = tl.full([], 0, C), tl.full([], 0, C)
    for again in tl.static_range(2 if NORM and gh_ptr is not None else 1):  # the gradient through a norm needs means
        if again == 1:
            mean_w, mean_nw = tl.sum(sum_w, 0) / (rows * width), tl.sum(sum_nw, 0) / (rows * width)
        for row in range(rows):
            sum_gamma, sum_beta = tl.zeros([BLOCK], C), tl.zeros([BLOCK], C)
            for at in range(0, width, BLOCK):
                k = at + tl.arange(0, BLOCK)
                valid, place = k < width, first + row * width + k
                n = (tl.load(h_ptr + place, mask=valid, other=0.0).to(C) - mean) * r
                gamma = _item(gamma_ptr, (gamma_share, rows, width), group, row, k, valid, GAMMA_ROWS, GAMMA_COLUMNS)
                beta = _item(beta_ptr, (beta_share, rows, width), group, row, k, valid, BETA_ROWS, BETA_COLUMNS)
                rate = _rate(frequencies_ptr, frequency_count, group, k, valid, n, OMEGA, PER_GROUP)
                _y, slope = _activate(gamma * n + beta, rate, ACTIVATION)
                of_s = tl.where(valid, tl.load(g_ptr + place, mask=valid, other=0.0).to(C) * slope, 0)
                w = gamma * of_s
                if again == 1:
                    gh = r * (w - mean_w - n * mean_nw)
                    tl.store(gh_ptr + place, gh.to(gh_ptr.dtype.element_ty), mask=valid)
                else:
                    sum_w, sum_nw = sum_w + w, sum_nw + n * w
                    sum_gamma, sum_beta = sum_gamma + of_s * n, sum_beta + of_s
                    if GAMMA_COLUMNS and of_gamma_ptr is not None:
                        tl.store(of_gamma_ptr + place, of_s * n, mask=valid)
                    if BETA_COLUMNS and of_beta_ptr is not None:
                        tl.store(of_beta_ptr + place, of_s, mask=valid)
                    if not NORM and gh_ptr is not None:
                        tl.store(gh_ptr + place, w.to(gh_ptr.dtype.element_ty), mask=valid)
            if again == 0:
                if not GAMMA_COLUMNS and of_gamma_ptr is not None:
                    tl.store(of_gamma_ptr + group * rows + row, tl.sum(sum_gamma, 0))
                if not BETA_COLUMNS and of_beta_ptr is not None:
                    tl.store(of_beta_ptr + group * rows + row, tl.sum(sum_beta, 0))


# ---- launching -------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """The settings of the operators, see camkernels/modulate.py."""

    activation: int
    omega: float
    norm: bool
    eps: float
    frequency_per_group: bool


def constants(settings: Settings, width: int, gamma: Sequence[bool], beta: Sequence[bool]) -> dict[str, Any]:
    """What kernels are compiled for. gamma, beta: whether their rows, and columns, differ."""
    return {
        "GAMMA_ROWS": gamma[0], "GAMMA_COLUMNS": gamma[1], "BETA_ROWS": beta[0], "BETA_COLUMNS": beta[1],
        "ACTIVATION": settings.activation, "OMEGA": settings.omega, "NORM": settings.norm, "EPS": settings.eps,
        "PER_GROUP": settings.frequency_per_group, "BLOCK": min(triton.next_power_of_2(width), MOST_NUMBERS),
    }  # fmt: skip


def options(block: int, dtype: torch.dtype) -> dict[str, int]:
    """How kernels are compiled. dtype: of the arithmetic."""
    return {"num_warps": 1 if block <= WARP_NUMBERS else 4, "maxnreg": MOST_REGISTERS[dtype]}


def _launch(
    kernel: Any,
    settings: Settings,
    h: Tensor,
    gamma: Tensor,
    beta: Tensor,
    frequencies: Tensor | None,
    **places: Any,
) -> None:
    groups, rows, width = h.shape
    if groups == 0:
        return
    differ = [(t.shape[1] > 1, t.shape[2] > 1) for t in (gamma, beta)]
    compiled_for = constants(settings, width, *differ)
    sizes = {
        "rows": rows, "width": width, "gamma_share": groups // len(gamma), "beta_share": groups // len(beta),
        "frequency_count": 1 if frequencies is None else len(frequencies),
    }  # fmt: skip
    tensors = {"h_ptr": h, "gamma_ptr": gamma, "beta_ptr": beta, "frequencies_ptr": frequencies}
    with torch.cuda.device(h.device) if h.is_cuda else nullcontext():
        kernel[(groups,)](**tensors, **sizes, **places, **compiled_for, **options(compiled_for["BLOCK"], gamma.dtype))


def value(h: Tensor, gamma: Tensor, beta: Tensor, frequencies: Tensor | None, *settings: Any) -> Tensor:
    """The operator triton_modulate."""
    y = torch.empty_like(h)
    _launch(value_kernel, Settings(*settings), h, gamma, beta, frequencies, y_ptr=y)
    return y


def backward(
    grad: Tensor, h: Tensor, gamma: Tensor, beta: Tensor, frequencies: Tensor | None, *settings_and_mask: Any
) -> tuple[Tensor, ...]:
    """The operator triton_modulate_backward: gradients of <grad, y> in h, gamma and beta."""
    *settings, mask = settings_and_mask
    gh = torch.empty_like(h) if mask[0] else None
    parts = [
        t.new_empty(*h.shape[:2], h.shape[2] if t.shape[2] > 1 else 1) if wish else None
        for t, wish in zip((gamma, beta), mask[1:], strict=True)
    ]
    places = {"g_ptr": grad, "gh_ptr": gh, "of_gamma_ptr": parts[0], "of_beta_ptr": parts[1]}
    _launch(gradients_kernel, Settings(*settings), h, gamma, beta, frequencies, **places)
    sums = [t.new_empty(0) if p is None else _sum_for(p, t) for p, t in zip(parts, (gamma, beta), strict=True)]
    return (h.new_empty(0) if gh is None else gh, *sums)


def _sum_for(part: Tensor, like: Tensor) -> Tensor:
    """What groups [groups, rows, width or 1] add to a gradient like [items, rows or 1, width or 1]."""
    if part.shape == like.shape:
        return part
    if len(part) == 0:
        return torch.zeros_like(like)
    by_item = part.unflatten(0, (len(like), -1))
    return by_item.sum((1, 2)).unsqueeze(1) if like.shape[1] == 1 else by_item.sum(1)


# ---- second order ----------------------------------------------------------------------------------------------------


def backward_backward(
    ggh: Tensor | None, gggamma: Tensor | None, ggbeta: Tensor | None, grad: Tensor, h: Tensor, gamma: Tensor,
    beta: Tensor, frequencies: Tensor | None, *settings_and_mask: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator triton_modulate_backward_backward: gradients of <gg, gradients> in grad, h, gamma and beta, by the
    reference formula under autograd."""
    *settings, mask = settings_and_mask

    def first_order(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        y = _definition(*tensors, frequencies, Settings(*settings))
        return torch.autograd.grad(y, tensors, grad, create_graph=True, materialize_grads=True)

    return gradients(first_order, (grad, h, gamma, beta), (ggh, gggamma, ggbeta), mask)


def _definition(h: Tensor, gamma: Tensor, beta: Tensor, frequencies: Tensor | None, settings: Settings) -> Tensor:
    """The reference, for the arguments of an operator."""
    by_frame = frequencies is not None and settings.frequency_per_group
    frames = (-1, len(frequencies)) if by_frame else (len(h),)
    values = h.reshape(*frames, *h.shape[1:])
    items = [
        t.unsqueeze(1).expand(-1, len(h) // max(len(t), 1), -1, -1).reshape(*frames, *t.shape[1:])
        for t in (gamma, beta)
    ]
    norm = ("frame" if by_frame else "ray") if settings.norm else None
    more = {"eps": settings.eps, "activation": ACTIVATIONS[settings.activation], "omega": settings.omega}
    return reference.modulate(values, *items, norm=norm, frequencies=frequencies, **more).reshape(h.shape)
