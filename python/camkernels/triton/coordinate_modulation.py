# SPDX-License-Identifier: MIT
"""coordinate_modulation in Triton: value, gradient of the coordinates and of the grids.

Definition and special points as in `camkernels.reference.coordinate_modulation`. Grids are packed first, all numbers of
a node side by side and zeros up to whole tiles, so that a node's row is read in words: rows [planes, nodes, pitch]. A
program computes BLOCK points: for the value and the grids TILE numbers of each, for the coordinates all numbers in
turn. Points run along threads, numbers within one, as in hash_grid.py.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .hash_grid import BLOCK, FAR, OPTIONS, TILE_BYTES, UNROLLED_CORNERS, _side, _slopes, _weight, refuse_determinism

ABSENT = tl.constexpr(-(1 << 40))  # term of a node that does not exist: it makes any index negative

# ---- formulas --------------------------------------------------------------------------------------------------------


@triton.jit
def _coordinate(u_ptr, r, valid, p: tl.constexpr, d: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr):
    """Coordinate of axis d in lookup p; planes are xy, xz, yz."""
    SLOT: tl.constexpr = d if P == 1 else (p // 2 if d == 0 else (1 if p == 0 else 2))
    return tl.load(u_ptr + r * SLOTS + SLOT, mask=valid, other=0.0)


@triton.jit
def _broken(u_ptr, r, valid, SLOTS: tl.constexpr):
    """Points with a coordinate that is NaN."""
    broken = r < 0
    for s in tl.static_range(SLOTS):
        u = tl.load(u_ptr + r * SLOTS + s, mask=valid, other=0.0)
        broken = broken | (u != u)
    return broken


@triton.jit
def _axis(u, N: tl.constexpr, STRIDE: tl.constexpr, ZEROS: tl.constexpr, ALIGN: tl.constexpr):
    """On an axis of N nodes: terms of the index of the lower and the upper node, the weight of the upper, its
    derivative in u, and which points are seen."""
    SCALE: tl.constexpr = (N - 1) / 2 if ALIGN else N / 2
    SHIFT: tl.constexpr = 0.0 if ALIGN else -0.5
    u = tl.where(u > FAR, FAR, tl.where(u < -FAR, -FAR, u))  # infinity times a scale of 0 would be NaN
    pos = tl.fma(u + 1, tl.full(u.shape, SCALE, u.dtype), tl.full(u.shape, SHIFT, u.dtype))
    slope = tl.full(u.shape, SCALE, u.dtype)
    if ZEROS:
        seen = (pos >= -1) & (pos < N)
        pos = tl.where(seen, pos, 0.0)
    else:
        inside = (pos > 0) & (pos < N - 1)
        seen = u == u
        pos = tl.where(inside, pos, tl.where(pos > 0, N - 1.0, 0.0))
        slope = tl.where(inside, slope, 0.0)
    low = tl.floor(pos)
    node = low.to(tl.int64)
    lower = tl.where(node >= 0, node * STRIDE, ABSENT)
    upper = tl.where(node + 1 < N, (node + 1) * STRIDE, ABSENT)
    return lower, upper, pos - low, slope, seen


@triton.jit
def _nodes(
    u_ptr, r, valid, D: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr, NODES: tl.constexpr, STRIDES: tl.constexpr,
    ZEROS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Around the points in every lookup, per axis and for its lower and upper node: terms of the index; weights; their
    derivatives in u. And which points are seen."""
    found = ()
    for p in tl.static_range(P):
        low_terms, high_terms, low_weights, high_weights, falls, rises = (), (), (), (), (), ()
        seen = valid
        for d in tl.static_range(D):
            u = _coordinate(u_ptr, r, valid, p, d, P, SLOTS)
            lower, upper, t, slope, within = _axis(u, NODES[d], STRIDES[d], ZEROS, ALIGN)
            seen = seen & within
            low_terms, high_terms = low_terms + (lower,), high_terms + (upper,)
            low_weights, high_weights = low_weights + (1 - t,), high_weights + (t,)
            falls, rises = falls + (-slope,), rises + (slope,)
        found = found + (((low_terms, high_terms), (low_weights, high_weights), (falls, rises), seen),)
    return found


@triton.jit
def _index(c, terms, D: tl.constexpr):
    """Of the node at corner c; negative where there is none."""
    index = _side(c, 0, terms)
    for d in tl.static_range(1, D):
        index = index + _side(c, d, terms)
    return index


