# SPDX-License-Identifier: MIT
"""Gradients of the modulated MLP for the BLOCK points of a program, in Triton.

A program takes a tile of BLOCK points through the layers once more (modulated_mlp_memory.py), keeping in memory what
the norms give, and goes back through the layers, chunk by chunk. It also leaves there what modulated_mlp_sums.py makes
the gradients of the weights of: each layer's result and the gradient of its W h + b.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import slope
from .modulated_mlp_memory import deviation_places, leave_layer, row_places, untold
from .modulated_mlp_rows import columns, modulation_at, product, rate_of, scale_and_shift, x_columns


@triton.jit
def gradient_places(layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Where chunk j of the gradient of W h + b in the layer is left."""
    return PLAN.gradient_at[layer] - PLAN.row_at[layer] + row_places(layer, j, PLAN)


@triton.jit
def x_places(first, COUNT: tl.constexpr, PLAN: tl.constexpr):
    """Where columns [BLOCK, COUNT] of the gradient of x are added up, `first` and those behind it."""
    p, k = tl.arange(0, PLAN.block), first + tl.arange(0, COUNT)
    return PLAN.gradient_at[PLAN.layers] + p[:, None] * (PLAN.x_count * PLAN.x_chunk) + k[None, :]


@triton.jit
def leave_rows(
    source, r, valid, row, tile, weights, biases, modulation_ptr, frequencies_ptr, rows_ptr, PLAN: tl.constexpr
):  # fmt: skip
    """Leaves n, one over the deviation and the result of every layer that the derivative needs."""
    LAYERS: tl.constexpr = PLAN.layers if PLAN.needs_last else PLAN.layers - 1
    for layer in tl.static_range(LAYERS):
        leave_layer(
            source, r, valid, row, tile, weights[layer], None if biases is None else biases[layer], modulation_ptr,
            frequencies_ptr, rows_ptr, layer, PLAN,
        )  # fmt: skip


# ---- gradients of a layer --------------------------------------------------------------------------------------------


