# SPDX-License-Identifier: MIT
"""What a program of the modulated MLP does with its BLOCK points, in Triton.

A layer is cut into chunks [BLOCK, width], so that a product reads a weight matrix piece by piece through shared memory.
The chunks of narrow layers stay in registers as tuples (here); those of wide ones, and all of gradients, pass through
memory (modulated_mlp_memory.py). Sizes are padded to powers of two of at least 16, the rest masked: weights there count
as 0. Hidden values are of type PLAN.number, and so are sums; the formulas are those of csrc/math/norm.h and
activation.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import RESIDUAL_SINE, activate

# ---- points ----------------------------------------------------------------------------------------------------------


@triton.jit
def points_of(tile, n, span, PLAN: tl.constexpr):
    """Points of a tile, and which there are; no tile reaches beyond `span` points that belong together."""
    tiles = tl.cdiv(span, PLAN.block)
    first = (tile // tiles).to(tl.int64) * span
    place = (tile % tiles) * PLAN.block + tl.arange(0, PLAN.block)
    return first + place, (place < span) & (first + place < n)


# ---- products --------------------------------------------------------------------------------------------------------


@triton.jit
def product(a, b, PLAN: tl.constexpr):
    """a b in PLAN.number. Of two float32, and of float32 and an exact 16-bit number, as PLAN.precision says."""
    if b.dtype == PLAN.number or PLAN.number == tl.float64:
        c = tl.dot(a.to(PLAN.number), b.to(PLAN.number), input_precision=PLAN.precision, out_dtype=PLAN.number)
    elif a.dtype == b.dtype:
        c = tl.dot(a, b)
    elif PLAN.precision == "tf32x3":
        # a is the sum of two tf32 but for its last bit, and b is one. What is not finite has no rest.
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        rest = tl.where(tl.abs(a) <= 3.4e38, a - high, 0.0)
        wide = b.to(tl.float32)
        c = tl.dot(high, wide, tl.dot(rest, wide, input_precision="tf32"), input_precision="tf32")
    else:
        c = tl.dot(a, b.to(tl.float32), input_precision=PLAN.precision)
    return c


@triton.jit
def x_columns(i, PLAN: tl.constexpr):
    """Of chunk i of x: which features its columns are, and whether they are any."""
    USED: tl.constexpr = PLAN.x_group[0]
    WIDE: tl.constexpr = PLAN.x_group[1]
    k = i * PLAN.x_chunk + tl.arange(0, PLAN.x_chunk)
    feature = k // WIDE * USED + k % WIDE
    return feature, (k % WIDE < USED) & (feature < PLAN.features)


@triton.jit
def feature_places(first, COUNT: tl.constexpr, PLAN: tl.constexpr):
    """Where encoded features [BLOCK, COUNT] are left, `first` and those behind it."""
    p, k = tl.arange(0, PLAN.block), first + tl.arange(0, COUNT)
    return PLAN.features_at + p[:, None] * PLAN.x_width + k[None, :]


@triton.jit
def x_values(source, r, valid, i, PLAN: tl.constexpr):
    """Chunk i of x. source: where x lies; of encoded features the tile's memory, or they themselves."""
    if PLAN.group is None:
        k, seen = x_columns(i, PLAN)
        at = source + r[:, None] * PLAN.features + k[None, :]
        return tl.load(at, mask=valid[:, None] & seen[None, :], other=0.0)
    elif PLAN.in_memory:
        return tl.load(source + feature_places(i * PLAN.x_chunk, PLAN.x_chunk, PLAN))
    else:
        return source


