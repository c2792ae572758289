# SPDX-License-Identifier: MIT
"""The hash grid and the MLP behind it in one Triton kernel, without a tensor of features.

A program encodes BLOCK points, [BLOCK, levels, features] with both padded to powers of two, and takes them through the
layers: all levels at once where the layers stay in registers (modulated_mlp_rows.py), some at a time where they pass
through memory (modulated_mlp_memory.py). The gradients of the table are added atomically.
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
from .modulated_mlp import THROUGH_MEMORY, Gradients, Shape, per_row, plan_of, run_value, value_shape
from .modulated_mlp_gradients import differentiate, leave_x_gradient, x_places
from .modulated_mlp_memory import evaluate_in_memory
from .modulated_mlp_plan import padded
from .modulated_mlp_rows import evaluate, feature_places, points_of

STEP = 4  # levels at a time: more do not fit into registers
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
    def step(self) -> int:
        """Levels that are computed at a time where features pass through memory."""
        return min(self.rows, STEP)

    @property
    def unroll(self) -> int:
        return self.corners if self.corners <= UNROLLED_CORNERS else 1


# ---- encoding --------------------------------------------------------------------------------------------------------


@triton.jit
def locate(
    x_ptr, counts_ptr, scales_ptr, layout_ptr, r, valid, first, ROWS: tl.constexpr, GRID: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Of points and ROWS levels, `first` and following: terms, weights and slopes of the corners, the levels' extent,
    whether they are computed, whether their position is finite; of the points, which coordinates pass a derivative on.
    """
    D: tl.constexpr = GRID.dims
    BLOCK: tl.constexpr = PLAN.block
    xs, inside, seen = _settle(x_ptr, r, valid, D, GRID.outside)
    spread = ()
    for d in tl.static_range(D):
        spread = spread + (tl.broadcast_to(xs[d][:, None], [BLOCK, ROWS]),)
    level = first + tl.arange(0, ROWS)[None, :]
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
    x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, r, valid, first, ROWS: tl.constexpr, GRID: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Features [BLOCK, ROWS * wide] of the points r at levels `first` and following, rounded to the table's type."""
    BLOCK: tl.constexpr = PLAN.block
    WIDE: tl.constexpr = GRID.wide
    CORNERS: tl.constexpr = GRID.corners
    UNROLL: tl.constexpr = GRID.unroll
    terms, weights, _, extent, keep, finite, _ = locate(
        x_ptr, counts_ptr, scales_ptr, layout_ptr, r, valid, first, ROWS, GRID, PLAN
    )  # fmt: skip
    f = tl.arange(0, WIDE)[None, None, :]
    reads = (keep & finite)[:, :, None] & (f < GRID.features)
    y = tl.zeros([BLOCK, ROWS, WIDE], weights[0][0].dtype)
    for c in tl.range(0, CORNERS, loop_unroll_factor=UNROLL):
        entry = _entry(c, terms, extent, GRID.dims)[:, :, None] * GRID.features
        theta = tl.load(table_ptr + entry + f, mask=reads, other=0.0).to(y.dtype)
        y += _weight(c, weights, GRID.dims)[:, :, None] * theta
    y = tl.where((keep & ~finite)[:, :, None] & (f < GRID.features), float("nan"), y)
    return tl.reshape(y, [BLOCK, ROWS * WIDE]).to(table_ptr.dtype.element_ty)


