# SPDX-License-Identifier: MIT
"""The hash grid in Triton: value, Jacobian, gradient of the coordinates and of the table.

Definition and special points as in `camkernels.reference.hash_grid`, whose float64 step for the position is a fused
multiply-add here. A program computes BLOCK points: for value, Jacobian and table at one level, in a level-major grid so
that the table of a level stays in the cache; for the coordinates at all levels in turn, since their gradient sums over
levels in a fixed order. Points [BLOCK] run along threads, features [BLOCK, TILE] within one, so that a row is one load.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.hash_grid import LIMITS, PRIMES

# One point per thread, four warps. Chosen from machine code (nothing spills on sm_80 and sm_90, which
# tests/test_triton_compiled.py checks), not from measurements: none of this has run on a GPU yet.
BLOCK = 128
# Said aloud, a limit of registers keeps the assembler from spilling some for a higher occupancy. With 168, three blocks
# fit on a multiprocessor; float64 may take all that a thread can have. By dtype of the coordinates.
OPTIONS = {torch.float32: {"num_warps": 4, "maxnreg": 168}, torch.float64: {"num_warps": 4, "maxnreg": 255}}
# Features that a thread loads, or adds, at once. More are tiles of neighbouring programs: wider rows would be spread
# over threads, and every corner's index would go through shared memory, behind a barrier.
TILE_BYTES = 16
UNROLLED_CORNERS = 8  # up to so many are written out, so that their loads are under way together

LINEAR, SMOOTHSTEP, NEAREST = (tl.constexpr(i) for i in range(3))  # as hash_grid.INTERPOLATIONS
CLAMP, ZERO, WRAP = (tl.constexpr(i) for i in range(3))  # as hash_grid.OUTSIDE
CELL_MIN, CELL_MAX, FAR = (tl.constexpr(float(limit)) for limit in LIMITS)
# Columns of a level's row in the layout, behind D factors.
SIZE, INVERSE, OFFSET, HASHED, COLUMNS = (tl.constexpr(i) for i in range(5))

# ---- formulas --------------------------------------------------------------------------------------------------------


@triton.jit
def _settle(x_ptr, r, valid, D: tl.constexpr, OUTSIDE: tl.constexpr):
    """Coordinates [D] to look up, which of them pass a derivative on [D], whether the point's value counts."""
    given, settled, inside = (), (), ()
    broken = r < 0
    seen = valid
    for d in tl.static_range(D):
        x = tl.load(x_ptr + r * D + d, mask=valid, other=0.0)
        given = given + (x,)
        broken = broken | (x != x)
    for d in tl.static_range(D):
        x = given[d]
        within = (broken | (x >= 0)) & (broken | (x <= 1))
        if OUTSIDE == CLAMP:
            x = tl.where(x < 0, 0.0, tl.where(x > 1, 1.0, x))
        elif OUTSIDE == WRAP:
            x = tl.where(tl.abs(x) <= FAR, x, float("nan"))
        if OUTSIDE == ZERO:
            seen = seen & within
        settled = settled + (x,)
        inside = inside + ((within if OUTSIDE == CLAMP else r >= 0),)
    return settled, inside, seen