@triton.jit
def _row(rows_ptr, c, nodes, f, p: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PITCH: tl.constexpr):
    """Where numbers f of the node at corner c lie in the rows of lookup p, and whether it is there."""
    index = _index(c, nodes[0], D)
    return rows_ptr + (p * ROWS + index)[:, None] * PITCH + f, (nodes[3] & (index >= 0))[:, None]


@triton.jit
def _values(
    rows_ptr, nodes, f, like, D: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, PITCH: tl.constexpr,
    CORNERS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Numbers f of every lookup, in the form of `like` [BLOCK, TILE]."""
    ys = ()
    for p in tl.static_range(P):
        y = tl.zeros_like(like)
        for c in tl.range(0, CORNERS, loop_unroll_factor=UNROLL):
            row, there = _row(rows_ptr, c, nodes[p], f, p, D, ROWS, PITCH)
            y += _weight(c, nodes[p][1], D)[:, None] * tl.load(row, mask=there, other=0.0).to(y.dtype)
        ys = ys + (y,)
    return ys


@triton.jit
def _without(ys, p: tl.constexpr):
    """The derivative of the product of three lookups in lookup p."""
    return ys[(p + 1) % 3] * ys[(p + 2) % 3]


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def value_kernel(
    u_ptr, rows_ptr, n, y_ptr,
    D: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr, NODES: tl.constexpr, STRIDES: tl.constexpr,
    ROWS: tl.constexpr, ZEROS: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr, PITCH: tl.constexpr,
    TILE: tl.constexpr, CORNERS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y [n, WIDTH]"""
    TILES: tl.constexpr = PITCH // TILE
    r = (tl.program_id(0) // TILES).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = ((tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE))[None, :]
    broken = _broken(u_ptr, r, r < n, SLOTS)
    nodes = _nodes(u_ptr, r, (r < n) & ~broken, D, P, SLOTS, NODES, STRIDES, ZEROS, ALIGN)
    like = tl.zeros([BLOCK, TILE], u_ptr.dtype.element_ty)
    ys = _values(rows_ptr, nodes, f, like, D, P, ROWS, PITCH, CORNERS, UNROLL)
    y = ys[0]
    for p in tl.static_range(1, P):
        y = y * ys[p]
    y = tl.where(broken[:, None], float("nan"), y)
    tl.store(y_ptr + r[:, None] * WIDTH + f, y.to(y_ptr.dtype.element_ty), mask=(r < n)[:, None] & (f < WIDTH))


@triton.jit(do_not_specialize=["n"])
def grids_kernel(
    u_ptr, rows_ptr, n, grad_ptr, sums_ptr,
    D: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr, NODES: tl.constexpr, STRIDES: tl.constexpr,
    ROWS: tl.constexpr, ZEROS: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr, PITCH: tl.constexpr,
    TILE: tl.constexpr, CORNERS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [P, ROWS, PITCH] += gradient of <grad, y>; rows are read where P is 3."""
    TILES: tl.constexpr = PITCH // TILE
    r = (tl.program_id(0) // TILES).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = ((tl.program_id(0) % TILES) * TILE + tl.arange(0, TILE))[None, :]
    valid = (r < n) & ~_broken(u_ptr, r, r < n, SLOTS)
    nodes = _nodes(u_ptr, r, valid, D, P, SLOTS, NODES, STRIDES, ZEROS, ALIGN)
    like = tl.zeros([BLOCK, TILE], u_ptr.dtype.element_ty)
    grad = tl.load(grad_ptr + r[:, None] * WIDTH + f, mask=valid[:, None] & (f < WIDTH), other=0.0).to(like.dtype)
    ys = ()
    if P > 1:
        ys = _values(rows_ptr, nodes, f, like, D, P, ROWS, PITCH, CORNERS, UNROLL)
    for p in tl.static_range(P):
        part = grad if P == 1 else grad * _without(ys, p)
        for c in tl.range(0, CORNERS, loop_unroll_factor=UNROLL):
            row, there = _row(sums_ptr, c, nodes[p], f, p, D, ROWS, PITCH)
            tl.atomic_add(row, _weight(c, nodes[p][1], D)[:, None] * part, mask=there, sem="relaxed")


@triton.jit
def _along_axes(
    rows_ptr, nodes, f, part, p: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PITCH: tl.constexpr,
    CORNERS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Along the axes [D] of lookup p, the gradient of <part, numbers f>."""
    found = ()
    for _ in tl.static_range(D):
        found = found + (tl.zeros([part.shape[0]], part.dtype),)
    for c in tl.range(0, CORNERS, loop_unroll_factor=UNROLL):
        row, there = _row(rows_ptr, c, nodes, f, p, D, ROWS, PITCH)
        along = tl.sum(tl.load(row, mask=there, other=0.0).to(part.dtype) * part, 1)
        slopes = _slopes(c, nodes[1], nodes[2], D)
        added = ()
        for a in tl.static_range(D):
            added = added + (found[a] + slopes[a] * along,)
        found = added
    return found


@triton.jit
def _by_slot(found, P: tl.constexpr):
    """Gradients along the axes of every lookup, as those of the coordinates: planes xy, xz, yz share theirs."""
    if P == 1:
        return found[0]
    else:
        return (found[0][0] + found[1][0], found[0][1] + found[2][0], found[1][1] + found[2][1])


@triton.jit(do_not_specialize=["n", "pitch"])
def coordinates_kernel(
    u_ptr, rows_ptr, n, grad_ptr, gu_ptr, pitch,
    D: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr, NODES: tl.constexpr, STRIDES: tl.constexpr,
    ROWS: tl.constexpr, ZEROS: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr, PITCH: tl.constexpr,
    TILE: tl.constexpr, CORNERS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """gu [n, SLOTS]: gradient of <grad, y> in the coordinates."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    broken = _broken(u_ptr, r, r < n, SLOTS)
    valid = (r < n) & ~broken
    nodes = _nodes(u_ptr, r, valid, D, P, SLOTS, NODES, STRIDES, ZEROS, ALIGN)
    like = tl.zeros([BLOCK, TILE], u_ptr.dtype.element_ty)
    gu = ()
    for _ in tl.static_range(SLOTS):
        gu = gu + (tl.zeros([BLOCK], like.dtype),)
    # Over tiles. The compiler must not know how many: it would write all of them out.
    for first in range(0, PITCH if PITCH == TILE else pitch, TILE):
        f = (first + tl.arange(0, TILE))[None, :]
        grad = tl.load(grad_ptr + r[:, None] * WIDTH + f, mask=valid[:, None] & (f < WIDTH), other=0.0).to(like.dtype)
        ys = ()
        if P > 1:
            ys = _values(rows_ptr, nodes, f, like, D, P, ROWS, PITCH, CORNERS, UNROLL)
        found = ()
        for p in tl.static_range(P):
            part = grad if P == 1 else grad * _without(ys, p)
            found = found + (_along_axes(rows_ptr, nodes[p], f, part, p, D, ROWS, PITCH, CORNERS, UNROLL),)
        more = _by_slot(found, P)
        added = ()
        for s in tl.static_range(SLOTS):
            added = added + (gu[s] + more[s],)
        gu = added
    for s in tl.static_range(SLOTS):
        tl.store(gu_ptr + r * SLOTS + s, tl.where(broken, float("nan"), gu[s]), mask=r < n)


# ---- launching -------------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """The settings of the operators, see camkernels/coordinate_modulation.py."""

    zeros: bool
    align_corners: bool
    planes: bool
    deterministic: bool


class Shape(NamedTuple):
    """Of grids [layers, 2, (3,) (channels,) *nodes]."""

    runs: int  # layers * 2
    planes: int
    channels: tuple[int, ...]  # none or one number
    nodes: tuple[int, ...]  # of the axis of each coordinate

    @classmethod
    def of(cls, grids: Tensor, dims: int, planes: bool) -> Shape:
        axes, lookups = (2, 3) if planes else (dims, 1)
        nodes = grids.shape[grids.ndim - axes :]
        channels = grids.shape[3 if planes else 2 : grids.ndim - axes]
        return cls(grids.shape[0] * 2, lookups, tuple(channels), tuple(nodes)[::-1])

    @property
    def width(self) -> int:
        """Numbers of a node."""
        return self.runs * math.prod(self.channels)

    @property
    def rows(self) -> int:
        return math.prod(self.nodes)

    def tile(self, dtype: torch.dtype) -> int:
        """Numbers that a thread computes at once in this dtype."""
        return min(triton.next_power_of_2(self.width), TILE_BYTES // dtype.itemsize)

    def pitch(self, dtype: torch.dtype) -> int:
        """Numbers of a packed row: whole tiles."""
        return triton.cdiv(self.width, self.tile(dtype)) * self.tile(dtype)

    def pack(self, grids: Tensor, dtype: torch.dtype) -> Tensor:
        """rows [planes, nodes, pitch]"""
        split = grids.reshape(self.runs, self.planes, -1, self.rows).permute(1, 3, 0, 2)
        rows = grids.new_zeros(self.planes, self.rows, self.pitch(dtype))
        rows[..., : self.width] = split.reshape(self.planes, self.rows, self.width)
        return rows

    def unpack(self, rows: Tensor, like: Tensor) -> Tensor:
        split = rows[..., : self.width].reshape(self.planes, self.rows, self.runs, -1)
        return split.permute(2, 0, 3, 1).reshape(like.shape).to(like.dtype).contiguous()


def constants(settings: Settings, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """What a kernel is compiled for; dtype: of the coordinates."""
    dims = len(shape.nodes)
    corners = 1 << dims
    return {
        "D": dims,
        "P": shape.planes,
        "SLOTS": 3 if shape.planes == 3 else dims,
        "NODES": shape.nodes,
        "STRIDES": tuple(math.prod(shape.nodes[:d]) for d in range(dims)),
        "ROWS": shape.rows,
        "ZEROS": settings.zeros,
        "ALIGN": settings.align_corners,
        "WIDTH": shape.width,
        "PITCH": shape.pitch(dtype),
        "TILE": shape.tile(dtype),
        "CORNERS": corners,
        "UNROLL": corners if corners <= UNROLLED_CORNERS else 1,
        "BLOCK": BLOCK,
    }


def _launch(
    kernel: Any, settings: Settings, shape: Shape, coords: Tensor, rows: Tensor, *, tiled: bool = True, **arguments: Any
) -> None:
    """Runs a kernel over the points coords [n, slots]; tiled: over the tiles of a row, too."""
    n = len(coords)
    if n == 0:
        return
    compiled_for = constants(settings, shape, coords.dtype)
    programs = triton.cdiv(n, BLOCK) * (compiled_for["PITCH"] // compiled_for["TILE"] if tiled else 1)
    with torch.cuda.device(coords.device) if coords.is_cuda else nullcontext():
        kernel[(programs,)](u_ptr=coords, rows_ptr=rows, n=n, **arguments, **compiled_for, **OPTIONS[coords.dtype])


def value(coords: Tensor, grids: Tensor, *given: Any) -> Tensor:
    """The operator triton_coordinate_modulation."""
    settings = Settings(*given)
    shape = Shape.of(grids, coords.shape[1], settings.planes)
    y = grids.new_empty(len(coords), grids.shape[0], 2, *shape.channels)
    _launch(value_kernel, settings, shape, coords, shape.pack(grids, coords.dtype), y_ptr=y)
    return y


def backward(grad: Tensor, coords: Tensor, grids: Tensor, *settings_and_mask: Any) -> tuple[Tensor, Tensor]:
    """The operator triton_coordinate_modulation_backward: gradients of <grad, y> in coords and grids."""
    *given, (wants_coords, wants_grids) = settings_and_mask
    settings = Settings(*given)
    shape = Shape.of(grids, coords.shape[1], settings.planes)
    pitch = shape.pitch(coords.dtype)
    rows = shape.pack(grids, coords.dtype) if wants_coords or settings.planes else grids
    gu, ggrids = coords.new_empty(0), grids.new_empty(0)
    if wants_grids:
        if settings.deterministic:
            refuse_determinism("coordinate_modulation_backward")
        sums = coords.new_zeros(shape.planes, shape.rows, pitch)
        _launch(grids_kernel, settings, shape, coords, rows, grad_ptr=grad, sums_ptr=sums)
        ggrids = shape.unpack(sums, grids)
    if wants_coords:
        gu = torch.empty_like(coords)
        more = {"grad_ptr": grad, "gu_ptr": gu, "pitch": pitch}
        _launch(coordinates_kernel, settings, shape, coords, rows, tiled=False, **more)
    return gu, ggrids
