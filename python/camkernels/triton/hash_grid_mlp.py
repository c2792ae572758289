# SPDX-License-Identifier: MIT
"""The hash grid and the MLP behind it in one Triton kernel: the features stay on the multiprocessor.

A program encodes BLOCK points at all levels at once, [BLOCK, levels, features] with both padded to powers of two, and
takes them through the layers (modulated_mlp_rows.py). The gradients of the table are added atomically.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._modulation import compute_dtype
from . import hash_grid, modulated_mlp
from .hash_grid import COLUMNS, UNROLLED_CORNERS, _cell, _entry, _extent, _settle, _slopes, _weight
from .modulated_mlp import BACKWARD, FORWARD, Gradients, Shape, on_device, per_row, plan_of, shape_of
from .modulated_mlp_gradients import differentiate, feature_places, x_gradient
from .modulated_mlp_rows import evaluate, padded, points_of

GRID_SETTINGS = len(hash_grid.Settings._fields)  # the first ones of the operators


@dataclass(frozen=True)
class Grid:
    """What the encoding is compiled for."""

    dims: int
    features: int  # of a level
    wide: int  # ... padded
    levels: int
    rows: int  # levels, padded
    active_levels: int
    shift: float
    ceil_corner: bool
    outside: int
    interpolation: int
    corners: int

    @property
    def unroll(self) -> int:
        return self.corners if self.corners <= UNROLLED_CORNERS else 1


# ---- encoding --------------------------------------------------------------------------------------------------------


@triton.jit
def locate(x_ptr, counts_ptr, scales_ptr, layout_ptr, r, valid, GRID: tl.constexpr, PLAN: tl.constexpr):
    """Of points and levels [BLOCK, rows]: terms, weights and slopes of the corners, the levels' extent, whether they
    are computed, whether their position is finite; of the points, which coordinates pass a derivative on."""
    D: tl.constexpr = GRID.dims
    ROWS: tl.constexpr = GRID.rows
    BLOCK: tl.constexpr = PLAN.block
    xs, inside, seen = _settle(x_ptr, r, valid, D, GRID.outside)
    spread = ()
    for d in tl.static_range(D):
        spread = spread + (tl.broadcast_to(xs[d][:, None], [BLOCK, ROWS]),)
    level = tl.arange(0, ROWS)[None, :]
    keep = seen[:, None] & (level < GRID.active_levels)
    if counts_ptr is not None:
        keep = keep & (level < tl.load(counts_ptr + r, mask=valid, other=0)[:, None])
    level = tl.minimum(level, GRID.levels - 1)  # padding reads the last one, and is not computed
    row = layout_ptr + level * (D + COLUMNS)
    terms, weights, slopes, finite = _cell(
        spread, scales_ptr, row, D, GRID.shift, GRID.ceil_corner, GRID.interpolation, level
    )  # fmt: skip
    return terms, weights, slopes, _extent(row, D), keep, finite, inside


@triton.jit
def encode(
    x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, r, valid, weight_type, GRID: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Features [BLOCK, rows * wide] of the points r, rounded to the table's type; in a type that products take."""
    BLOCK: tl.constexpr = PLAN.block
    ROWS: tl.constexpr = GRID.rows
    WIDE: tl.constexpr = GRID.wide
    CORNERS: tl.constexpr = GRID.corners
    UNROLL: tl.constexpr = GRID.unroll
    terms, weights, _, extent, keep, finite, _ = locate(
        x_ptr, counts_ptr, scales_ptr, layout_ptr, r, valid, GRID, PLAN
    )  # fmt: skip
    f = tl.arange(0, WIDE)[None, None, :]
    reads = (keep & finite)[:, :, None] & (f < GRID.features)
    y = tl.zeros([BLOCK, ROWS, WIDE], weights[0][0].dtype)
    for c in tl.range(0, CORNERS, loop_unroll_factor=UNROLL):
        entry = _entry(c, terms, extent, GRID.dims)[:, :, None] * GRID.features
        theta = tl.load(table_ptr + entry + f, mask=reads, other=0.0).to(y.dtype)
        y += _weight(c, weights, GRID.dims)[:, :, None] * theta
    y = tl.where((keep & ~finite)[:, :, None] & (f < GRID.features), float("nan"), y)
    features = tl.reshape(y, [BLOCK, ROWS * WIDE]).to(table_ptr.dtype.element_ty)
    return features if table_ptr.dtype.element_ty == weight_type else features.to(PLAN.number)