@triton.jit
def _cell(xs, scales_ptr, row, D: tl.constexpr, SHIFT: tl.constexpr, CEIL: tl.constexpr, KIND: tl.constexpr, level):
    """At one level, per axis and for its lower and upper corner: terms of the index; weights; their derivatives in x.
    And whether all positions are finite."""
    low_terms, high_terms, low_weights, high_weights, falls, rises = (), (), (), (), (), ()
    finite = xs[0] == xs[0]
    for d in tl.static_range(D):
        scale = tl.load(scales_ptr + level * D + d).to(xs[d].dtype)
        pos = tl.fma(xs[d], tl.broadcast_to(scale, xs[d].shape), tl.full(xs[d].shape, SHIFT, xs[d].dtype))
        p = tl.floor(pos)
        f = pos - p
        sane = f == f
        finite = finite & sane
        f = tl.where(sane, f, 0.0)  # weights of a row that is not read must not spoil the 0 in its place
        cell = tl.minimum(tl.maximum(tl.where(sane, p, 0.0), CELL_MIN), CELL_MAX).to(tl.int32).to(tl.uint32)
        factor = tl.load(row + d).to(tl.uint32)
        low = cell * factor
        low_terms = low_terms + (low,)
        high_terms = high_terms + (low + (tl.where(f > 0, factor, 0) if CEIL else factor),)
        if KIND == SMOOTHSTEP:
            blend = f * f * (3 - 2 * f)
            rise = scale * (6 * f * (1 - f))
        elif KIND == NEAREST:  # of which only the lower corner is read
            blend = tl.zeros_like(f)
            rise = tl.zeros_like(f)
        else:
            blend = f
            rise = tl.broadcast_to(scale, f.shape)
        low_weights, high_weights = low_weights + (1 - blend,), high_weights + (blend,)
        falls, rises = falls + (-rise,), rises + (rise,)
    return (low_terms, high_terms), (low_weights, high_weights), (falls, rises), finite


@triton.jit
def _extent(row, D: tl.constexpr):
    """Size, rounded-down 2^32 / size, offset and hashed of a level. Read ahead of the corners: the compiler would read
    them again after every atomic addition."""
    size, inverse = tl.load(row + D + SIZE).to(tl.uint32), tl.load(row + D + INVERSE).to(tl.uint32)
    return size, inverse, tl.load(row + D + OFFSET), tl.load(row + D + HASHED) != 0


@triton.jit
def _side(c, d: tl.constexpr, sides):
    """What belongs to axis d on the side that corner c chooses with its bit d."""
    return tl.where(((c >> d) & 1) == 1, sides[1][d], sides[0][d])


@triton.jit
def _entry(c, terms, extent, D: tl.constexpr):
    """Table row of corner c."""
    size, inverse, offset, hashed = extent
    index = _side(c, 0, terms)
    for d in tl.static_range(1, D):
        term = _side(c, d, terms)
        index = tl.where(hashed, index ^ term, index + term)
    # index % size: the quotient by the rounded-down inverse is at most one too small
    rest = index - tl.umulhi(index, tl.broadcast_to(inverse, index.shape)) * size
    rest = tl.where(rest >= size, rest - size, rest)
    return offset + rest.to(tl.int64)


@triton.jit
def _weight(c, weights, D: tl.constexpr):
    """Weight of corner c."""
    product = _side(c, 0, weights)
    for d in tl.static_range(1, D):
        product = product * _side(c, d, weights)
    return product


@triton.jit
def _slopes(c, weights, slopes, D: tl.constexpr):
    """Derivatives of the weight of corner c along the axes [D]: products of all factors but one, times that one's."""
    factors, after, found = (), (), ()
    for d in tl.static_range(D):
        factors = factors + (_side(c, d, weights),)
    suffix = tl.full(factors[0].shape, 1.0, factors[0].dtype)
    for d in tl.static_range(D):
        after = after + (suffix,)
        suffix = suffix * factors[D - 1 - d]
    prefix = tl.full(factors[0].shape, 1.0, factors[0].dtype)
    for d in tl.static_range(D):
        found = found + (prefix * after[D - 1 - d] * _side(c, d, slopes),)
        prefix = prefix * factors[d]
    return found


