# SPDX-License-Identifier: MIT
"""The modulated MLP's layers for the BLOCK points of a program, chunk by chunk through memory, in Triton.

Two chunks and a piece of a weight are in registers at a time, so that layers of any width fit. The rest lies in a part
of memory that a program has for itself (`rows_ptr`), of a launch's programs so little that it stays in the caches.
Threads read what others have written: a barrier stands between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .modulated_mlp_rows import (
    activated,
    append_x,
    bias_of,
    centred,
    columns,
    inverse_deviation,
    times_weight,
    x_columns,
    x_values,
)


@triton.jit
def row_places(layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Where chunk j of the layer is left."""
    p, o = tl.arange(0, PLAN.block), tl.arange(0, PLAN.chunks[layer])
    return PLAN.row_at[layer] + j * PLAN.block * PLAN.chunks[layer] + p[:, None] * PLAN.chunks[layer] + o[None, :]


@triton.jit
def result_places(layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Where chunk j of the result of the layer is left."""
    return PLAN.result_at[layer] - PLAN.row_at[layer] + row_places(layer, j, PLAN)


@triton.jit
def deviation_places(layer: tl.constexpr, PLAN: tl.constexpr):
    """Where one over the deviations is left, of what is kept."""
    return PLAN.row_at[layer] + PLAN.counts[layer] * PLAN.block * PLAN.chunks[layer] + tl.arange(0, PLAN.block)


@triton.jit
def untold(count, tile):
    """count, of which the assembler is not told: it would write out the products of all chunks, and spill.

    tile: a number that is not negative."""
    return count + tl.minimum(tile, 0)


@triton.jit
def linear_chunk(
    source, r, valid, tile, rows_ptr, weight_ptr, bias_ptr, layer: tl.constexpr, j, PLAN: tl.constexpr
):  # fmt: skip
    """Chunk j of W h + b in the layer, of the results of the layer before."""
    z = bias_of(bias_ptr, layer, j, PLAN)
    if layer > 0:
        for i in range(0, untold(PLAN.counts[layer - 1], tile)):
            k = i * PLAN.chunks[layer - 1] + tl.arange(0, PLAN.chunks[layer - 1])
            h = tl.load(rows_ptr + result_places(layer - 1, i, PLAN))
            z += times_weight(h, weight_ptr, k, k < PLAN.owns[layer], layer, j, PLAN)
    if PLAN.takes_x[layer]:
        for i in range(0, untold(PLAN.x_count, tile)):
            feature, seen = x_columns(i, PLAN)
            x = x_values(source, r, valid, i, PLAN)
            z += times_weight(x, weight_ptr, PLAN.owns[layer] + feature, seen, layer, j, PLAN)
    return z


@triton.jit
def leave_linear(source, r, valid, tile, rows_ptr, weight_ptr, bias_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Leaves the chunks of W h + b. Their mean and one over their deviation [BLOCK], or 0 and 1 without a norm."""
    BLOCK: tl.constexpr = PLAN.block
    COUNT: tl.constexpr = PLAN.counts[layer]
    total = tl.zeros([BLOCK], PLAN.number)
    for j in range(COUNT):
        z = linear_chunk(source, r, valid, tile, rows_ptr, weight_ptr, bias_ptr, layer, j, PLAN)
        tl.store(rows_ptr + row_places(layer, j, PLAN), z)
        total += tl.sum(z, 1)  # padding is 0
    tl.debug_barrier()
    if PLAN.normalised[layer]:
        mean = total / PLAN.outs[layer]
        squares = tl.zeros([BLOCK], PLAN.number)
        for j in range(COUNT):
            c = centred(tl.load(rows_ptr + row_places(layer, j, PLAN)), mean, layer, j, PLAN)
            squares += tl.sum(c * c, 1)
        return mean, inverse_deviation(squares, layer, PLAN)
    else:
        return tl.zeros([BLOCK], PLAN.number), tl.full([BLOCK], 1.0, PLAN.number)


@triton.jit
def normalised_chunk(rows_ptr, mean, inverse, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """n of chunk j of the layer; left in its place if that is kept."""
    n = tl.load(rows_ptr + row_places(layer, j, PLAN))
    if PLAN.normalised[layer]:
        n = centred(n, mean, layer, j, PLAN) * inverse[:, None]
        if PLAN.keeps:
            tl.store(rows_ptr + row_places(layer, j, PLAN), n)
    return n


@triton.jit
def leave_layer(
    source, r, valid, row, tile, weight_ptr, bias_ptr, modulation_ptr, frequencies_ptr, rows_ptr, layer: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Leaves the layer's results, 0 for points that are not there, and if kept its n and one over its deviation.

    The gradients of points that are not there are 0 as well: so must their product with results be."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    mean, inverse = leave_linear(source, r, valid, tile, rows_ptr, weight_ptr, bias_ptr, layer, PLAN)
    if PLAN.keeps and PLAN.normalised[layer]:
        tl.store(rows_ptr + deviation_places(layer, PLAN), inverse)
    for j in range(COUNT):
        n = normalised_chunk(rows_ptr, mean, inverse, layer, j, PLAN)
        h = activated(n, modulation_ptr, frequencies_ptr, row, valid, layer, j, PLAN)
        tl.store(rows_ptr + result_places(layer, j, PLAN), tl.where(valid[:, None], h, 0.0))
    tl.debug_barrier()


@triton.jit
def evaluate_in_memory(
    source, r, valid, row, tile, weights, biases, modulation_ptr, frequencies_ptr, y_ptr, rows_ptr, PLAN: tl.constexpr
):  # fmt: skip
    """y [n, outputs] of the points r."""
    LAST: tl.constexpr = PLAN.layers - 1
    COUNT: tl.constexpr = PLAN.counts[LAST]
    for layer in tl.static_range(LAST):
        leave_layer(
            source, r, valid, row, tile, weights[layer], None if biases is None else biases[layer], modulation_ptr,
            frequencies_ptr, rows_ptr, layer, PLAN,
        )  # fmt: skip
    mean, inverse = leave_linear(
        source, r, valid, tile, rows_ptr, weights[LAST], None if biases is None else biases[LAST], LAST, PLAN
    )  # fmt: skip
    at = y_ptr + r[:, None] * PLAN.outputs
    for j in range(COUNT):
        n = normalised_chunk(rows_ptr, mean, inverse, LAST, j, PLAN)
        h = activated(n, modulation_ptr, frequencies_ptr, row, valid, LAST, j, PLAN)
        o, there = columns(LAST, j, PLAN)
        tl.store(at + o, h.to(y_ptr.dtype.element_ty), mask=valid[:, None] & there)
    append_x(source, r, valid, y_ptr, PLAN)