@triton.jit
def differentiate_encoding(
    g, x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, gx_ptr, sums_ptr, r, valid, GRID: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """gx [n, D], and sums [entries, F] += weight * g, for gradients g [BLOCK, rows * wide] of the features."""
    D: tl.constexpr = GRID.dims
    BLOCK: tl.constexpr = PLAN.block
    ROWS: tl.constexpr = GRID.rows
    WIDE: tl.constexpr = GRID.wide
    CORNERS: tl.constexpr = GRID.corners
    UNROLL: tl.constexpr = GRID.unroll
    terms, weights, axis_slopes, extent, keep, finite, inside = locate(
        x_ptr, counts_ptr, scales_ptr, layout_ptr, r, valid, GRID, PLAN
    )  # fmt: skip
    f = tl.arange(0, WIDE)[None, None, :]
    there = (keep & finite)[:, :, None] & (f < GRID.features)
    grad = tl.reshape(g, [BLOCK, ROWS, WIDE]).to(weights[0][0].dtype)
    gx = ()
    for _ in tl.static_range(D):
        gx = gx + (tl.zeros([BLOCK, ROWS], grad.dtype),)
    for c in tl.range(0, CORNERS, loop_unroll_factor=UNROLL):
        at = _entry(c, terms, extent, D)[:, :, None] * GRID.features + f
        if sums_ptr is not None:
            part = _weight(c, weights, D)[:, :, None] * grad
            tl.atomic_add(sums_ptr + at, part.to(sums_ptr.dtype.element_ty), mask=there, sem="relaxed")
        if gx_ptr is not None:
            theta = tl.load(table_ptr + at, mask=there, other=0.0).to(grad.dtype)
            along = tl.sum(theta * grad, 2)
            slopes = _slopes(c, weights, axis_slopes, D)
            added = ()
            for d in tl.static_range(D):
                added = added + (gx[d] + slopes[d] * along,)
            gx = added
    if gx_ptr is not None:
        for d in tl.static_range(D):
            total = tl.sum(tl.where(keep & ~finite, float("nan"), gx[d]), 1)
            tl.store(gx_ptr + r * D + d, tl.where(inside[d], total, 0.0), mask=valid)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def value_kernel(
    x_ptr, table_ptr, counts_ptr, scales_ptr, layout_ptr, weights, biases, modulation_ptr, frequencies_ptr, y_ptr,
    n, per_row, GRID: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """y [n, outputs]; a row of the modulation serves per_row points."""
    r = tl.program_id(0).to(tl.int64) * PLAN.block + tl.arange(0, PLAN.block)
    features = encode(
        x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, r, r < n, weights[0].dtype.element_ty, GRID, PLAN
    )  # fmt: skip
    evaluate(features, r, r < n, r // per_row, weights, biases, modulation_ptr, frequencies_ptr, y_ptr, PLAN)


@triton.jit(do_not_specialize=["n", "span", "before"])
def gradients_kernel(
    g_ptr, x_ptr, table_ptr, counts_ptr, scales_ptr, layout_ptr, weights, biases, modulation_ptr, frequencies_ptr,
    gx_ptr, table_sums_ptr, gradient_ptr, rows_ptr, biases_ptr, n, per_row, span, before, GRID: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """As that of the MLP alone, with gradients of coordinates and table in place of the features'."""
    tile = before + tl.program_id(0)
    rows_ptr += tl.program_id(0).to(tl.int64) * PLAN.size
    r, valid = points_of(tile, n, span, PLAN)
    features = encode(
        x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, r, valid, weights[0].dtype.element_ty, GRID, PLAN
    )  # fmt: skip
    if biases_ptr is not None:
        tl.store(rows_ptr + feature_places(PLAN), features.to(PLAN.number))
    g = differentiate(
        g_ptr, features, r, valid, r // per_row, tile, weights, biases, modulation_ptr, frequencies_ptr, gradient_ptr,
        rows_ptr, biases_ptr, PLAN,
    )  # fmt: skip
    if gx_ptr is not None or table_sums_ptr is not None:
        of_features = x_gradient(g, weights[0], rows_ptr, 0, 0, PLAN)
        differentiate_encoding(
            of_features, x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, gx_ptr, table_sums_ptr, r, valid, GRID,
            PLAN,
        )  # fmt: skip


# ---- launching -------------------------------------------------------------------------------------------------------


def grid_of(settings: hash_grid.Settings, dims: int, features: int) -> Grid:
    levels = settings.n_levels(dims)
    wide = triton.next_power_of_2(features)
    return Grid(
        dims=dims,
        features=features,
        wide=wide,
        levels=levels,
        rows=padded(levels * wide) // wide,
        active_levels=settings.active_levels,
        shift=settings.shift,
        ceil_corner=settings.ceil_corner,
        outside=settings.outside,
        interpolation=settings.interpolation,
        corners=1 if settings.interpolation == hash_grid.NEAREST.value else 1 << dims,
    )


class Call:
    """The tensors of the operators and what their kernels are compiled for."""

    def __init__(
        self, shapes: dict[bool, dict[int, Shape]], x: Tensor, entries: Tensor, counts: Tensor | None,
        weights: Sequence[Tensor], biases: Sequence[Tensor], modulation: Tensor | None, frequencies: Tensor | None,
        settings: Sequence[Any],
    ):  # fmt: skip
        grid = hash_grid.Settings(*settings[:GRID_SETTINGS])
        dims, features = x.shape[1], entries.shape[1]
        self.deterministic = grid.deterministic
        self.grid = grid_of(grid, dims, features)
        self.number = compute_dtype(entries, modulation, frequencies, *weights)
        outs = [w.shape[0] for w in weights]
        self.shape = shape_of(shapes, outs, x.device)
        mlp = modulated_mlp.Settings(*settings[GRID_SETTINGS:], keep=False, deterministic=grid.deterministic)
        of_grid = (features, self.grid.wide)
        width = self.grid.levels * features
        self.plan = plan_of(mlp, width, outs, modulation, self.number, self.shape, group=of_grid)
        scales, layout = hash_grid._levels_on(x.device, dims, tuple(grid.scales), tuple(grid.layout))
        self.tensors = (
            x, entries, counts, scales, layout, tuple(weights), tuple(biases) or None, modulation, frequencies,
        )  # fmt: skip


def value(
    x: Tensor, table: Tensor, counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    modulation: Tensor | None, frequencies: Tensor | None, *settings: Any,
) -> Tensor:  # fmt: skip
    """The operator triton_hash_grid_mlp."""
    call = Call(FORWARD, x, table, counts, weights, biases, modulation, frequencies, settings)
    y = weights[0].new_empty(len(x), call.plan.outputs)
    if len(x) > 0:
        with on_device(x):
            value_kernel[(triton.cdiv(len(x), call.plan.block),)](
                *call.tensors, y, len(x), per_row(x, modulation), call.grid, call.plan, num_warps=call.shape.warps,
                num_stages=1,
            )  # fmt: skip
    return y


def backward(
    g: Tensor, x: Tensor, table: Tensor, counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    modulation: Tensor | None, frequencies: Tensor | None, *settings_and_mask: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """The operator triton_hash_grid_mlp_backward: gradients of <g, y> in x, table, weights, biases and modulation."""
    *settings, mask = settings_and_mask
    wants_x, wants_table, *wants = mask
    call = Call(BACKWARD, x, table, counts, weights, biases, modulation, frequencies, settings)
    if wants_table and call.deterministic:
        hash_grid.refuse_determinism("hash_grid_mlp_backward")
    job = Gradients(call.plan, x, weights, biases, modulation, [wants_x, *wants])
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    sums = torch.zeros_like(table, dtype=wide) if wants_table else None

    def launch(before: int, tiles: int) -> None:
        gradients_kernel[(tiles,)](
            g, *call.tensors, job.gx, sums, job.of_modulation, job.rows, job.of_biases, len(x), per_row(x, modulation),
            job.span, before, call.grid, job.plan, num_warps=call.shape.warps, num_stages=1,
        )  # fmt: skip

    job.run(launch, None)
    gx, *others = job.results()
    return gx, table.new_empty(0) if sums is None else sums.to(table.dtype), *others