@triton.jit
def _levels_of(counts_ptr, r, valid, level):
    """Which points are computed at a level."""
    if counts_ptr is None:
        return valid
    else:
        return valid & (level < tl.load(counts_ptr + r, mask=valid, other=0))


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "n_levels"])
def rows_kernel(
    x_ptr, counts_ptr, scales_ptr, layout_ptr, n, n_levels, table_ptr, y_ptr, j_ptr,
    D: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr, CEIL: tl.constexpr,
    OUTSIDE: tl.constexpr, KIND: tl.constexpr, CORNERS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [n, L*F] and, where j_ptr is given, its derivative [n, L*F, D]; at level program_id(1)."""
    level = tl.program_id(1)
    TILES: tl.constexpr = (F + TILE - 1) // TILE
    r = (tl.program_id(0) // TILES).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    row = layout_ptr + level * (D + COLUMNS)
    xs, inside, seen = _settle(x_ptr, r, r < n, D, OUTSIDE)
    keep = _levels_of(counts_ptr, r, seen, level)
    extent = _extent(row, D)
    terms, weights, axis_slopes, finite = _cell(xs, scales_ptr, row, D, SHIFT, CEIL, KIND, level)
    reads = (keep & finite)[:, None] & (f < F)[None, :]

    y = tl.zeros([BLOCK, TILE], xs[0].dtype)
    j = ()
    for _ in tl.static_range(D if j_ptr is not None else 0):
        j = j + (y,)
    for c in tl.range(0, CORNERS, loop_unroll_factor=UNROLL):
        entry = _entry(c, terms, extent, D)
        theta = tl.load(table_ptr + entry[:, None] * F + f[None, :], mask=reads, other=0.0).to(y.dtype)
        y += _weight(c, weights, D)[:, None] * theta
        if j_ptr is not None:
            slopes = _slopes(c, weights, axis_slopes, D)
            added = ()
            for a in tl.static_range(D):
                added = added + (j[a] + slopes[a][:, None] * theta,)
            j = added

    broken = (keep & ~finite)[:, None]
    at = r[:, None] * (n_levels * F) + level * F + f[None, :]
    stored = (r < n)[:, None] & (f < F)[None, :]
    tl.store(y_ptr + at, tl.where(broken, float("nan"), y).to(y_ptr.dtype.element_ty), mask=stored)
    for a in tl.static_range(D if j_ptr is not None else 0):
        slope = tl.where(inside[a][:, None], tl.where(broken, float("nan"), j[a]), 0.0)
        tl.store(j_ptr + at * D + a, slope, mask=stored)


@triton.jit(do_not_specialize=["n", "n_levels"])
def table_kernel(
    x_ptr, counts_ptr, scales_ptr, layout_ptr, n, n_levels, grad_ptr, sums_ptr,
    D: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr, CEIL: tl.constexpr,
    OUTSIDE: tl.constexpr, KIND: tl.constexpr, CORNERS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [entries, F] += weight * grad [n, L*F], at level program_id(1)."""
    level = tl.program_id(1)
    TILES: tl.constexpr = (F + TILE - 1) // TILE
    r = (tl.program_id(0) // TILES).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = (tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE)
    row = layout_ptr + level * (D + COLUMNS)
    xs, _inside, seen = _settle(x_ptr, r, r < n, D, OUTSIDE)
    keep = _levels_of(counts_ptr, r, seen, level)
    extent = _extent(row, D)
    terms, weights, _axis_slopes, finite = _cell(xs, scales_ptr, row, D, SHIFT, CEIL, KIND, level)
    adds = (keep & finite)[:, None] & (f < F)[None, :]
    grad = tl.load(grad_ptr + r[:, None] * (n_levels * F) + level * F + f[None, :], mask=adds, other=0.0)
    grad = grad.to(xs[0].dtype)
    for c in tl.range(0, CORNERS, loop_unroll_factor=UNROLL):
        entry = _entry(c, terms, extent, D)
        part = (_weight(c, weights, D)[:, None] * grad).to(sums_ptr.dtype.element_ty)
        tl.atomic_add(sums_ptr + entry[:, None] * F + f[None, :], part, mask=adds, sem="relaxed")


@triton.jit(do_not_specialize=["n", "n_levels", "active_levels", "n_features"])
def coordinates_kernel(
    x_ptr, counts_ptr, scales_ptr, layout_ptr, n, n_levels, table_ptr, grad_ptr, gx_ptr, active_levels, n_features,
    D: tl.constexpr, F: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr, CEIL: tl.constexpr,
    OUTSIDE: tl.constexpr, KIND: tl.constexpr, CORNERS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gx [n, D]: gradient of <grad, y> in x."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    xs, inside, seen = _settle(x_ptr, r, r < n, D, OUTSIDE)
    broken = r < 0
    gx = ()
    for _ in tl.static_range(D):
        gx = gx + (tl.zeros([BLOCK], xs[0].dtype),)
    for level in range(active_levels):
        row = layout_ptr + level * (D + COLUMNS)
        keep = _levels_of(counts_ptr, r, seen, level)
        extent = _extent(row, D)
        terms, weights, axis_slopes, finite = _cell(xs, scales_ptr, row, D, SHIFT, CEIL, KIND, level)
        broken = broken | (keep & ~finite)
        at = r[:, None] * (n_levels * F) + level * F
        for c in tl.range(0, CORNERS, loop_unroll_factor=UNROLL):
            entry = _entry(c, terms, extent, D)[:, None] * F
            along = tl.zeros_like(xs[0])
            # Over tiles. The compiler must not know how many: it would write out those of all corners.
            for first in range(0, F if F <= TILE else n_features, TILE):
                f = (first + tl.arange(0, TILE))[None, :]
                reads = (keep & finite)[:, None] & (f < F)
                grad = tl.load(grad_ptr + at + f, mask=reads, other=0.0).to(along.dtype)
                along += tl.sum(tl.load(table_ptr + entry + f, mask=reads, other=0.0).to(along.dtype) * grad, 1)
            slopes = _slopes(c, weights, axis_slopes, D)
            added = ()
            for a in tl.static_range(D):
                added = added + (gx[a] + slopes[a] * along,)
            gx = added
    for a in tl.static_range(D):
        total = tl.where(inside[a], tl.where(broken, float("nan"), gx[a]), 0.0)
        tl.store(gx_ptr + r * D + a, total, mask=r < n)


# ---- launching -------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """The settings of the operators, see camkernels/hash_grid.py."""

    scales: Sequence[float]
    shift: float
    layout: Sequence[int]
    ceil_corner: bool
    outside: int
    interpolation: int
    active_levels: int
    deterministic: bool

    def n_levels(self, dims: int) -> int:
        return len(self.scales) // dims


@cache
def _levels_on(
    device: torch.device, dims: int, scales: tuple[float, ...], layout: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Scales [L, D] float32 and rows [L, D + COLUMNS] int64 of a geometry, kept on the device, a kilobyte or two.

    For good: kernels on other streams, and CUDA graphs that are replayed later, read them where they are.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "hash_grid: backend 'triton' copies a geometry to the GPU when it first sees it, which a CUDA graph cannot "
            "capture; make one call before the capture, as torch.cuda.graph asks for anyway"
        )
    rows = []
    for at in range(0, len(layout), dims + 3):
        strides, (size, offset, hashed) = layout[at : at + dims], layout[at + dims : at + dims + 3]
        if size >= 1 << 32:
            raise RuntimeError(
                f"hash_grid: backend 'triton' computes levels of less than 2^32 rows, got {size}; "
                "use backend='reference'"
            )
        factors = PRIMES[:dims] if hashed else strides
        rows.append([*factors, size, min((1 << 32) // size, (1 << 32) - 1), offset, hashed])
    scale = torch.tensor(scales, dtype=torch.float32, device=device)
    return scale, torch.tensor(rows, dtype=torch.int64, device=device)


def constants(settings: Settings, dims: int, features: int, itemsize: int) -> dict[str, Any]:
    """What a kernel is compiled for; itemsize: bytes of a number in the table or in the sums."""
    corners = 1 if settings.interpolation == NEAREST.value else 1 << dims
    return {
        "D": dims,
        "F": features,
        "TILE": min(triton.next_power_of_2(features), TILE_BYTES // itemsize),
        "SHIFT": settings.shift,
        "CEIL": settings.ceil_corner,
        "OUTSIDE": settings.outside,
        "KIND": settings.interpolation,
        "CORNERS": corners,
        "UNROLL": corners if corners <= UNROLLED_CORNERS else 1,
        "BLOCK": BLOCK,
    }


def _launch(
    kernel: Any, settings: Settings, x: Tensor, counts: Tensor | None, rows: Tensor, *, by_level: bool, **arguments: Any
) -> None:
    """Runs a kernel over the points x [n, D]. rows: the table, or sums like it; arguments: what some kernels have."""
    n, dims = x.shape
    if n == 0 or settings.active_levels == 0:
        return
    compiled_for = constants(settings, dims, rows.shape[1], rows.element_size())
    blocks, tiles = triton.cdiv(n, BLOCK), triton.cdiv(rows.shape[1], compiled_for["TILE"])
    scales, layout = _levels_on(x.device, dims, tuple(settings.scales), tuple(settings.layout))
    geometry = {"n": n, "n_levels": settings.n_levels(dims), "scales_ptr": scales, "layout_ptr": layout}
    if not by_level:
        geometry |= {"active_levels": settings.active_levels, "n_features": rows.shape[1]}
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[(blocks * tiles, settings.active_levels) if by_level else (blocks,)](
            x_ptr=x, counts_ptr=counts, **geometry, **arguments, **compiled_for, **OPTIONS[x.dtype]
        )


def _rows(
    settings: Settings, x: Tensor, table: Tensor, counts: Tensor | None, with_jacobian: bool
) -> tuple[Tensor, ...]:
    n_levels = settings.n_levels(x.shape[1])
    width = n_levels * table.shape[1]
    make = torch.empty if settings.active_levels == n_levels else torch.zeros  # levels that are not computed are 0
    y = make(len(x), width, dtype=table.dtype, device=x.device)
    j = make(len(x), width, x.shape[1], dtype=x.dtype, device=x.device) if with_jacobian else None
    _launch(rows_kernel, settings, x, counts, table, by_level=True, table_ptr=table, y_ptr=y, j_ptr=j)
    return (y,) if j is None else (y, j)


def value(x: Tensor, table: Tensor, counts: Tensor | None, *settings: Any) -> Tensor:
    """The operator triton_hash_grid."""
    return _rows(Settings(*settings), x, table, counts, False)[0]


def jacobian(x: Tensor, table: Tensor, counts: Tensor | None, *settings: Any) -> tuple[Tensor, ...]:
    """The operator triton_hash_grid_jacobian."""
    return _rows(Settings(*settings), x, table, counts, True)


def backward(
    grad: Tensor, x: Tensor, table: Tensor, counts: Tensor | None, *settings_and_mask: Any
) -> tuple[Tensor, Tensor]:
    """The operator triton_hash_grid_backward: gradients of <grad, y> in x and table."""
    *given, (wants_x, wants_table) = settings_and_mask
    settings = Settings(*given)
    gx, gtable = x.new_empty(0), table.new_empty(0)
    if wants_table:
        if settings.deterministic:
            refuse_determinism("hash_grid_backward")
        wide = torch.float64 if table.dtype == torch.float64 else torch.float32
        sums = torch.zeros_like(table, dtype=wide, memory_format=torch.contiguous_format)
        _launch(table_kernel, settings, x, counts, sums, by_level=True, grad_ptr=grad, sums_ptr=sums)
        gtable = sums.to(table.dtype)
    if wants_x:
        gx = torch.zeros_like(x) if settings.active_levels == 0 else torch.empty_like(x)
        more = {"table_ptr": table, "grad_ptr": grad, "gx_ptr": gx}
        _launch(coordinates_kernel, settings, x, counts, table, by_level=False, **more)
    return gx, gtable


def refuse_determinism(operator: str) -> None:
    message = (
        f"{operator} of backend 'triton' does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. Use backend='cuda' or backend='reference', which have one, or "
        "turn off determinism just for this operation."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
