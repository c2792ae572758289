# SPDX-License-Identifier: MIT
"""Gradients of the modulated MLP for the BLOCK points of a program, in Triton.

A program takes a tile of BLOCK points through the layers once more, leaves what the norms give in memory (`rows_ptr`,
a part of its own), and goes back through the layers. It also leaves there what modulated_mlp_sums.py makes the
gradients of the weights of: each layer's result and the gradient of its W h + b.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import slope
from .modulated_mlp_rows import (
    activated_layer,
    columns,
    forward_layer,
    modulation_at,
    product,
    rate_of,
    scale_and_shift,
    x_columns,
)

# ---- rows of the program ---------------------------------------------------------------------------------------------


@triton.jit
def row_places(layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Where chunk j of the layer is left."""
    p, o = tl.arange(0, PLAN.block), tl.arange(0, PLAN.chunks[layer])
    return PLAN.row_at[layer] + j * PLAN.block * PLAN.chunks[layer] + p[:, None] * PLAN.chunks[layer] + o[None, :]


@triton.jit
def deviation_places(layer: tl.constexpr, PLAN: tl.constexpr):
    return PLAN.row_at[layer] + PLAN.counts[layer] * PLAN.block * PLAN.chunks[layer] + tl.arange(0, PLAN.block)


@triton.jit
def result_places(layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Where chunk j of the result of the layer is left."""
    return PLAN.result_at[layer] - PLAN.row_at[layer] + row_places(layer, j, PLAN)


@triton.jit
def gradient_places(layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Where chunk j of the gradient of W h + b in the layer is left."""
    return PLAN.gradient_at[layer] - PLAN.row_at[layer] + row_places(layer, j, PLAN)


@triton.jit
def x_places(i: tl.constexpr, PLAN: tl.constexpr):
    """Where chunk i of the gradient of x is added up."""
    p, k = tl.arange(0, PLAN.block), tl.arange(0, PLAN.x_chunk)
    return PLAN.gradient_at[PLAN.layers] + i * PLAN.block * PLAN.x_chunk + p[:, None] * PLAN.x_chunk + k[None, :]


@triton.jit
def feature_places(PLAN: tl.constexpr):
    """Where encoded features are left."""
    p, k = tl.arange(0, PLAN.block), tl.arange(0, PLAN.x_width)
    return PLAN.gradient_at[PLAN.layers + 1] + p[:, None] * PLAN.x_width + k[None, :]


@triton.jit
def leave_rows(
    source, r, valid, row, weights, biases, modulation_ptr, frequencies_ptr, rows_ptr, WITH_RESULTS: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Leaves n and one over the deviation of every layer that the derivative needs, and on demand the results."""
    LAYERS: tl.constexpr = PLAN.layers if PLAN.needs_last else PLAN.layers - 1
    h = ()
    for layer in tl.static_range(LAYERS):
        n, inverse = forward_layer(
            h, source, r, valid, weights[layer], None if biases is None else biases[layer], layer, PLAN
        )
        leave_layer(n, inverse, rows_ptr, layer, PLAN)
        if layer < PLAN.layers - 1:
            h = activated_layer(n, modulation_ptr, frequencies_ptr, row, valid, layer, PLAN)
            if WITH_RESULTS:
                leave_results(h, valid, rows_ptr, layer, PLAN)
    tl.debug_barrier()  # other threads may read them


@triton.jit
def leave_layer(n, inverse, rows_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    COUNT: tl.constexpr = PLAN.counts[layer]
    for j in tl.static_range(COUNT):
        tl.store(rows_ptr + row_places(layer, j, PLAN), n[j])
    if PLAN.point_norm and layer < PLAN.hidden:
        tl.store(rows_ptr + deviation_places(layer, PLAN), inverse)


@triton.jit
def leave_results(h, valid, rows_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """A layer's results; 0 for points that are not there, whose gradients are 0 as well: their product must be."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    for j in tl.static_range(COUNT):
        tl.store(rows_ptr + result_places(layer, j, PLAN), tl.where(valid[:, None], h[j], 0.0))


# ---- gradients of a layer --------------------------------------------------------------------------------------------


@triton.jit
def add_modulation_gradient(
    gradient_ptr, scale, shift, r, valid, tile, layer: tl.constexpr, j: tl.constexpr, PLAN: tl.constexpr
):
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
    g, r, valid, row, tile, modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr, layer: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Gradients of a layer's result -> of n. gradient_ptr: of the modulation."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    BLOCK: tl.constexpr = PLAN.block
    of_scale = tl.zeros([BLOCK], PLAN.number)
    of_shift = tl.zeros([BLOCK], PLAN.number)
    w = ()
    for j in tl.static_range(COUNT):
        n = tl.load(rows_ptr + row_places(layer, j, PLAN))
        scale, shift = scale_and_shift(modulation_ptr, row, valid, layer, j, PLAN)
        s = scale * n + shift
        of_s = g[j] * slope(s, rate_of(frequencies_ptr, layer, j, PLAN), PLAN.activations[layer])
        of_s = tl.where(valid[:, None], of_s, 0.0)
        if gradient_ptr is not None and layer < PLAN.hidden:
            if PLAN.channels > 1:
                add_modulation_gradient(gradient_ptr, of_s * n, of_s, r, valid, tile, layer, j, PLAN)
            else:
                of_scale += tl.sum(of_s * n, 1)
                of_shift += tl.sum(of_s, 1)
        w = w + (scale * of_s,)
    if gradient_ptr is not None and layer < PLAN.hidden and PLAN.channels == 1:
        add_modulation_gradient(gradient_ptr, of_scale[:, None], of_shift[:, None], r, valid, tile, layer, 0, PLAN)
    return w


@triton.jit
def through_norm(w, valid, rows_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Gradients of n -> of W h + b."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    BLOCK: tl.constexpr = PLAN.block
    if PLAN.point_norm and layer < PLAN.hidden:
        mean_w = tl.zeros([BLOCK], PLAN.number)
        mean_nw = tl.zeros([BLOCK], PLAN.number)
        for j in tl.static_range(COUNT):
            mean_w += tl.sum(w[j], 1) / PLAN.outs[layer]
            mean_nw += tl.sum(w[j] * tl.load(rows_ptr + row_places(layer, j, PLAN)), 1) / PLAN.outs[layer]
        inverse = tl.load(rows_ptr + deviation_places(layer, PLAN))
        g = ()
        for j in tl.static_range(COUNT):
            n = tl.load(rows_ptr + row_places(layer, j, PLAN))
            _, there = columns(layer, j, PLAN)
            gz = inverse[:, None] * (w[j] - mean_w[:, None] - n * mean_nw[:, None])
            g = g + (tl.where(valid[:, None] & there, gz, 0.0),)
        return g
    else:
        return w


@triton.jit
def leave_gradient(g, tile, rows_ptr, biases_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Leaves gradients of W h + b, and their sums over the tile."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    for j in tl.static_range(COUNT):
        tl.store(rows_ptr + gradient_places(layer, j, PLAN), g[j])
        o = j * PLAN.chunks[layer] + tl.arange(0, PLAN.chunks[layer])
        at = biases_ptr + tile.to(tl.int64) * PLAN.bias_at[PLAN.layers] + PLAN.bias_at[layer] + o
        tl.store(at, tl.sum(g[j], 0), mask=o < PLAN.outs[layer])


@triton.jit
def own_gradient(g, weight_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Gradients of the result of the layer before."""
    BLOCK: tl.constexpr = PLAN.block
    COUNT: tl.constexpr = PLAN.counts[layer]
    PARTS: tl.constexpr = PLAN.counts[layer - 1]
    WIDTH: tl.constexpr = PLAN.chunks[layer - 1]
    total = ()
    for _ in tl.static_range(PARTS):
        total = total + (tl.zeros([BLOCK, WIDTH], PLAN.number),)
    for j in tl.static_range(COUNT):
        total = add_transposed_products(total, g[j], weight_ptr, layer, j, PLAN)
    return total


@triton.jit
def add_transposed_products(total, g, weight_ptr, layer: tl.constexpr, j: tl.constexpr, PLAN: tl.constexpr):
    """Gradients of the result of the layer before, plus what chunk j of the layer gives."""
    PARTS: tl.constexpr = PLAN.counts[layer - 1]
    o = j * PLAN.chunks[layer] + tl.arange(0, PLAN.chunks[layer])
    found = ()
    for i in tl.static_range(PARTS):
        k = i * PLAN.chunks[layer - 1] + tl.arange(0, PLAN.chunks[layer - 1])
        at = weight_ptr + o[:, None] * PLAN.ins[layer] + k[None, :]
        weight = tl.load(at, mask=(o < PLAN.outs[layer])[:, None] & (k < PLAN.owns[layer])[None, :], other=0.0)
        found = found + (total[i] + product(g, weight, PLAN),)
    return found


@triton.jit
def x_gradient(g, weight_ptr, rows_ptr, layer: tl.constexpr, i: tl.constexpr, PLAN: tl.constexpr):
    """Gradient of chunk i of x by the layer and those behind it."""
    BLOCK: tl.constexpr = PLAN.block
    WIDTH: tl.constexpr = PLAN.x_chunk
    COUNT: tl.constexpr = PLAN.counts[layer]
    k, seen = x_columns(i, PLAN)
    total = tl.zeros([BLOCK, WIDTH], PLAN.number)
    for j in tl.static_range(COUNT):
        o = j * PLAN.chunks[layer] + tl.arange(0, PLAN.chunks[layer])
        at = weight_ptr + o[:, None] * PLAN.ins[layer] + PLAN.owns[layer] + k[None, :]
        total += product(g[j], tl.load(at, mask=(o < PLAN.outs[layer])[:, None] & seen[None, :], other=0.0), PLAN)
    if PLAN.x_later[layer]:
        total += tl.load(rows_ptr + x_places(i, PLAN))
    return total


@triton.jit
def leave_x_gradient(g, weight_ptr, rows_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Adds up the gradient of x by a layer other than the first."""
    COUNT: tl.constexpr = PLAN.x_count if PLAN.takes_x[layer] else 0
    for i in tl.static_range(COUNT):
        tl.store(rows_ptr + x_places(i, PLAN), x_gradient(g, weight_ptr, rows_ptr, layer, i, PLAN))


# ---- all layers ------------------------------------------------------------------------------------------------------


@triton.jit
def output_gradient(g_ptr, r, valid, rows_ptr, PLAN: tl.constexpr):
    """Gradients of the last layer's result; that of an x behind it is left in memory."""
    LAST: tl.constexpr = PLAN.layers - 1
    COUNT: tl.constexpr = PLAN.counts[LAST]
    X_COUNT: tl.constexpr = PLAN.x_count if PLAN.skips[LAST] else 0
    at = g_ptr + r[:, None] * PLAN.outputs
    g = ()
    for j in tl.static_range(COUNT):
        o, there = columns(LAST, j, PLAN)
        g = g + (tl.load(at + o, mask=valid[:, None] & there, other=0.0).to(PLAN.number),)
    for i in tl.static_range(X_COUNT):
        feature, seen = x_columns(i, PLAN)
        behind = tl.load(at + PLAN.outs[LAST] + feature[None, :], mask=valid[:, None] & seen[None, :], other=0.0)
        tl.store(rows_ptr + x_places(i, PLAN), behind.to(PLAN.number))
    return g


@triton.jit
def layer_gradient(
    g, valid, r, row, tile, modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr, biases_ptr, layer: tl.constexpr,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Gradients of the layer's result -> of its W h + b; on the way those of its modulation."""
    if layer < PLAN.layers - 1 or PLAN.needs_last:
        w = through_activation(
            g, r, valid, row, tile, modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr, layer, PLAN
        )  # fmt: skip
        g = through_norm(w, valid, rows_ptr, layer, PLAN)
    if biases_ptr is not None:
        leave_gradient(g, tile, rows_ptr, biases_ptr, layer, PLAN)
    return g


@triton.jit
def differentiate(
    g_ptr, source, r, valid, row, tile, weights, biases, modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr,
    biases_ptr, PLAN: tl.constexpr,
):  # fmt: skip
    """Gradients of the first layer's W h + b; on the way those of the modulation, and what its sums need.

    gradient_ptr: of the modulation; biases_ptr [tiles, all biases]: sums of each tile, or None where none is wanted."""
    LAYERS: tl.constexpr = PLAN.layers
    leave_rows(
        source, r, valid, row, weights, biases, modulation_ptr, frequencies_ptr, rows_ptr, biases_ptr is not None, PLAN
    )  # fmt: skip
    g = output_gradient(g_ptr, r, valid, rows_ptr, PLAN)
    for i in tl.static_range(LAYERS):
        g = layer_gradient(
            g, valid, r, row, tile, modulation_ptr, frequencies_ptr, gradient_ptr, rows_ptr, biases_ptr, LAYERS - 1 - i,
            PLAN,
        )  # fmt: skip
        if i < LAYERS - 1:
            leave_x_gradient(g, weights[LAYERS - 1 - i], rows_ptr, LAYERS - 1 - i, PLAN)
            g = own_gradient(g, weights[LAYERS - 1 - i], LAYERS - 1 - i, PLAN)
    return g
