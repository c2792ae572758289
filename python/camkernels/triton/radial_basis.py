# SPDX-License-Identifier: MIT
"""radial_basis in Triton: value, and gradients in x, centers, shapes, features and phase.

Definition and special points as in `camkernels.reference.radial_basis`. A program takes PLAN.block points: weights
[points, kernels] are computed once where a point's kernels are one block, and serve features [points, kernels,
features], a tile of them at a time. Where kernels are several blocks, as all of them are, weights are computed again
for each pass: that of the normaliser, those of the tiles.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .modulated_mlp import on_device
from .radial_basis_formula import Plan, evaluate, pull_back, waves

# A program has as many pairs of a point and a kernel as threads, up to so many kernels of a point at once. Fewer pairs
# than threads, and the compiler computes their weights anew for every feature.
WARPS = 4
PAIRS = 32 * WARPS
MOST_KERNELS, ALL_KERNELS = 64, 8  # the latter where a point has all kernels: the points share what is read
# Features at once: two words of a row, so that two threads share the features of a pair. Chosen from machine code:
# nothing spills on sm_80 and sm_90, which tests/test_triton_compiled.py checks.
WORD_BYTES, WORDS = 16, 2
OPTIONS = {"num_warps": WARPS, "maxnreg": 255}  # said aloud, the limit keeps the assembler from spilling some below it
# Numbers that a deterministic launch leaves in memory, to be added up in order: 64 MB of float32.
ORDERED_NUMBERS = 1 << 24

# ---- a program's points and their kernels ----------------------------------------------------------------------------


@triton.jit
def _pairs(neighbors_ptr, r, points, first, count, PLAN: tl.constexpr):
    """The kernels i of a block that begins at a point's kernel `first`, [points, kernels], or [1, kernels] where all
    points have the same; their places k [1, kernels] among the point's; which are read."""
    k = (first + tl.arange(0, PLAN.kernels))[None, :]
    if neighbors_ptr is None:
        return k.to(tl.int64), k, k < count
    else:
        reads = points[:, None] & (k < PLAN.per_point)
        return tl.load(neighbors_ptr + r[:, None] * PLAN.per_point + k, mask=reads, other=0).to(tl.int64), k, reads


@triton.jit
def _points(x_ptr, neighbors_ptr, n, count, PLAN: tl.constexpr):
    """Numbers r of the points, coordinates [dims] of [points, 1], which points are computed, which have no value."""
    D: tl.constexpr = PLAN.dims
    r = tl.program_id(0).to(tl.int64) * PLAN.block + tl.arange(0, PLAN.block)
    lost = r < 0
    x, kept = (), ()
    for d in tl.static_range(D):
        x = x + (tl.load(x_ptr + r * D + d, mask=r < n, other=0.0),)
        lost = lost | ~(tl.abs(x[d]) < float("inf"))
    if neighbors_ptr is not None:
        for first in range(0, PLAN.per_point, PLAN.kernels):
            i, _k, reads = _pairs(neighbors_ptr, r, r < n, first, count, PLAN)
            lost = lost | (tl.max((reads & ((i < 0) | (i >= count))).to(tl.int32), 1) > 0)
    for d in tl.static_range(D):
        kept = kept + (tl.where(lost, 0.0, x[d])[:, None],)
    return r, kept, (r < n) & ~lost, lost


@triton.jit
def _end(count, PLAN: tl.constexpr):
    """How many kernels a point has."""
    if PLAN.per_point == 0:
        return count
    else:
        return PLAN.per_point


@triton.jit
def _kernels(x, r, points, first, count, centers_ptr, shapes_ptr, neighbors_ptr, PLAN: tl.constexpr):
    """A block as in _pairs; its centers and shapes; what `evaluate` finds, phi 0 of pairs that are not computed."""
    D: tl.constexpr = PLAN.dims
    WIDTH: tl.constexpr = PLAN.width
    i, k, reads = _pairs(neighbors_ptr, r, points, first, count, PLAN)
    center, shape = (), ()
    for d in tl.static_range(D):
        center = center + (tl.load(centers_ptr + i * D + d, mask=reads, other=0.0),)
    for s in tl.static_range(WIDTH):
        shape = shape + (tl.load(shapes_ptr + i * WIDTH + s, mask=reads, other=0.0),)
    phi, slope, o, t = evaluate(x, center, shape, PLAN)
    return (i, k, reads), center, shape, (tl.where(reads & points[:, None], phi, 0.0), slope, o, t)


