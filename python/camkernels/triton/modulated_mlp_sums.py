# SPDX-License-Identifier: MIT
"""Gradients of the modulated MLP's weights in Triton: sums of outer products over the points of a launch.

A program sums one piece of one layer's weight over some tiles, in their order; the sums of the programs are added by
PyTorch, in an order of its own: the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .modulated_mlp_gradients import gradient_places
from .modulated_mlp_memory import result_places
from .modulated_mlp_rows import points_of, product, x_columns, x_values


@triton.jit
def gradient_chunk(rows_ptr, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Gradient of W h + b [width, BLOCK], chunk j of the layer; rows_ptr: of the tile."""
    return tl.trans(tl.load(rows_ptr + gradient_places(layer, j, PLAN)))


@triton.jit
def store_sum(sums_ptr, total, o, k, there, before, layer: tl.constexpr, PLAN: tl.constexpr):
    """Stores the sums of the first launch, adds those of others."""
    at = sums_ptr + PLAN.weight_at[layer] + o[:, None] * PLAN.ins[layer] + k[None, :]
    there = there & (o < PLAN.outs[layer])[:, None]
    tl.store(at, total + tl.load(at, mask=there & (before > 0), other=0.0), mask=there)


@triton.jit
def sum_own(rows_ptr, sums_ptr, first, last, before, j, i, layer: tl.constexpr, PLAN: tl.constexpr):
    """Gradient of the weights of chunk j of the layer for chunk i of the layer before."""
    OUT: tl.constexpr = PLAN.chunks[layer]
    IN: tl.constexpr = PLAN.chunks[layer - 1]
    total = tl.zeros([OUT, IN], PLAN.number)
    for tile in range(first, last):
        rows = rows_ptr + tile * PLAN.size
        h = tl.load(rows + result_places(layer - 1, i, PLAN))
        total += product(gradient_chunk(rows, layer, j, PLAN), h, PLAN)
    k = i * IN + tl.arange(0, IN)
    store_sum(sums_ptr, total, j * OUT + tl.arange(0, OUT), k, (k < PLAN.owns[layer])[None, :], before, layer, PLAN)


@triton.jit
def sum_x(x_ptr, rows_ptr, sums_ptr, first, last, before, n, span, j, i, layer: tl.constexpr, PLAN: tl.constexpr):
    """Gradient of the weights of chunk j of the layer for chunk i of x."""
    OUT: tl.constexpr = PLAN.chunks[layer]
    WIDTH: tl.constexpr = PLAN.x_chunk
    total = tl.zeros([OUT, WIDTH], PLAN.number)
    for tile in range(first, last):
        rows = rows_ptr + tile * PLAN.size
        r, valid = points_of(before + tile, n, span, PLAN)
        x = x_values(x_ptr if PLAN.group is None else rows, r, valid, i, PLAN)
        total += product(gradient_chunk(rows, layer, j, PLAN), x, PLAN)
    k, seen = x_columns(i, PLAN)
    store_sum(sums_ptr, total, j * OUT + tl.arange(0, OUT), PLAN.owns[layer] + k, seen[None, :], before, layer, PLAN)


@triton.jit(do_not_specialize=["n", "span", "before", "tiles"])
def sums_kernel(x_ptr, rows_ptr, sums_ptr, n, span, before, tiles, PLAN: tl.constexpr):
    """sums [splits, all weights] (+)= gradients of the weights, over the tiles of a launch, tile `before` first."""
    LAYERS: tl.constexpr = PLAN.layers
    piece, split = tl.program_id(0), tl.program_id(1)
    share = tl.cdiv(tiles, tl.num_programs(1))
    first = split.to(tl.int64) * share
    last = tl.minimum(first + share, tiles)
    sums_ptr += split.to(tl.int64) * PLAN.weight_at[LAYERS]
    for layer in tl.static_range(LAYERS):
        if (piece >= PLAN.piece_at[layer]) & (piece < PLAN.piece_at[layer + 1]):
            sum_piece(
                x_ptr, rows_ptr, sums_ptr, first, last, before, n, span, piece - PLAN.piece_at[layer], layer, PLAN
            )


@triton.jit
def sum_piece(x_ptr, rows_ptr, sums_ptr, first, last, before, n, span, piece, layer: tl.constexpr, PLAN: tl.constexpr):
    PARTS: tl.constexpr = PLAN.counts[layer - 1] if layer > 0 else 0
    j, i = piece % PLAN.counts[layer], piece // PLAN.counts[layer]
    if PARTS > 0:  # noqa: SIM102 decided when compiled
        if i < PARTS:
            sum_own(rows_ptr, sums_ptr, first, last, before, j, i, layer, PLAN)
    if PLAN.takes_x[layer]:  # noqa: SIM102
        if i >= PARTS:
            sum_x(x_ptr, rows_ptr, sums_ptr, first, last, before, n, span, j, i - PARTS, layer, PLAN)
