# SPDX-License-Identifier: MIT
"""The grid conventions: which combinations exist, and one function per public code giving the record of one level.

Sources: tiny-cuda-nn `include/tiny-cuda-nn/encodings/grid.h`, torch-ngp `gridencoder/`, nerfstudio
`nerfstudio/field_components/encodings.py`. Users call `camkernels.GridGeometry.build`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

CONVENTIONS = ("tcnn", "torch-ngp", "nerfstudio")
KINDS = ("hash", "dense", "tiled")
OUTSIDE = ("clamp", "zero", "wrap", "convention")
PUBLISHED_OUTSIDE = {"tcnn": "wrap", "torch-ngp": "zero", "nerfstudio": "wrap"}
COMPAT = {
    "tcnn_index_overflow": "tcnn",
    "tcnn_legacy_overflow": "tcnn",
    "ngp_tiled_leading_axes": "torch-ngp",
    "ngp_stride_overflow": "torch-ngp",
    "ngp_host_ceil": "torch-ngp",
}
MAX_DIMS = 7

_PUBLISHED_DIMS = {"tcnn": (2, 3, 4), "torch-ngp": (2, 3, 4, 5), "nerfstudio": (3,)}
_PUBLISHED_KINDS = {"tcnn": KINDS, "torch-ngp": ("hash", "tiled"), "nerfstudio": ("hash",)}
_UINT32_MAX = 0xFFFFFFFF
_MAX_SIZE = _UINT32_MAX // 2
_F32 = np.float32


def geometry_support(convention: str, kind: str, dims: int, *, align_corners: bool = False) -> str | None:
    """Reason why `GridGeometry.build` refuses a combination, or None if it is built.

    What a convention's own code does not offer is built by extending its formula where that leaves no choice: any
    number of axes from 1 to 7, dense torch-ngp and nerfstudio grids, tiny-cuda-nn vertices at both ends of [0, 1].
    """
    if convention not in CONVENTIONS:
        return f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}"
    if kind not in KINDS:
        return f"kind must be one of {', '.join(KINDS)}, got {kind!r}"
    if not 1 <= dims <= MAX_DIMS:
        return f"dims must be between 1 and {MAX_DIMS}, got {dims}; the hash defines {MAX_DIMS} primes, one per axis"
    if convention == "nerfstudio" and kind == "tiled":
        return "nerfstudio defines no tile size; use kind='hash' or kind='dense', or convention='tcnn'"
    if convention == "nerfstudio" and align_corners:
        return "nerfstudio has one lattice, which has vertices at 0 and 1 already; leave align_corners=False"
    return None


def geometry_table() -> list[dict[str, Any]]:
    """One row per convention, kind and align_corners: dims of its public code, dims built here, or a reason."""
    rows = []
    for convention in CONVENTIONS:
        for kind in KINDS:
            for align in (False, True):
                published = kind in _PUBLISHED_KINDS[convention] and (not align or convention == "torch-ngp")
                reasons = {
                    d: geometry_support(convention, kind, d, align_corners=align) for d in range(1, MAX_DIMS + 1)
                }
                row = {
                    "convention": convention,
                    "kind": kind,
                    "align_corners": align,
                    "published_dims": list(_PUBLISHED_DIMS[convention]) if published else [],
                    "dims": [d for d, reason in reasons.items() if reason is None],
                    "reason": reasons[3],
                }
                rows.append(row)
    return rows


class Level(NamedTuple):
    """What a kernel knows of one level; vertices is informative."""

    scale: tuple[float, ...]
    vertices: tuple[int, ...]
    strides: tuple[int, ...]
    size: int
    hashed: bool


class Request(NamedTuple):
    """Checked arguments of `GridGeometry.build`; exactly one of per_level_scale and resolutions is set."""

    dims: int
    n_levels: int
    n_features_per_level: int
    log2_hashmap_size: int
    base_resolution: int
    per_level_scale: float | None
    resolutions: tuple[tuple[int, ...], ...] | None
    convention: str
    kind: str
    align_corners: bool
    compat: tuple[str, ...]


def build_level(request: Request, level: int) -> Level:
    """The record of one level in the arithmetic of the requested convention."""
    return _RULES[request.convention](request, level)


def _tcnn_level(request: Request, level: int) -> Level:
    """tiny-cuda-nn: R = ceil(scale) + 1 vertices; size is R^D rounded up to 8, capped by the table or the tile."""
    scale = _minus_one_scale(request, level)
    vertices = tuple(math.ceil(s) + 1 for s in scale)
    count = math.prod(vertices)
    size = _round_up_8(min(count, _MAX_SIZE))
    if request.kind == "hash":
        size = min(size, 1 << request.log2_hashmap_size)
    elif request.kind == "tiled":
        tile = request.resolutions[0] if request.resolutions else (request.base_resolution,) * request.dims
        size = min(size, math.prod(tile))
    if "tcnn_legacy_overflow" in request.compat:
        strides, reach = _walk(vertices, size, wrap=True)
    elif count <= _UINT32_MAX:
        strides, reach = _walk(vertices, count, wrap=False)
    else:  # the library adds nothing to the index and then hashes, except on the kinds which never hash
        strides, reach = (0,) * request.dims, _UINT32_MAX
        if request.kind != "hash" and "tcnn_index_overflow" not in request.compat:
            also = ", or compat=('tcnn_index_overflow',) to read one entry for the whole level as tiny-cuda-nn does"
            raise ValueError(_too_many_vertices(request, level, vertices, also))
    return _finish(request, scale, vertices, strides, size, reach)


def _torch_ngp_level(request: Request, level: int) -> Level:
    """torch-ngp: sizes from ceil(b s^l) in float64, positions and strides from float32; the two may differ by one."""
    scale = _minus_one_scale(request, level)
    extra = 0 if request.align_corners else 1
    vertices = tuple(math.ceil(s) + 1 + extra for s in scale)
    count = math.prod(vertices)
    if request.kind == "dense":  # torch-ngp has none, so one arithmetic gives size and strides
        if count > _MAX_SIZE:
            raise ValueError(_too_many_vertices(request, level, vertices))
    else:
        if request.resolutions is None:
            count = (math.ceil(request.base_resolution * request.per_level_scale**level) + extra) ** request.dims
        count = min(count, 1 << request.log2_hashmap_size)
    size = _round_up_8(count)
    strides, reach = _walk(vertices, size, wrap="ngp_stride_overflow" in request.compat)
    if request.kind == "tiled" and 0 in strides and "ngp_tiled_leading_axes" not in request.compat:
        raise ValueError(
            f"GridGeometry.build: a tiled torch-ngp level ignores its last axes once it outgrows the table, and level "
            f"{level} with {vertices} vertices and {size} rows would; use kind='hash', a larger log2_hashmap_size, "
            "or compat=('ngp_tiled_leading_axes',) to reproduce it"
        )
    return _finish(request, scale, vertices, strides, size, reach)


def _nerfstudio_level(request: Request, level: int) -> Level:
    """nerfstudio: scale = floor(b g^l) in float32; every hashed level has the full table, however coarse."""
    if request.resolutions is not None:
        scale = tuple(float(_F32(r)) for r in request.resolutions[level])
    else:
        power = _F32(float(_F32(request.per_level_scale)) ** level)
        scale = (float(math.floor(_F32(request.base_resolution) * power)),) * request.dims
    vertices = tuple(int(s) + 1 for s in scale)
    if request.kind == "hash":
        return Level(scale, vertices, (0,) * request.dims, 1 << request.log2_hashmap_size, True)
    count = math.prod(vertices)
    if count > _MAX_SIZE:
        raise ValueError(_too_many_vertices(request, level, vertices))
    strides, reach = _walk(vertices, count, wrap=False)
    return _finish(request, scale, vertices, strides, _round_up_8(count), reach)


_RULES = {"tcnn": _tcnn_level, "torch-ngp": _torch_ngp_level, "nerfstudio": _nerfstudio_level}


def _minus_one_scale(request: Request, level: int) -> tuple[float, ...]:
    """exp2(l * log2 s) * b - 1 in float32; tiny-cuda-nn rounds s to float32 before the logarithm, torch-ngp after it.

    exp2 and log2 are taken in float64 and rounded to float32, so that every machine gets the same layout.
    """
    if request.resolutions is not None:
        return tuple(float(_F32(r - 1)) for r in request.resolutions[level])
    s = request.per_level_scale
    log2s = _F32(math.log2(float(_F32(s)) if request.convention == "tcnn" else s))
    power = _F32(2.0 ** float(_F32(level) * log2s))
    return (float(power * _F32(request.base_resolution) - _F32(1)),) * request.dims


def _walk(vertices: tuple[int, ...], limit: int, wrap: bool) -> tuple[tuple[int, ...], int]:
    """Strides of a dense index, axis 0 fastest, and their last product; axes past `limit` are ignored (stride 0)."""
    strides, product = [0] * len(vertices), 1
    for axis, count in enumerate(vertices):
        if product > limit:
            break
        strides[axis] = product
        product = product * count & _UINT32_MAX if wrap else product * count
    return tuple(strides), product


def _finish(
    request: Request,
    scale: tuple[float, ...],
    vertices: tuple[int, ...],
    strides: tuple[int, ...],
    size: int,
    reach: int,
) -> Level:
    hashed = request.kind == "hash" and size < reach
    return Level(scale, vertices, (0,) * request.dims if hashed else strides, size, hashed)


def _round_up_8(count: int) -> int:
    return (count + 7) // 8 * 8


def _too_many_vertices(request: Request, level: int, vertices: tuple[int, ...], also: str = "") -> str:
    return (
        f"GridGeometry.build: level {level} has {vertices} vertices, more than a 32-bit index of "
        f"kind={request.kind!r} reaches; use kind='hash' or a smaller finest_resolution{also}"
    )