@triton.jit
def _normalizer(x, r, points, count, centers_ptr, shapes_ptr, neighbors_ptr, PLAN: tl.constexpr):
    """What weights are divided by, [points, 1]."""
    BLOCK: tl.constexpr = PLAN.block
    if PLAN.normalize:
        total = tl.zeros([BLOCK], x[0].dtype)
        for first in range(0, _end(count, PLAN), PLAN.kernels):
            _pair, _center, _shape, found = _kernels(
                x, r, points, first, count, centers_ptr, shapes_ptr, neighbors_ptr, PLAN
            )
            total += tl.sum(found[0], 1)
        return tl.where(points, total + PLAN.eps, 1.0)[:, None]
    else:
        return tl.full([BLOCK, 1], 1, x[0].dtype)


@triton.jit
def _features(features_ptr, i, reads, f, like, PLAN: tl.constexpr):
    """Features f of kernels i, [points or 1, kernels, features]."""
    at = features_ptr + i[:, :, None] * PLAN.features + f[None, None, :]
    return tl.load(at, mask=reads[:, :, None] & (f < PLAN.features)[None, None, :], other=0.0).to(like.dtype)


# ---- value -----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "count", "n_features"])
def value_kernel(
    x_ptr, centers_ptr, shapes_ptr, features_ptr, phase_ptr, neighbors_ptr, frequencies_ptr, y_ptr, n, count,
    n_features, PLAN: tl.constexpr,
):  # fmt: skip
    """y [n, features]"""
    F: tl.constexpr = PLAN.features
    BLOCK: tl.constexpr = PLAN.block
    TILE: tl.constexpr = PLAN.tile
    r, x, points, lost = _points(x_ptr, neighbors_ptr, n, count, PLAN)
    normalizer = _normalizer(x, r, points, count, centers_ptr, shapes_ptr, neighbors_ptr, PLAN)
    if PLAN.one_block:
        pair, _center, _shape, found = _kernels(x, r, points, 0, count, centers_ptr, shapes_ptr, neighbors_ptr, PLAN)
    # Over tiles. The compiler must not know how many: it would write all of them out.
    for start in range(0, F if F <= TILE else n_features, TILE):
        f = start + tl.arange(0, TILE)
        y = tl.zeros([BLOCK, TILE], normalizer.dtype)
        for first in range(0, _end(count, PLAN), PLAN.kernels):
            if not PLAN.one_block:
                pair, _center, _shape, found = _kernels(
                    x, r, points, first, count, centers_ptr, shapes_ptr, neighbors_ptr, PLAN
                )
            i, _k, reads = pair
            psi, _slope, _phase_slope = waves(found[0] / normalizer, f, frequencies_ptr, phase_ptr, PLAN)
            y += tl.sum(psi * _features(features_ptr, i, reads, f, y, PLAN), 1)
        y = tl.where(lost[:, None], float("nan"), y)
        stored = (r < n)[:, None] & (f < F)[None, :]
        tl.store(y_ptr + r[:, None] * F + f[None, :], y.to(y_ptr.dtype.element_ty), mask=stored)


# ---- gradients -------------------------------------------------------------------------------------------------------


@triton.jit
def _add(sums_ptr, row, column, part, reads, WIDTH: tl.constexpr, PLAN: tl.constexpr):
    """Adds parts to rows of sums [rows, WIDTH]."""
    if PLAN.per_point == 0:  # the points share the rows
        part = tl.expand_dims(tl.sum(part, 0), 0)
    tl.atomic_add(sums_ptr + row * WIDTH + column, part, mask=reads, sem="relaxed")


@triton.jit
def _row(r, i, k, count, PLAN: tl.constexpr):
    """Where a pair adds to the gradients of its kernel: at the kernel, or if ordered in a place of its own, as far as
    points do not share it."""
    if not PLAN.ordered:
        return i
    elif PLAN.per_point == 0:
        return tl.program_id(0).to(tl.int64) * count + k
    else:
        return r[:, None] * PLAN.per_point + k


