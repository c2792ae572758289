# SPDX-License-Identifier: MIT
"""One kernel of a radial basis at a point, phi(x, center, shape), the waves of its weight, and their derivatives, in
Triton: the formulas of csrc/math/radial_basis.h. Vectors are tuples with an item per axis."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .._radial_basis import KINDS, SHAPES, ignores_shape, shape_width

NLIN, IVQ, IVMQ, IVD, IVC, GAUSS, SGAUSS2, NSGAUSS2, MARKOV, EXPSIN, QD, MQD, PHS1, PHS3, VEP, COS = (
    tl.constexpr(i) for i in range(len(KINDS))
)
LEAST_LENGTH = tl.constexpr(1e-8)  # of the vectors whose cosine is taken
# Up to such an angle the two-part reduction keeps float32's digits.
MOST_RADIANS = tl.constexpr(1e6)
# A word of zeros and the binary digits of 1 / 2 pi behind the point.
DIGITS = tl.constexpr((0, 0x28BE60DB, 0x9391054A, 0x7F09D5F4, 0x7D4D3770, 0x36D8A566, 0x4F10E410))


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for."""

    kind: int  # of KINDS
    shape: int  # of SHAPES
    dims: int
    features: int
    keep: int
    normalize: bool
    detach_normalizer: bool
    eps: float
    per_point: int  # kernels of a point, 0: all there are
    block: int  # points of a program, and how many kernels and features it takes at once
    kernels: int
    tile: int
    along: bool = False  # whether gradients of x, centers or shapes are wanted
    ordered: bool = False  # whether what is added to the gradient of a kernel has a row of its own

    @property
    def reads_shape(self) -> bool:
        return not ignores_shape(KINDS[self.kind], SHAPES[self.shape])

    @property
    def projected(self) -> bool:
        return SHAPES[self.shape] == "projected"

    @property
    def width(self) -> int:
        """Numbers of a shape; 0 if they are not read."""
        return shape_width(SHAPES[self.shape], self.dims) if self.reads_shape else 0

    @property
    def places(self) -> tuple[int, ...]:
        """Which number of a shape is at row i and column j of the matrix S, as item i * dims + j; -1: a 0."""
        d, form = self.dims, SHAPES[self.shape]
        if form in ("isotropic", "diagonal"):
            return tuple((i if form == "diagonal" else 0) if i == j else -1 for i in range(d) for j in range(d))
        if form == "symmetric":
            pairs = ((min(i, j), max(i, j)) for i in range(d) for j in range(d))
            return tuple(low * (2 * d - low - 1) // 2 + high for low, high in pairs)
        return tuple(range(d * d))

    @property
    def one_block(self) -> bool:
        """Whether a point's kernels are taken at once."""
        return 0 < self.per_point <= self.kernels

    @property
    def shares(self) -> bool:
        """Whether a weight depends on those of the other kernels, for derivatives."""
        return self.normalize and not self.detach_normalizer


# ---- functions of a number -------------------------------------------------------------------------------------------


@triton.jit
def _reduced(x):
    """x less the nearest multiple of pi / 2, and which one, modulo 4."""
    k = tl.floor(x * 0.636619772 + 0.5)
    r = tl.fma(k, tl.full(x.shape, -1.57079637, x.dtype), x)
    return tl.fma(k, tl.full(x.shape, 4.37113883e-8, x.dtype), r), k.to(tl.int32) & 3


@triton.jit
def _reduced_exactly(x):
    """As _reduced, but for |x| > 2^18. x / 2 pi modulo 1 is the mantissa of x times the digits of 1 / 2 pi that begin
    where its exponent says (Payne, Hanek)."""
    bits = x.to(tl.uint32, bitcast=True)
    exponent = (bits >> 23) & 255
    place = exponent - 118  # the first digit that counts, behind a word of zeros
    word = place >> 5
    shift = (place & 31).to(tl.uint64)
    head = tl.zeros_like(shift)
    tail = tl.zeros_like(shift)
    for w in tl.static_range(5):
        head = tl.where(word == w, (DIGITS[w] << 32) | DIGITS[w + 1], head)
        tail = tl.where(word == w, DIGITS[w + 2], tail)
    turns = ((bits & 0x7FFFFF) | 0x800000).to(tl.uint64) * ((head << shift) | ((tail << shift) >> 32))
    turns = tl.where(x < 0, 0 - turns, turns)
    quarter = (turns + (1 << 61)) >> 62
    r = (turns - (quarter << 62)).to(tl.int64).to(x.dtype) * (6.283185307179586 / 2**64)
    return tl.where(exponent == 255, float("nan"), r), quarter.to(tl.int32) & 3


@triton.jit
def sine_and_cosine(x):
    if x.dtype == tl.float64:
        return tl.sin(x), tl.cos(x)
    else:
        r, quarter = _reduced(x)
        if tl.max(tl.abs(x)) > MOST_RADIANS:
            far = tl.abs(x) > MOST_RADIANS
            far_r, far_quarter = _reduced_exactly(x)
            r, quarter = tl.where(far, far_r, r), tl.where(far, far_quarter, quarter)
        q = r * r
        s = r * (1 - q * (1 / 6 - q * (1 / 120 - q * (1 / 5040 - q * (1 / 362880)))))
        c = 1 - q * (1 / 2 - q * (1 / 24 - q * (1 / 720 - q * (1 / 40320 - q * (1 / 3628800)))))
        odd = (quarter & 1) != 0
        sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
        return tl.where(quarter >= 2, -sine, sine), tl.where((quarter == 1) | (quarter == 2), -cosine, cosine)


@triton.jit
def _rooted_profile(q, KIND: tl.constexpr):
    centre = q == 0
    root = tl.sqrt(q)
    root_slope = tl.where(centre, 0.0, 0.5 / tl.where(centre, 1.0, root))
    if KIND == IVD:
        f = 1 / (root + 1e-10)
        return f, -f * f * root_slope
    elif KIND == IVC:
        f = 1 / (q * root + 1e-30)
        return f, -1.5 * f * (f * root)
    elif KIND == MARKOV:
        f = tl.exp(-root)
        return f, -f * root_slope
    elif KIND == EXPSIN:
        sine, cosine = sine_and_cosine(root)
        f = tl.exp(-sine)
        return f, -f * cosine * root_slope
    elif KIND == PHS1:
        return root, root_slope
    else:
        return q * root, 1.5 * root


@triton.jit
def _profile(q, KIND: tl.constexpr):
    """phi(q) and phi'(q), which is 0 where a root is singular."""
    if KIND == IVQ:
        f = 1 / (1 + q)
        return f, -f * f
    elif KIND == IVMQ:
        f = 1 / tl.sqrt(1 + q)
        return f, -0.5 * f * f * f
    elif KIND == GAUSS:
        f = tl.exp(-0.5 * q)
        return f, -0.5 * f
    elif KIND == SGAUSS2:
        f = tl.exp(-0.25 * q * q)
        return f, -0.5 * q * f
    elif KIND == NSGAUSS2:
        f = tl.exp(-q)
        return f, -f
    elif KIND == QD:
        return 1 + q, tl.full(q.shape, 1, q.dtype)
    elif KIND == MQD:
        f = tl.sqrt(1 + q)
        return f, 0.5 / f
    elif KIND == VEP:
        return 1 - q, tl.full(q.shape, -1, q.dtype)
    else:
        return _rooted_profile(q, KIND)


@triton.jit
def _hat(t):
    """max(0, 1 - |t|) and its derivative, 0 where the hat peaks and ends."""
    height = 1 - tl.abs(t)
    ends = height <= 0
    slope = tl.where(ends | (t == 0), 0.0, tl.where(t < 0, 1.0, tl.full(t.shape, -1, t.dtype)))
    return tl.where(ends, 0.0, height), slope


# ---- a kernel at a point ---------------------------------------------------------------------------------------------


@triton.jit
def _inner(a, b, D: tl.constexpr):
    total = a[0] * b[0]
    for d in tl.static_range(1, D):
        total += a[d] * b[d]
    return total


@triton.jit
def _length(v, D: tl.constexpr):
    """max(|v|, LEAST_LENGTH) and what the derivative of its logarithm is per v."""
    square = _inner(v, v, D)
    root = tl.sqrt(square)
    short = root < LEAST_LENGTH
    short = short | (square == 0)
    return tl.where(short, LEAST_LENGTH, root), tl.where(short, 0.0, 1 / tl.where(short, 1.0, square))


@triton.jit
def evaluate(x, center, shape, PLAN: tl.constexpr):
    """phi; phi'(q) of the kinds that have it; o = x - center and t = S o."""
    D: tl.constexpr = PLAN.dims
    o, t = (), ()
    for d in tl.static_range(D):
        o = o + (x[d] - center[d],)
    if PLAN.kind == COS:
        phi = _inner(x, center, D) / (_length(x, D)[0] * _length(center, D)[0])
        return phi, phi, o, o
    else:
        for i in tl.static_range(D):
            scaled = tl.zeros_like(o[0])
            for j in tl.static_range(D):
                if not PLAN.reads_shape:
                    if i == j:
                        scaled = o[j]
                elif PLAN.places[i * D + j] >= 0:
                    scaled += shape[PLAN.places[i * D + j]] * o[j]
            t = t + (scaled,)
        if PLAN.kind == NLIN:
            phi = _hat(t[0])[0]
            for d in tl.static_range(1, D):
                phi *= _hat(t[d])[0]
            return phi, phi, o, t
        else:
            phi, slope = _profile(_inner(t if PLAN.projected else o, t, D), PLAN.kind)
            return phi, slope, o, t


@triton.jit
def pull_back(g, x, center, shape, found, PLAN: tl.constexpr):
    """Gradients of g phi in x, center and shape; found: what evaluate gave."""
    if PLAN.kind == COS:
        return _pull_back_cosine(g, x, center, found[0], PLAN)
    else:
        return _pull_back_offset(g, shape, found, PLAN)


@triton.jit
def _pull_back_cosine(g, x, center, phi, PLAN: tl.constexpr):
    D: tl.constexpr = PLAN.dims
    of_x, of_center = (), ()
    x_length, x_slope = _length(x, D)
    center_length, center_slope = _length(center, D)
    scale = 1 / (x_length * center_length)
    for d in tl.static_range(D):
        of_x = of_x + (g * (center[d] * scale - phi * x_slope * x[d]),)
        of_center = of_center + (g * (x[d] * scale - phi * center_slope * center[d]),)
    return of_x, of_center, ()


@triton.jit
def _pull_back_offset(g, shape, found, PLAN: tl.constexpr):
    D: tl.constexpr = PLAN.dims
    WIDTH: tl.constexpr = PLAN.width
    _phi, slope, o, t = found
    of_t, of_x, of_center, of_shape = (), (), (), ()
    for i in tl.static_range(D):
        if PLAN.kind == NLIN:
            part = g
            for j in tl.static_range(D):
                value, change = _hat(t[j])
                part *= change if i == j else value
        elif PLAN.projected:
            part = 2 * g * slope * t[i]
        else:
            part = g * slope * o[i]
        of_t = of_t + (part,)
    for j in tl.static_range(D):
        of_o = tl.zeros_like(g) if (PLAN.kind == NLIN or PLAN.projected) else g * slope * t[j]
        for i in tl.static_range(D):
            if not PLAN.reads_shape:
                if i == j:
                    of_o += of_t[i]
            elif PLAN.places[i * D + j] >= 0:
                of_o += shape[PLAN.places[i * D + j]] * of_t[i]
        of_x, of_center = of_x + (of_o,), of_center + (-of_o,)
    for k in tl.static_range(WIDTH):
        total = tl.zeros_like(g)
        for place in tl.static_range(D * D):
            if PLAN.places[place] == k:
                total += of_t[place // D] * o[place % D]
        of_shape = of_shape + (total,)
    return of_x, of_center, of_shape


# ---- the waves of a weight -------------------------------------------------------------------------------------------


@triton.jit
def waves(u, f, frequencies_ptr, phase_ptr, PLAN: tl.constexpr):
    """psi of weights u [points, kernels] for features f: [points, kernels, features or 1]; its derivatives in u and in
    the phase."""
    u = tl.expand_dims(u, 2)
    if frequencies_ptr is None:
        return u, 1.0, 0.0
    else:
        waving = (f >= PLAN.keep) & (f < PLAN.features)
        rate = tl.load(frequencies_ptr + (f - PLAN.keep), mask=waving, other=0.0)[None, None, :]
        angle = u * rate
        if phase_ptr is not None:
            angle += tl.load(phase_ptr + (f - PLAN.keep), mask=waving, other=0.0)[None, None, :]
        sine, cosine = sine_and_cosine(angle)
        kept = (f < PLAN.keep)[None, None, :]
        return tl.where(kept, u, sine), tl.where(kept, 1.0, rate * cosine), tl.where(kept, 0.0, cosine)