@triton.jit
def times_weight(a, weight_ptr, k, seen, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """What inputs k of the layer, a [BLOCK, len(k)], give to its chunk j."""
    o = j * PLAN.chunks[layer] + tl.arange(0, PLAN.chunks[layer])
    at = weight_ptr + o[None, :] * PLAN.ins[layer] + k[:, None]
    weight = tl.load(at, mask=seen[:, None] & (o < PLAN.outs[layer])[None, :], other=0.0)
    return product(a, weight, PLAN)


@triton.jit
def add_products(z, a, weight_ptr, k, seen, layer: tl.constexpr, PLAN: tl.constexpr):
    """Chunks z of the layer, plus the products of its inputs k, a [BLOCK, len(k)], and their weights."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (z[j] + times_weight(a, weight_ptr, k, seen, layer, j, PLAN),)
    return found


@triton.jit
def linear(h, source, r, valid, weight_ptr, bias_ptr, layer: tl.constexpr, PLAN: tl.constexpr):
    """Chunks of W h + b in the layer; h: of the layer before."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    PARTS: tl.constexpr = PLAN.counts[layer - 1] if layer > 0 else 0
    X_PARTS: tl.constexpr = PLAN.x_count if PLAN.takes_x[layer] else 0
    z = ()
    for j in tl.static_range(COUNT):
        z = z + (bias_of(bias_ptr, layer, j, PLAN),)
    for i in tl.static_range(PARTS):  # one chunk of h after the other: few are split for products at a time
        k = i * PLAN.chunks[layer - 1] + tl.arange(0, PLAN.chunks[layer - 1])
        z = add_products(z, h[i], weight_ptr, k, k < PLAN.owns[layer], layer, PLAN)
    for i in tl.static_range(X_PARTS):
        feature, seen = x_columns(i, PLAN)
        x = x_values(source, r, valid, i, PLAN)
        z = add_products(z, x, weight_ptr, PLAN.owns[layer] + feature, seen, layer, PLAN)
    return z


@triton.jit
def bias_of(bias_ptr, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Chunk j of the bias of the layer, for every point."""
    BLOCK: tl.constexpr = PLAN.block
    WIDTH: tl.constexpr = PLAN.chunks[layer]
    z = tl.zeros([BLOCK, WIDTH], PLAN.number)
    if bias_ptr is not None:
        o, there = columns(layer, j, PLAN)
        z += tl.load(bias_ptr + o, mask=there, other=0.0).to(PLAN.number)
    return z


# ---- norm, modulation, activation ------------------------------------------------------------------------------------


@triton.jit
def columns(layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Of chunk j of the layer: its columns [1, width], and whether the layer has them."""
    o = (j * PLAN.chunks[layer] + tl.arange(0, PLAN.chunks[layer]))[None, :]
    return o, o < PLAN.outs[layer]


@triton.jit
def centred(z, mean, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Chunk j of the layer minus the mean [BLOCK]; padding stays 0."""
    _, there = columns(layer, j, PLAN)
    return tl.where(there, z - mean[:, None], 0.0)


@triton.jit
def inverse_deviation(squares, layer: tl.constexpr, PLAN: tl.constexpr):
    """One over the deviation of a layer with that sum of centred squares."""
    return 1 / tl.sqrt(squares / PLAN.outs[layer] + PLAN.eps)


@triton.jit
def normalise(z, layer: tl.constexpr, PLAN: tl.constexpr):
    """n of a layer's chunks."""
    BLOCK: tl.constexpr = PLAN.block
    COUNT: tl.constexpr = PLAN.counts[layer]
    if PLAN.normalised[layer]:
        total = tl.zeros([BLOCK], PLAN.number)
        for j in tl.static_range(COUNT):
            total += tl.sum(z[j], 1)  # padding is 0
        mean = total / PLAN.outs[layer]
        squares = tl.zeros([BLOCK], PLAN.number)
        for j in tl.static_range(COUNT):
            c = centred(z[j], mean, layer, j, PLAN)
            squares += tl.sum(c * c, 1)
        inverse = inverse_deviation(squares, layer, PLAN)
        n = ()
        for j in tl.static_range(COUNT):
            n = n + (centred(z[j], mean, layer, j, PLAN) * inverse[:, None],)
        return n
    else:
        return z


@triton.jit
def modulation_at(row, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Where the scale of chunk j lies in the modulation, and which there is; the shift is PLAN.channels further."""
    at = ((row * PLAN.hidden + layer) * (2 * PLAN.channels))[:, None]
    if PLAN.channels > 1:
        o, there = columns(layer, j, PLAN)
        return at + o, there
    else:
        return at, at >= 0


@triton.jit
def scale_and_shift(modulation_ptr, row, valid, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """gamma and beta that broadcast to chunk j; row: of each point, in the modulation."""
    if PLAN.channels > 0 and layer < PLAN.hidden:
        at, there = modulation_at(row, layer, j, PLAN)
        read = valid[:, None] & there
        scale = tl.load(modulation_ptr + at, mask=read, other=0.0).to(PLAN.number)
        return scale, tl.load(modulation_ptr + at + PLAN.channels, mask=read, other=0.0).to(PLAN.number)
    else:
        return tl.full([1, 1], 1.0, PLAN.number), tl.full([1, 1], 0.0, PLAN.number)


@triton.jit
def rate_of(frequencies_ptr, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Omega of a sine; of a residual one its frequencies [1, width]."""
    if PLAN.activations[layer] == RESIDUAL_SINE:
        o, there = columns(layer, j, PLAN)
        return tl.load(frequencies_ptr + o, mask=there, other=0.0)
    else:
        return PLAN.omegas[layer]


@triton.jit
def activated(n, modulation_ptr, frequencies_ptr, row, valid, layer: tl.constexpr, j, PLAN: tl.constexpr):
    """Chunk j of a layer's result, f(scale n + shift)."""
    scale, shift = scale_and_shift(modulation_ptr, row, valid, layer, j, PLAN)
    return activate(scale * n + shift, rate_of(frequencies_ptr, layer, j, PLAN), PLAN.activations[layer])


@triton.jit
def activated_layer(n, modulation_ptr, frequencies_ptr, row, valid, layer: tl.constexpr, PLAN: tl.constexpr):
    """Chunks of a layer's result."""
    COUNT: tl.constexpr = PLAN.counts[layer]
    h = ()
    for j in tl.static_range(COUNT):
        h = h + (activated(n[j], modulation_ptr, frequencies_ptr, row, valid, layer, j, PLAN),)
    return h


@triton.jit
def evaluate(
    source, r, valid, row, weights, biases, modulation_ptr, frequencies_ptr, y_ptr, PLAN: tl.constexpr
):  # fmt: skip
    """y [n, outputs] of the points r."""
    LAYERS: tl.constexpr = PLAN.layers
    COUNT: tl.constexpr = PLAN.counts[LAYERS - 1]
    h = ()
    for layer in tl.static_range(LAYERS):
        z = linear(h, source, r, valid, weights[layer], None if biases is None else biases[layer], layer, PLAN)
        n = normalise(z, layer, PLAN)
        h = activated_layer(n, modulation_ptr, frequencies_ptr, row, valid, layer, PLAN)
    at = y_ptr + r[:, None] * PLAN.outputs
    for j in tl.static_range(COUNT):
        o, there = columns(LAYERS - 1, j, PLAN)
        tl.store(at + o, h[j].to(y_ptr.dtype.element_ty), mask=valid[:, None] & there)
    append_x(source, r, valid, y_ptr, PLAN)


@triton.jit
def append_x(source, r, valid, y_ptr, PLAN: tl.constexpr):
    """Stores x behind the last layer's result, where it belongs."""
    LAST: tl.constexpr = PLAN.layers - 1
    COUNT: tl.constexpr = PLAN.x_count if PLAN.skips[LAST] else 0
    at = y_ptr + r[:, None] * PLAN.outputs + PLAN.outs[LAST]
    for i in tl.static_range(COUNT):
        feature, seen = x_columns(i, PLAN)
        x = x_values(source, r, valid, i, PLAN).to(y_ptr.dtype.element_ty)
        tl.store(at + feature[None, :], x, mask=valid[:, None] & seen[None, :])