@triton.jit
def _over_features(
    g_ptr, features_ptr, phase_ptr, frequencies_ptr, r, points, i, reads, u, n_features, row, of_features_ptr,
    of_phase_ptr, PLAN: tl.constexpr,
):  # fmt: skip
    """The gradient of <g, y> in the weights u, if wanted; adds to those of features and phase."""
    F: tl.constexpr = PLAN.features
    of_u = tl.zeros_like(u)
    for start in range(0, F if PLAN.tile >= F else n_features, PLAN.tile):
        f = start + tl.arange(0, PLAN.tile)
        seen = points[:, None] & (f < F)[None, :]
        g = tl.load(g_ptr + r[:, None] * F + f[None, :], mask=seen, other=0.0).to(u.dtype)[:, None, :]
        psi, slope, phase_slope = waves(u, f, frequencies_ptr, phase_ptr, PLAN)
        if of_features_ptr is not None:
            there = reads[:, :, None] & (f < F)[None, None, :]
            _add(of_features_ptr, row[:, :, None], f[None, None, :], g * psi, there, F, PLAN)
        if PLAN.along or of_phase_ptr is not None:
            part = g * _features(features_ptr, i, reads, f, u, PLAN)
            if PLAN.along:
                of_u += tl.sum(part * slope, 2)
            if of_phase_ptr is not None:
                total = tl.sum(tl.sum(part * phase_slope, 0), 0)
                tl.atomic_add(of_phase_ptr + (f - PLAN.keep), total, mask=(f >= PLAN.keep) & (f < F), sem="relaxed")
    return of_u


@triton.jit(do_not_specialize=["n", "count", "n_features"])
def gradients_kernel(
    g_ptr, x_ptr, centers_ptr, shapes_ptr, features_ptr, phase_ptr, neighbors_ptr, frequencies_ptr, gx_ptr,
    of_centers_ptr, of_shapes_ptr, of_features_ptr, of_phase_ptr, n, count, n_features, PLAN: tl.constexpr,
):  # fmt: skip
    """gx [n, dims]; adds to the gradients of the kernels [rows, *], for the rows see _row, and of the phase
    [programs, *]."""
    D: tl.constexpr = PLAN.dims
    WIDTH: tl.constexpr = PLAN.width
    BLOCK: tl.constexpr = PLAN.block
    r, x, points, lost = _points(x_ptr, neighbors_ptr, n, count, PLAN)
    normalizer = _normalizer(x, r, points, count, centers_ptr, shapes_ptr, neighbors_ptr, PLAN)
    if of_phase_ptr is not None:
        of_phase_ptr += tl.program_id(0).to(tl.int64) * (PLAN.features - PLAN.keep)
    share = tl.zeros([BLOCK], normalizer.dtype)  # of the normaliser in the gradient of a weight
    if PLAN.along and PLAN.shares and not PLAN.one_block:
        for first in range(0, _end(count, PLAN), PLAN.kernels):
            pair, _center, _shape, found = _kernels(
                x, r, points, first, count, centers_ptr, shapes_ptr, neighbors_ptr, PLAN
            )
            i, k, reads = pair
            u = found[0] / normalizer
            of_u = _over_features(
                g_ptr, features_ptr, phase_ptr, frequencies_ptr, r, points, i, reads, u, n_features, k, None, None, PLAN
            )
            share += tl.sum(of_u * u, 1)
    gx = ()
    for _ in tl.static_range(D):
        gx = gx + (tl.zeros([BLOCK], normalizer.dtype),)
    for first in range(0, _end(count, PLAN), PLAN.kernels):
        pair, center, shape, found = _kernels(x, r, points, first, count, centers_ptr, shapes_ptr, neighbors_ptr, PLAN)
        i, k, reads = pair
        u, row = found[0] / normalizer, _row(r, i, k, count, PLAN)
        of_u = _over_features(
            g_ptr, features_ptr, phase_ptr, frequencies_ptr, r, points, i, reads, u, n_features, row, of_features_ptr,
            of_phase_ptr, PLAN,
        )  # fmt: skip
        if PLAN.along:
            if PLAN.shares and PLAN.one_block:
                share = tl.sum(of_u * u, 1)
            of_phi = tl.where(reads & points[:, None], (of_u - share[:, None]) / normalizer, 0.0)
            of_x, of_center, of_shape = pull_back(of_phi, x, center, shape, found, PLAN)
            added = ()
            for d in tl.static_range(D):
                added = added + (gx[d] + tl.sum(of_x[d], 1),)
                if of_centers_ptr is not None:
                    _add(of_centers_ptr, row, d, of_center[d], reads, D, PLAN)
            gx = added
            if of_shapes_ptr is not None:
                for s in tl.static_range(WIDTH):
                    _add(of_shapes_ptr, row, s, of_shape[s], reads, WIDTH, PLAN)
    if gx_ptr is not None:
        for d in tl.static_range(D):
            tl.store(gx_ptr + r * D + d, tl.where(lost, float("nan"), gx[d]), mask=r < n)


# ---- launching -------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """The settings of the operators, see camkernels/radial_basis.py."""

    kind: int
    shape: int
    normalize: bool
    detach_normalizer: bool
    eps: float
    keep: int
    deterministic: bool


