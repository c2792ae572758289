# SPDX-License-Identifier: MIT
"""The definition of `hash_grid` in plain PyTorch. Every backend is compared with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from numbers import Integral, Real

import torch
from torch import Tensor

from .._geometry import GridGeometry

BLENDS = {  # g(f) and g'(f) of the upper corner; "nearest" reads the lower corner alone, with weight 1
    "linear": (lambda f: f, torch.ones_like),
    "smoothstep": (lambda f: f * f * (3 - 2 * f), lambda f: 6 * f * (1 - f)),
    "nearest": (lambda f: 0 * f, lambda f: 0 * f),
}
PRIMES = (1, 2654435761, 805459861, 3674653429, 2097192037, 1434869437, 2165219737)
UINT32 = 0xFFFFFFFF
FAR = float(torch.tensor(1e28))  # how far a wrapped coordinate may be: its positions are still finite in float32
CELL_MIN, CELL_MAX = -2147483648, 2147483520  # what float32 to int32 conversion saturates at
LIMITS = (CELL_MIN, CELL_MAX, FAR)


def hash_grid(
    x: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    *,
    interpolation: str = "linear",
    max_level: int | float | Tensor | None = None,
    return_jacobian: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-resolution grid lookup. For level l, with g the blend of the interpolation,

        pos = fma(x, scale_l, shift)      p = floor(pos)      f = pos - p
        y[l*F + k] = sum_c prod_d (c_d ? g(f_d) : 1 - g(f_d)) * table[index_l(p + c), k],   c in {0, 1}^D

    x [..., D] in [0, 1], table [entries, F] -> [..., L*F] in the table's dtype, level-major; with return_jacobian also
    J [..., L*F, D] = dy/dx in the compute dtype, which is float64 if x or table is, else float32.

    linear g = f; smoothstep g = f^2 (3 - 2f); nearest reads corner p alone. At a cell face the cell is [p, p + 1).
    Outside [0, 1] by geometry.outside: "clamp" moves x to the border, where the derivative of that axis is 0; "zero"
    makes value and derivatives of the point 0; "wrap" continues the lattice modulo 2^32. A point with a NaN
    coordinate, or a wrapped one beyond 1e28, gives NaN and adds nothing to the gradient of the table.

    max_level: int n keeps the first n levels; float m in [0, 1] the levels l < m*L + 1e-3; a float Tensor [...] is m
    per point. Other levels give exactly 0.

    Source: Mueller et al., Instant Neural Graphics Primitives, 2022; conventions as in `GridGeometry.build`.

    >>> import torch
    >>> import camkernels
    >>> geometry = camkernels.GridGeometry.build(2, 4, 2, 10, finest_resolution=64)
    >>> camkernels.reference.hash_grid(torch.rand(5, 2), torch.rand(geometry.n_entries, 2), geometry).shape
    torch.Size([5, 8])
    """
    _check(x, table, geometry, interpolation)
    compute = torch.float64 if torch.float64 in (x.dtype, table.dtype) else torch.float32
    x, rows = x.to(compute), table.to(compute)
    x, inside, visible = _apply_outside(x, geometry.outside)
    values, jacobians = [], []
    for level, active in enumerate(active_levels(x, geometry.n_levels, max_level)):
        y, jacobian = _level(x, rows, geometry, level, interpolation, visible & active, return_jacobian)
        values.append(y)
        jacobians.append(jacobian)
    y = torch.stack(values, -2).flatten(-2).to(table.dtype)
    if not return_jacobian:
        return y
    jacobian = torch.stack(jacobians, -3).flatten(-3, -2)
    return y, torch.where(inside.unsqueeze(-2), jacobian, 0.0)


def _level(x, rows, geometry, level, interpolation, keep, with_jacobian):
    """Value [..., F] and, on demand, Jacobian [..., F, D] of one level; both are 0 where keep [..., 1] is False."""
    dims = geometry.dims
    scale = torch.tensor(geometry.scales[level], dtype=torch.float64, device=x.device)
    pos = (x.double() * scale + geometry.shift).to(x.dtype)  # through float64: a fused multiply-add for float32
    pos = torch.where(keep, pos, 0.0)
    p = pos.detach().floor()
    f = pos - p
    finite = pos.isfinite().all(-1, keepdim=True)

    corners = torch.tensor(list(itertools.product((0, 1), repeat=dims)), device=x.device)  # [2^D, D]
    if interpolation == "nearest":
        corners = corners[:1]
    upper = corners.bool()
    cell = torch.where(finite, p, 0.0).clamp(CELL_MIN, CELL_MAX).long()
    step = (pos > p).long() if geometry.ceil_corner else torch.ones_like(cell)
    index = _index(cell.unsqueeze(-2) + corners * step.unsqueeze(-2), geometry, level)  # [..., 2^D]
    unread = torch.where(keep & ~finite, torch.nan, 0.0).to(x.dtype)  # stands for rows that must not be touched
    theta = torch.where((keep & finite).unsqueeze(-1), rows[index], unread.unsqueeze(-1))  # [..., 2^D, F]

    blend, slope = BLENDS[interpolation]
    g = blend(f).unsqueeze(-2)
    weight = torch.where(upper, g, 1 - g)  # [..., 2^D, D]
    value = (_product(weight, range(dims)) * theta).sum(-2)
    if not with_jacobian:
        return value, None
    rise = (slope(f) * scale.to(x.dtype)).unsqueeze(-2)
    rise = torch.where(upper, rise, -rise)
    columns = [
        (rise[..., a : a + 1] * _product(weight, [d for d in range(dims) if d != a]) * theta).sum(-2)
        for a in range(dims)
    ]
    return value, torch.stack(columns, -1)