@triton.jit
def add_modulation_gradient(gradient_ptr, scale, shift, r, valid, tile, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Stores what a scale and a shift [BLOCK, 1 or width] get, of each point, or of the tile's points together."""
    if PLAN.sums_modulation:
        at, there = modulation_at(tile + tl.zeros([1], tl.int64), layer, j, PLAN)
        scale, shift = tl.sum(scale, 0)[None, :], tl.sum(shift, 0)[None, :]
    else:
        at, there = modulation_at(r, layer, j, PLAN)
        there = there & valid[:, None]
    kind = gradient_ptr.dtype.element_ty
    tl.store(gradient_ptr + at, scale.to(kind), mask=there)
    tl.store(gradient_ptr + at + PLAN.channels, shift.to(kind), mask=there)


@triton.jit
def through_activation(
    r, valid, row, tile, modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr, layer: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's result -> w of n, in their place; sums [BLOCK] of w and n w over the channels.

    gradient_ptr: of the modulation."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    BLOCK: tl.constexpr = PLAN.block
    of_scale = tl.zeros([BLOCK], PLAN.number)
    of_shift = tl.zeros([BLOCK], PLAN.number)
    sum_w = tl.zeros([BLOCK], PLAN.number)
    sum_nw = tl.zeros([BLOCK], PLAN.number)
    for j in range(COUNT):
        n = tl.load(rows_ptr + row_places(layer, j, PLAN))
        g = tl.load(rows_ptr + gradient_places(layer, j, PLAN))
        scale, shift = scale_and_shift(modulation_ptr, row, valid, layer, j, PLAN)
        of_s = g * slope(scale * n + shift, rate_of(frequencies_ptr, layer, j, PLAN), PLAN.activations[layer])
        of_s = tl.where(valid[:, None], of_s, 0.0)
        if gradient_ptr is not None and layer < PLAN.hidden:
            if PLAN.channels > 1:
                add_modulation_gradient(gradient_ptr, of_s * n, of_s, r, valid, tile, layer, j, PLAN)
            else:
                of_scale += tl.sum(of_s * n, 1)
                of_shift += tl.sum(of_s, 1)
        w = scale * of_s
        tl.store(rows_ptr + gradient_places(layer, j, PLAN), w)
        sum_w += tl.sum(w, 1)
        sum_nw += tl.sum(n * w, 1)
    if gradient_ptr is not None and layer < PLAN.hidden and PLAN.channels == 1:
        add_modulation_gradient(gradient_ptr, of_scale[:, None], of_shift[:, None], r, valid, tile, layer, 0, PLAN)
    tl.debug_barrier()
    return sum_w, sum_nw


@triton.jit
def through_norm(sum_w, sum_nw, valid, rows_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Gradients w of n -> of W h + b, in their place."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    mean_w, mean_nw = sum_w / PLAN.outs[layer], sum_nw / PLAN.outs[layer]
    inverse = tl.load(rows_ptr + deviation_places(layer, PLAN))
    for j in range(COUNT):
        n = tl.load(rows_ptr + row_places(layer, j, PLAN))
        at = rows_ptr + gradient_places(layer, j, PLAN)
        _, there = columns(layer, j, PLAN)
        g = inverse[:, None] * (tl.load(at) - mean_w[:, None] - n * mean_nw[:, None])
        tl.store(at, tl.where(valid[:, None] & there, g, 0.0))
    tl.debug_barrier()


@triton.jit
def leave_bias_gradient(tile, rows_ptr, biases_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Leaves the sums of the gradients of W h + b over the tile."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    biases_ptr += tile.to(tl.int64) * PLAN.bias_at[PLAN.layers] + PLAN.bias_at[layer]
    for j in range(COUNT):
        g = tl.load(rows_ptr + gradient_places(layer, j, PLAN))
        o = j * PLAN.chunks[layer] + tl.arange(0, PLAN.chunks[layer])
        tl.store(biases_ptr + o, tl.sum(g, 0), mask=o < PLAN.outs[layer])


@triton.jit
def leave_own_gradient(tile, weight_ptr, rows_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Leaves gradients of the result of the layer before."""
    BLOCK: tl.constexpr = PLAN.block
    COUNT: tl.constexpr = PLAN.counts[layer]
    PARTS: tl.constexpr = PLAN.counts[layer - 1]
    WIDTH: tl.constexpr = PLAN.chunks[layer - 1]
    for i in range(PARTS):
        k = i * WIDTH + tl.arange(0, WIDTH)
        total = tl.zeros([BLOCK, WIDTH], PLAN.number)
        for j in range(0, untold(COUNT, tile)):
            total += through_weight(weight_ptr, rows_ptr, k, k < PLAN.owns[layer], layer, j, PLAN)
        tl.store(rows_ptr + gradient_places(layer - 1, i, PLAN), total)
    tl.debug_barrier()


@triton.jit
def through_weight(weight_ptr, rows_ptr, k, seen, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """What the gradient of chunk j of W h + b gives to inputs k of the layer."""
    o = j * PLAN.chunks[layer] + tl.arange(0, PLAN.chunks[layer])
    at = weight_ptr + o[:, None] * PLAN.ins[layer] + k[None, :]
    weight = tl.load(at, mask=(o < PLAN.outs[layer])[:, None] & seen[None, :], other=0.0)
    return product(tl.load(rows_ptr + gradient_places(layer, j, PLAN)), weight, PLAN)


@triton.jit
def x_gradient(tile, weight_ptr, rows_ptr, layer: tl.constexpr, i, PLAN: tl.constexpr):
    """Gradient of chunk i of x by the layer and those behind it."""
    BLOCK: tl.constexpr = PLAN.block
    WIDTH: tl.constexpr = PLAN.x_chunk
    COUNT: tl.constexpr = PLAN.counts[layer]
    feature, seen = x_columns(i, PLAN)
    total = tl.zeros([BLOCK, WIDTH], PLAN.number)
    for j in range(0, untold(COUNT, tile)):
        total += through_weight(weight_ptr, rows_ptr, PLAN.owns[layer] + feature, seen, layer, j, PLAN)
    if PLAN.x_later[layer]:
        total += tl.load(rows_ptr + x_places(i * PLAN.x_chunk, PLAN.x_chunk, PLAN))
    return total


@triton.jit
def leave_x_gradient(tile, weight_ptr, rows_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Adds up the gradient of x by the layer in memory."""
    COUNT: tl.constexpr = PLAN.x_count
    for i in range(COUNT):
        tl.store(
            rows_ptr + x_places(i * PLAN.x_chunk, PLAN.x_chunk, PLAN),
            x_gradient(tile, weight_ptr, rows_ptr, layer, i, PLAN),
        )
    tl.debug_barrier()


# ---- all layers ------------------------------------------------------------------------------------------------------


@triton.jit
def leave_output_gradient(g_ptr, r, valid, rows_ptr, PLAN: tl.constexpr):
    """Leaves gradients of the last layer's result, and of an x behind it."""
    LAST: tl.constexpr = PLAN.layers - 1
    COUNT: tl.constexpr = PLAN.counts[LAST]
    X_COUNT: tl.constexpr = PLAN.x_count if PLAN.skips[LAST] else 0
    at = g_ptr + r[:, None] * PLAN.outputs
    for j in range(COUNT):
        o, there = columns(LAST, j, PLAN)
        g = tl.load(at + o, mask=valid[:, None] & there, other=0.0)
        tl.store(rows_ptr + gradient_places(LAST, j, PLAN), g.to(PLAN.number))
    for i in range(X_COUNT):
        feature, seen = x_columns(i, PLAN)
        behind = tl.load(at + PLAN.outs[LAST] + feature[None, :], mask=valid[:, None] & seen[None, :], other=0.0)
        tl.store(rows_ptr + x_places(i * PLAN.x_chunk, PLAN.x_chunk, PLAN), behind.to(PLAN.number))
    tl.debug_barrier()


@triton.jit
def layer_gradient(
    r, valid, row, tile, weight_ptr, modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr, biases_ptr,
    layer: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Gradients of the layer's result -> of its W h + b, and of the layer before's result; those of its modulation."""
    if layer < PLAN.layers - 1 or PLAN.needs_last:
        sum_w, sum_nw = through_activation(
            r, valid, row, tile, modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr, layer, PLAN
        )  # fmt: skip
        if PLAN.normalised[layer]:
            through_norm(sum_w, sum_nw, valid, rows_ptr, layer, PLAN)
    if biases_ptr is not None:
        leave_bias_gradient(tile, rows_ptr, biases_ptr, layer, PLAN)
    if layer > 0:
        if PLAN.takes_x[layer]:
            leave_x_gradient(tile, weight_ptr, rows_ptr, layer, PLAN)
        leave_own_gradient(tile, weight_ptr, rows_ptr, layer, PLAN)


@triton.jit
def differentiate(
    g_ptr, source, r, valid, row, tile, weights, biases, modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr,
    biases_ptr, PLAN: tl.constexpr,
):  # fmt: skip
    """Leaves gradients of the first layer's W h + b; on the way those of the modulation, and what its sums need.

    gradient_ptr: of the modulation; biases_ptr [tiles, all biases]: sums of each tile, or None where none is wanted."""
    LAYERS: tl.constexpr = PLAN.layers
    leave_rows(source, r, valid, row, tile, weights, biases, modulation_ptr, frequencies_ptr, rows_ptr, PLAN)
    leave_output_gradient(g_ptr, r, valid, rows_ptr, PLAN)
    for i in tl.static_range(LAYERS):
        layer_gradient(
            r, valid, row, tile, weights[LAYERS - 1 - i], modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr,
            biases_ptr, LAYERS - 1 - i, PLAN,
        )  # fmt: skip