def plan_of(settings: Settings, dims: int, features: int, per_point: int, dtype: torch.dtype) -> Plan:
    """What a kernel is compiled for; dtype: of the arithmetic."""
    kernels = min(triton.next_power_of_2(per_point), MOST_KERNELS) if per_point else ALL_KERNELS
    word = math.gcd(features, WORD_BYTES // dtype.itemsize)
    tile = min(triton.next_power_of_2(features), WORDS * word)
    *options, _deterministic = settings
    kind, shape, normalize, detach_normalizer, eps, keep = options
    return Plan(
        kind, shape, dims, features, keep, normalize, detach_normalizer, eps, per_point, PAIRS // kernels, kernels, tile
    )


def value(
    x: Tensor, centers: Tensor, shapes: Tensor, features: Tensor, phase: Tensor | None, neighbors: Tensor | None,
    frequencies: Tensor | None, *settings: Any,
) -> Tensor:  # fmt: skip
    """The operator triton_radial_basis."""
    n, (count, width) = len(x), features.shape
    y = features.new_empty(n, width)
    if y.numel() > 0:
        plan = plan_of(Settings(*settings), x.shape[1], width, _per_point(neighbors), x.dtype)
        with on_device(x):
            value_kernel[(triton.cdiv(n, plan.block),)](
                x, centers, shapes, features, phase, neighbors, frequencies, y, n, count, width, plan, **OPTIONS
            )
    return y


def backward(
    grad: Tensor, x: Tensor, centers: Tensor, shapes: Tensor, features: Tensor, phase: Tensor | None,
    neighbors: Tensor | None, frequencies: Tensor | None, *settings_and_mask: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator triton_radial_basis_backward: gradients of <grad, y> in x, centers, shapes, features and phase."""
    *given, mask = settings_and_mask
    settings = Settings(*given)
    n, (count, width) = len(x), features.shape
    plan = plan_of(settings, x.shape[1], width, _per_point(neighbors), x.dtype)
    plan = replace(plan, along=any(mask[:3]), ordered=settings.deterministic)
    gx, *sums = (
        None if t is None or not wish else torch.zeros_like(t, dtype=x.dtype, memory_format=torch.contiguous_format)
        for t, wish in zip((x, centers, shapes, features, phase), mask, strict=True)
    )
    step = _points_of_a_launch(plan, n, count)
    for first in range(0, n if width > 0 else 0, step):
        cut = slice(first, first + step)
        near = None if neighbors is None else neighbors[cut]
        programs = triton.cdiv(len(x[cut]), plan.block)
        parts = [_parts_of(t, plan, programs, len(x[cut])) for t in sums[:3]]
        of_phase = None if sums[3] is None else x.new_zeros(programs, len(phase))
        with on_device(x):
            gradients_kernel[(programs,)](
                grad[cut], x[cut], centers, shapes, features, phase, near, frequencies, None if gx is None else gx[cut],
                parts[0], parts[1] if plan.width > 0 else None, parts[2], of_phase, len(x[cut]), count, width, plan,
                **OPTIONS,
            )  # fmt: skip
        if plan.ordered:
            for total, part in zip(sums, parts, strict=False):
                _add_in_order(total, part, near)
        if of_phase is not None:
            sums[3] += of_phase.sum(0)
    found = zip((gx, *sums), (x, centers, shapes, features, x if phase is None else phase), strict=True)
    return tuple(like.new_empty(0) if t is None else t.to(like.dtype) for t, like in found)


def _per_point(neighbors: Tensor | None) -> int:
    return 0 if neighbors is None else neighbors.shape[1]


def _points_of_a_launch(plan: Plan, n: int, count: int) -> int:
    """All n, unless what they add to kernels is left in memory."""
    if not plan.ordered:
        return max(n, 1)
    rows = plan.per_point * plan.block or count
    return plan.block * max(1, ORDERED_NUMBERS // (rows * (plan.dims + plan.width + plan.features)))


def _parts_of(total: Tensor | None, plan: Plan, programs: int, points: int) -> Tensor | None:
    """Where a launch adds to a gradient [kernels, *]: to itself, or if PLAN.ordered to rows that are added up later."""
    if total is None or not plan.ordered:
        return total
    return total.new_zeros(points * plan.per_point or programs * len(total), total.shape[1])


def _add_in_order(total: Tensor | None, parts: Tensor | None, neighbors: Tensor | None) -> None:
    if total is None:
        return
    if neighbors is None:
        total += parts.unflatten(0, (-1, len(total))).sum(0)
        return
    # sorts where it runs in parallel; what names no kernel belongs to points that add 0
    kernels = neighbors.flatten().long().clamp(0, len(total) - 1)
    total.index_put_((kernels,), parts, accumulate=True)