def _index(corner: Tensor, geometry: GridGeometry, level: int) -> Tensor:
    """Table row of an integer lattice point [..., D]: uint32 arithmetic, written in int64."""
    factors = PRIMES if geometry.hashed[level] else geometry.strides[level]
    index = torch.zeros_like(corner[..., 0])
    for d in range(geometry.dims):
        term = ((corner[..., d] & UINT32) * factors[d]) & UINT32
        index = index ^ term if geometry.hashed[level] else (index + term) & UINT32
    return geometry.offsets[level] + index % geometry.sizes[level]


def _apply_outside(x: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """x to look up, axes whose derivative counts [..., D], points whose value counts [..., 1]."""
    outside = (x < 0) | (x > 1)
    broken = x.isnan().any(-1, keepdim=True)
    inside, visible = torch.ones_like(outside), torch.ones_like(broken)
    if rule == "clamp":
        inside = ~outside | broken
        x = torch.where(inside, x, x.detach().clamp(0, 1))
    elif rule == "zero":
        visible = ~outside.any(-1, keepdim=True) | broken
    else:
        x = x + torch.where(x.abs() > FAR, torch.nan, 0.0)
    return x, inside, visible


def active_levels(x: Tensor, n_levels: int, max_level: int | float | Tensor | None) -> list[Tensor]:
    """Per level, where it is computed: [..., 1]."""
    count = count_levels(max_level, n_levels, x.shape[:-1], x.dtype)
    everywhere = torch.ones_like(x[..., :1], dtype=torch.bool)
    return [everywhere & torch.as_tensor(level < count, device=x.device).unsqueeze(-1) for level in range(n_levels)]


def count_levels(
    max_level: int | float | Tensor | None, n_levels: int, leading: torch.Size, dtype: torch.dtype
) -> int | Tensor:
    """How many levels are computed: an int, or int32 of the leading shape for a max_level per point, read in dtype."""
    if max_level is None:
        return n_levels
    if isinstance(max_level, Tensor):
        _check_level_tensor(max_level, leading)
        # l < m L + 1e-3 for ceil(m L + 1e-3) levels
        counts = (max_level.detach().to(dtype).nan_to_num(-1.0) * n_levels + 1e-3).ceil().clamp(0, n_levels)
        return counts.to(torch.int32).expand(leading)
    if isinstance(max_level, bool) or not isinstance(max_level, Real):
        raise TypeError(f"hash_grid: max_level must be an int, a float or a float tensor, got {max_level!r}")
    whole = isinstance(max_level, Integral)
    if not 0 <= max_level <= (n_levels if whole else 1):
        expected = f"an int between 0 and n_levels={n_levels} or a float between 0 and 1"
        raise ValueError(f"hash_grid: max_level must be {expected}, got {max_level!r}")
    return int(max_level) if whole else min(n_levels, math.ceil(max_level * n_levels + 1e-3))


def _check_level_tensor(max_level: Tensor, leading: torch.Size) -> None:
    if not max_level.is_floating_point():
        raise TypeError(f"hash_grid: max_level as a tensor must be floating point, got {max_level.dtype}")
    wanted, given = list(leading), list(max_level.shape)
    fits = all(m in (1, n) for m, n in zip(given[::-1], wanted[::-1], strict=False))
    if len(given) > len(wanted) or not fits:
        raise ValueError(f"hash_grid: max_level must broadcast to the leading shape {wanted} of x, got {given}")


def _product(weight: Tensor, axes: Iterable[int]) -> Tensor:
    product = torch.ones_like(weight[..., :1])
    for d in axes:
        product = product * weight[..., d : d + 1]
    return product


def _check(x: Tensor, table: Tensor, geometry: GridGeometry, interpolation: str) -> None:
    if interpolation not in BLENDS:
        raise ValueError(f"hash_grid: interpolation must be one of {', '.join(BLENDS)}, got {interpolation!r}")
    for name, tensor in (("x", x), ("table", table)):
        if not tensor.is_floating_point():
            raise TypeError(f"hash_grid: {name} must be a floating-point tensor, got {tensor.dtype}")
    if x.ndim < 1 or x.shape[-1] != geometry.dims:
        raise ValueError(f"hash_grid: x must have shape [..., {geometry.dims}], got {list(x.shape)}")
    expected = [geometry.n_entries, geometry.n_features_per_level]
    if list(table.shape) != expected:
        raise ValueError(f"hash_grid: table must have shape {expected} for this geometry, got {list(table.shape)}")
    if x.device != table.device:
        raise ValueError(f"hash_grid: x and table must be on one device, got {x.device} and {table.device}")