@triton.jit
def leave_features(
    x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, r, valid, rows_ptr, GRID: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """Leaves the features of the points r in memory, some levels at a time."""
    ROWS: tl.constexpr = GRID.rows
    STEP: tl.constexpr = GRID.step
    for first in range(0, ROWS, STEP):
        features = encode(
            x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, r, valid, first, STEP, GRID, PLAN
        )  # fmt: skip
        at = rows_ptr + feature_places(first * GRID.wide, STEP * GRID.wide, PLAN)
        tl.store(at, features.to(PLAN.number))
    tl.debug_barrier()


@triton.jit
def differentiate_encoding(
    x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, gx_ptr, sums_ptr, rows_ptr, r, valid, GRID: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """gx [n, D], and sums [entries, F] += weight * g, for gradients g of the features, some levels at a time."""
    D: tl.constexpr = GRID.dims
    BLOCK: tl.constexpr = PLAN.block
    ROWS: tl.constexpr = GRID.rows
    STEP: tl.constexpr = GRID.step
    _, inside, _ = _settle(x_ptr, r, valid, D, GRID.outside)
    gx = ()
    for _ in tl.static_range(D):
        gx = gx + (tl.zeros([BLOCK], x_ptr.dtype.element_ty),)
    for first in range(0, ROWS, STEP):
        of_levels = differentiate_levels(
            x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, gx_ptr, sums_ptr, rows_ptr, r, valid, first, GRID,
            PLAN,
        )  # fmt: skip
        added = ()
        for d in tl.static_range(D):
            added = added + (gx[d] + of_levels[d],)
        gx = added
    if gx_ptr is not None:
        for d in tl.static_range(D):
            tl.store(gx_ptr + r * D + d, tl.where(inside[d], gx[d], 0.0), mask=valid)


@triton.jit
def differentiate_levels(
    x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, gx_ptr, sums_ptr, rows_ptr, r, valid, first,
    GRID: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """What GRID.step levels give to the gradient of x, [BLOCK] per axis; adds to the sums of the table's."""
    D: tl.constexpr = GRID.dims
    BLOCK: tl.constexpr = PLAN.block
    ROWS: tl.constexpr = GRID.step
    WIDE: tl.constexpr = GRID.wide
    CORNERS: tl.constexpr = GRID.corners
    UNROLL: tl.constexpr = GRID.unroll
    terms, weights, axis_slopes, extent, keep, finite, _ = locate(
        x_ptr, counts_ptr, scales_ptr, layout_ptr, r, valid, first, ROWS, GRID, PLAN
    )  # fmt: skip
    f = tl.arange(0, WIDE)[None, None, :]
    there = (keep & finite)[:, :, None] & (f < GRID.features)
    g = tl.load(rows_ptr + x_places(first * WIDE, ROWS * WIDE, PLAN))
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
    found = ()
    for d in tl.static_range(D):
        found = found + (tl.sum(tl.where(keep & ~finite, float("nan"), gx[d]), 1),)
    return found


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "before"])
def value_kernel(
    x_ptr, table_ptr, counts_ptr, scales_ptr, layout_ptr, weights, biases, modulation_ptr, frequencies_ptr, y_ptr,
    rows_ptr, n, per_row, before, GRID: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """y [n, outputs]; a row of the modulation serves per_row points. Of a launch's tiles, tile `before` first."""
    ROWS: tl.constexpr = GRID.rows
    tile = before + tl.program_id(0)
    r = tile.to(tl.int64) * PLAN.block + tl.arange(0, PLAN.block)
    if PLAN.in_memory:
        rows_ptr += tl.program_id(0).to(tl.int64) * PLAN.size
        leave_features(x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, r, r < n, rows_ptr, GRID, PLAN)
        evaluate_in_memory(
            rows_ptr, r, r < n, r // per_row, tile, weights, biases, modulation_ptr, frequencies_ptr, y_ptr, rows_ptr,
            PLAN,
        )  # fmt: skip
    else:
        features = encode(x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, r, r < n, 0, ROWS, GRID, PLAN)
        if features.dtype != weights[0].dtype.element_ty:
            features = features.to(PLAN.number)  # a type that products take
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
    leave_features(x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, r, valid, rows_ptr, GRID, PLAN)
    differentiate(
        g_ptr, rows_ptr, r, valid, r // per_row, tile, weights, biases, modulation_ptr, frequencies_ptr, gradient_ptr,
        rows_ptr, biases_ptr, PLAN,
    )  # fmt: skip
    if gx_ptr is not None or table_sums_ptr is not None:
        leave_x_gradient(tile, weights[0], rows_ptr, 0, PLAN)
        differentiate_encoding(
            x_ptr, counts_ptr, scales_ptr, layout_ptr, table_ptr, gx_ptr, table_sums_ptr, rows_ptr, r, valid, GRID, PLAN
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


def encoding_shape(shape: Shape) -> Shape:
    """Of a value, from that of the MLP alone: levels of more points than these do not fit into registers."""
    return shape._replace(block=min(shape.block, 16 * shape.warps))


class Call:
    """The tensors of the operators and what their kernels are compiled for."""

    def __init__(
        self, keeps: bool, x: Tensor, entries: Tensor, counts: Tensor | None,
        weights: Sequence[Tensor], biases: Sequence[Tensor], modulation: Tensor | None, frequencies: Tensor | None,
        settings: Sequence[Any],
    ):  # fmt: skip
        grid = hash_grid.Settings(*settings[:GRID_SETTINGS])
        dims, features = x.shape[1], entries.shape[1]
        self.deterministic = grid.deterministic
        self.grid = grid_of(grid, dims, features)
        self.number = compute_dtype(entries, modulation, frequencies, *weights)
        outs = [w.shape[0] for w in weights]
        self.shape = THROUGH_MEMORY if keeps else encoding_shape(value_shape(outs, x.device))
        mlp = modulated_mlp.Settings(*settings[GRID_SETTINGS:], keep=False, deterministic=grid.deterministic)
        of_grid = (features, self.grid.wide)
        width = self.grid.levels * features
        self.plan = plan_of(mlp, width, outs, modulation, self.number, self.shape, of_grid, keeps)
        scales, layout = hash_grid._levels_on(x.device, dims, tuple(grid.scales), tuple(grid.layout))
        self.tensors = (
            x, entries, counts, scales, layout, tuple(weights), tuple(biases) or None, modulation, frequencies,
        )  # fmt: skip


def value(
    x: Tensor, table: Tensor, counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    modulation: Tensor | None, frequencies: Tensor | None, *settings: Any,
) -> Tensor:  # fmt: skip
    """The operator triton_hash_grid_mlp."""
    call = Call(False, x, table, counts, weights, biases, modulation, frequencies, settings)
    y = weights[0].new_empty(len(x), call.plan.outputs)

    def launch(rows: Tensor | None, before: int, tiles: int) -> None:
        value_kernel[(tiles,)](
            *call.tensors, y, rows, len(x), per_row(x, modulation), before, call.grid, call.plan,
            **call.shape.options,
        )  # fmt: skip

    run_value(launch, x, call.plan)
    return y


def backward(
    g: Tensor, x: Tensor, table: Tensor, counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    modulation: Tensor | None, frequencies: Tensor | None, *settings_and_mask: Any,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """The operator triton_hash_grid_mlp_backward: gradients of <g, y> in x, table, weights, biases and modulation."""
    *settings, mask = settings_and_mask
    wants_x, wants_table, *wants = mask
    call = Call(True, x, table, counts, weights, biases, modulation, frequencies, settings)
    if wants_table and call.deterministic:
        hash_grid.refuse_determinism("hash_grid_mlp_backward")
    job = Gradients(call.plan, x, weights, biases, modulation, [wants_x, *wants])
    wide = torch.float64 if table.dtype == torch.float64 else torch.float32
    sums = torch.zeros_like(table, dtype=wide) if wants_table else None

    def launch(before: int, tiles: int) -> None:
        gradients_kernel[(tiles,)](
            g, *call.tensors, job.gx, sums, job.of_modulation, job.rows, job.of_biases, len(x), per_row(x, modulation),
            job.span, before, call.grid, job.plan, **call.shape.options,
        )  # fmt: skip

    job.run(launch, None)
    gx, *others = job.results()
    return gx, table.new_empty(0) if sums is None else sums.to(table.dtype), *others
