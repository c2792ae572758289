# SPDX-License-Identifier: MIT
"""Geometry of multi-resolution grids: every number a kernel needs, computed once on the host.

Three public codes lay the same idea out differently: tiny-cuda-nn, torch-ngp and nerfstudio's PyTorch encoding.
`GridGeometry.build` evaluates the arithmetic of the chosen one (`_grid_conventions.py`), in float32 or float64 exactly
where it does, and returns one record per level. Kernels then share one formula:

    pos_d = fma(x_d, scale_d, shift)          p_d = floor(pos_d)
    dense:  index = (sum_d p_d * stride_d mod 2^32) mod size
    hashed: index = (xor_d p_d * prime_d mod 2^32) mod size
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ._grid_conventions import (
    COMPAT,
    CONVENTIONS,
    KINDS,
    MAX_DIMS,
    OUTSIDE,
    PUBLISHED_OUTSIDE,
    Request,
    build_level,
    geometry_support,
    geometry_table,
)

__all__ = ["GridGeometry", "geometry_support", "geometry_table"]

MAX_LEVELS, MAX_FEATURES, MAX_LOG2_SIZE = 128, 1 << 16, 30
MAX_ENTRIES, MAX_RESOLUTION = 1 << 40, 1 << 31
MAX_LEVEL_SIZE, MAX_STRIDE = 1 << 31, (1 << 32) - 1  # an index has 32 bits
DEFAULT_FINEST = 2048


@dataclasses.dataclass(frozen=True, repr=False)
class GridGeometry:
    """Per-level scale, strides, size, offset and hashing of a multi-resolution grid over [0, 1]^dims.

    A plain value: it compares, hashes, pickles and copies; `to_dict` gives plain numbers for a checkpoint. Made by
    `GridGeometry.build`. Level l of L, axis d of D:

    scales [L][D]        pos_d = fma(x_d, scales[l][d], shift); exact float32 values
    strides [L][D]       stride of each axis in the dense index, in [0, 2^32); all 0 if hashed, 0 for an ignored axis
    sizes [L]            table rows of the level;  offsets [L + 1]: their running sum
    hashed [L]           the hash replaces the dense index
    resolutions [L][D]   vertices per axis, for reading
    ceil_corner          the upper corner is ceil(pos) (nerfstudio), not floor(pos) + 1
    outside              "clamp" | "zero" | "wrap"

    >>> geometry = GridGeometry.build(3, 16, 2, 19, finest_resolution=2048)
    >>> geometry.n_entries, geometry.output_dim
    (6098120, 32)
    """

    dims: int
    n_levels: int
    n_features_per_level: int
    scales: tuple[tuple[float, ...], ...]
    shift: float
    strides: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    hashed: tuple[bool, ...]
    resolutions: tuple[tuple[int, ...], ...]
    ceil_corner: bool
    outside: str
    convention: str
    kind: str
    align_corners: bool
    log2_hashmap_size: int
    base_resolution: int
    per_level_scale: float | None
    compat: tuple[str, ...]

    @classmethod
    def build(
        cls,
        dims: int,
        n_levels: int,
        n_features_per_level: int,
        log2_hashmap_size: int,
        base_resolution: int = 16,
        per_level_scale: float | None = None,
        finest_resolution: float | None = None,
        resolutions: Sequence[int | Sequence[int]] | None = None,
        convention: str = "tcnn",
        kind: str = "hash",
        align_corners: bool = False,
        outside: str = "clamp",
        compat: Iterable[str] = (),
    ) -> GridGeometry:
        """Resolution of level l = base_resolution * per_level_scale^l, laid out as `convention` does.

        finest_resolution instead of per_level_scale names the last level's resolution; `resolutions` lists one int, or
        one int per axis, for each level. At most one of the three; none means finest_resolution=2048. A resolution R
        counts what the convention counts:

        convention   scale   vertices per axis                  outside [0, 1] in the public code
        tcnn         R - 1   R                                  wrap
        torch-ngp    R - 1   R + 1; with align_corners R        zero
        nerfstudio   R       R + 1 (upper corner ceil(pos))     wrap

        kind: "hash" caps a level at 2^log2_hashmap_size rows; "dense" never does; "tiled" repeats a tile.
        outside: "clamp" | "zero" | "wrap" | "convention" (the last column).
        compat: upstream behaviours that are refused or mended otherwise. tcnn_index_overflow: tiled or dense levels of
        more than 2^32 vertices read one entry; tcnn_legacy_overflow: the index rule before June 2025;
        ngp_tiled_leading_axes: large tiled levels ignore their last axes; ngp_stride_overflow: stride products wrap at
        2^32; ngp_host_ceil: sizes from float64 beside strides from float32, always so for torch-ngp.

        Raises ValueError for a value out of range or a refused combination, TypeError for a wrong type.
        """
        request = _check_request(
            dims=dims,
            n_levels=n_levels,
            n_features_per_level=n_features_per_level,
            log2_hashmap_size=log2_hashmap_size,
            base_resolution=base_resolution,
            progression=(per_level_scale, finest_resolution, resolutions),
            convention=convention,
            kind=kind,
            align_corners=align_corners,
            compat=compat,
        )
        _check_choice("outside", outside, OUTSIDE)
        return cls._from_request(request, PUBLISHED_OUTSIDE[convention] if outside == "convention" else outside)

    @classmethod
    def _from_request(cls, request: Request, outside: str) -> GridGeometry:
        levels = [build_level(request, level) for level in range(request.n_levels)]
        offsets = tuple(accumulate((level.size for level in levels), initial=0))
        if offsets[-1] > MAX_ENTRIES:
            raise ValueError(
                f"GridGeometry.build: the table would have {offsets[-1]} rows, more than 2^40; use kind='hash', "
                "a smaller log2_hashmap_size or a smaller finest_resolution"
            )
        kept = request._asdict()
        del kept["resolutions"]
        return cls(
            scales=tuple(level.scale for level in levels),
            shift=0.0 if request.convention == "nerfstudio" or request.align_corners else 0.5,
            strides=tuple(level.strides for level in levels),
            sizes=tuple(level.size for level in levels),
            offsets=offsets,
            hashed=tuple(level.hashed for level in levels),
            resolutions=tuple(level.vertices for level in levels),
            ceil_corner=request.convention == "nerfstudio",
            outside=outside,
            **kept,
        )

    def __post_init__(self) -> None:
        self._check_fields()  # they may come from a damaged checkpoint, and kernels rely on them
        # As the operators take it, noted once: scales [L * D]; layout, per level D strides, size, offset, hashed.
        levels = zip(self.strides, self.sizes, self.offsets[:-1], self.hashed, strict=True)
        layout = [number for strides, *rest in levels for number in (*strides, *map(int, rest))]
        object.__setattr__(self, "flat", ([scale for level in self.scales for scale in level], layout))

    def _check_fields(self) -> None:
        for name, most in (("dims", MAX_DIMS), ("n_levels", MAX_LEVELS), ("n_features_per_level", MAX_FEATURES)):
            _check_kept_ints(name, [getattr(self, name)], 1, most)
        for name in ("scales", "strides", "sizes", "hashed", "resolutions"):
            _check_kept_length(name, getattr(self, name), "n_levels", self.n_levels)
        for name in ("scales", "strides", "resolutions"):
            for item in getattr(self, name):
                _check_kept_length(f"every item of {name}", item, "dims", self.dims)
        _check_kept_ints("sizes", self.sizes, 1, MAX_LEVEL_SIZE)
        _check_kept_ints("strides", [s for strides in self.strides for s in strides], 0, MAX_STRIDE)
        if self.offsets != tuple(accumulate(self.sizes, initial=0)):
            raise ValueError("GridGeometry: offsets must be the running sum of the sizes, starting with 0")
        for name, values in (("scales", [s for scales in self.scales for s in scales]), ("shift", [self.shift])):
            if not all(isinstance(value, numbers.Real) and math.isfinite(value) for value in values):
                raise ValueError(f"GridGeometry: {name} must hold finite numbers, got {values}")
        if self.outside not in OUTSIDE or self.outside == "convention":
            raise ValueError(f"GridGeometry: outside must be clamp, zero or wrap, got {self.outside!r}")

    @property
    def n_entries(self) -> int:
        """Rows of the table: the sum of the level sizes."""
        return self.offsets[-1]

    @property
    def output_dim(self) -> int:
        """Features per point: n_levels * n_features_per_level."""
        return self.n_levels * self.n_features_per_level

    def to_dict(self) -> dict[str, Any]:
        """Every field as numbers, strings and lists: fit for JSON and for torch.load(weights_only=True)."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GridGeometry:
        """Inverse of `to_dict`. Raises ValueError if a field is missing, unknown or inconsistent."""
        if not isinstance(values, Mapping):
            raise ValueError(f"GridGeometry.from_dict: expected a dict, got {values!r}; give what to_dict() returns")
        odd = sorted({field.name for field in dataclasses.fields(cls)} ^ set(values))
        if odd:
            raise ValueError(
                f"GridGeometry.from_dict: fields {odd} are missing or unknown; give what to_dict() returns"
            )
        return cls(**{name: _frozen(value) for name, value in values.items()})

    def __repr__(self) -> str:
        ends = f"{self.resolutions[0]}..{self.resolutions[-1]}" if self.n_levels > 1 else f"{self.resolutions[0]}"
        compat = f", compat={self.compat}" if self.compat else ""
        return (
            f"GridGeometry(dims={self.dims}, n_levels={self.n_levels}, n_features_per_level="
            f"{self.n_features_per_level}, log2_hashmap_size={self.log2_hashmap_size}, vertices={ends}, "
            f"entries={self.n_entries}, convention={self.convention!r}, kind={self.kind!r}, "
            f"align_corners={self.align_corners}, outside={self.outside!r}{compat})"
        )


# ---- argument checks -------------------------------------------------------------------------------------------------


def _check_request(*, dims, n_levels, base_resolution, progression, convention, kind, align_corners, compat, **sizes):
    """The arguments of `GridGeometry.build` as a Request, or an error that names the argument at fault."""
    _check_choice("convention", convention, CONVENTIONS)
    _check_choice("kind", kind, KINDS)
    if not isinstance(align_corners, (bool, np.bool_)):
        raise TypeError(f"GridGeometry.build: align_corners must be True or False, got {align_corners!r}")
    dims = _check_int("dims", dims, 1, MAX_DIMS, f"the hash defines {MAX_DIMS} primes, one per axis")
    n_levels = _check_int("n_levels", n_levels, 1, MAX_LEVELS, "use fewer levels with a larger per_level_scale")
    base = _check_int("base_resolution", base_resolution, 1, MAX_RESOLUTION, "it is the resolution of level 0")
    features, log2_size = sizes["n_features_per_level"], sizes["log2_hashmap_size"]
    features = _check_int("n_features_per_level", features, 1, MAX_FEATURES, "a table row holds them side by side")
    log2_size = _check_int("log2_hashmap_size", log2_size, 1, MAX_LOG2_SIZE, "a level has at most 2^log2 rows")
    reason = geometry_support(convention, kind, dims, align_corners=align_corners)
    if reason:
        raise ValueError(f"GridGeometry.build: {reason}")
    scale, resolutions = _check_progression(n_levels, dims, base, convention, *progression)
    return Request(
        dims=dims,
        n_levels=n_levels,
        n_features_per_level=features,
        log2_hashmap_size=log2_size,
        base_resolution=base,
        per_level_scale=scale,
        resolutions=resolutions,
        convention=convention,
        kind=kind,
        align_corners=bool(align_corners),
        compat=_check_compat(compat, convention),
    )


def _check_progression(n_levels, dims, base, convention, per_level_scale, finest, resolutions):
    """(per_level_scale as float64, None) or (None, resolutions as [L][D] ints)."""
    options = {"per_level_scale": per_level_scale, "finest_resolution": finest, "resolutions": resolutions}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"GridGeometry.build: give at most one of {', '.join(options)}; got {' and '.join(given)}")
    if resolutions is not None:
        return None, _check_resolutions(resolutions, n_levels, dims)
    if per_level_scale is not None:
        scale = _check_number("per_level_scale", per_level_scale)
    else:
        finest = _check_number("finest_resolution", DEFAULT_FINEST if finest is None else finest)
    if n_levels == 1:
        return 1.0, None
    if per_level_scale is None:
        if finest < base:
            raise ValueError(
                f"GridGeometry.build: finest_resolution must be at least base_resolution={base}, got {finest:g}; "
                "give a larger finest_resolution or a smaller base_resolution"
            )
        if convention == "nerfstudio":  # both through numpy, as the public constructors
            scale = float(np.exp((np.log(finest) - np.log(base)) / (n_levels - 1)))
        else:
            scale = float(np.exp2(np.log2(finest / base) / (n_levels - 1)))
    last = math.log2(base) + (n_levels - 1) * math.log2(scale)
    if not -1e-6 <= last <= 31:
        raise ValueError(
            f"GridGeometry.build: {given[0] if given else 'finest_resolution'} gives level {n_levels - 1} resolution "
            f"2^{last:.1f}, expected 1 to 2^31; move it towards 1 or use fewer levels"
        )
    return scale, None


def _check_resolutions(resolutions, n_levels: int, dims: int) -> tuple[tuple[int, ...], ...]:
    if isinstance(resolutions, (str, Mapping)) or not isinstance(resolutions, Iterable):
        raise TypeError(f"GridGeometry.build: resolutions must list one item per level, got {resolutions!r}")
    items = list(resolutions)
    if len(items) != n_levels:
        raise ValueError(f"GridGeometry.build: resolutions must have n_levels={n_levels} items, got {len(items)}")
    levels = []
    for level, item in enumerate(items):
        name = f"resolutions[{level}]"
        axes = tuple(item) if isinstance(item, Iterable) else (item,) * dims
        if len(axes) != dims:
            raise ValueError(f"GridGeometry.build: {name} must be one int or dims={dims} ints, got {item!r}")
        why = "it counts vertices or cells per axis"
        levels.append(tuple(_check_int(name, r, 1, MAX_RESOLUTION, why) for r in axes))
    return tuple(levels)


def _check_compat(compat, convention: str) -> tuple[str, ...]:
    if isinstance(compat, str) or not isinstance(compat, Iterable):
        raise TypeError(f"GridGeometry.build: compat must be a tuple of names, got {compat!r}; write compat=('name',)")
    names = tuple(sorted(set(compat)))
    legal = [name for name, owner in COMPAT.items() if owner == convention]
    for name in names:
        if name not in legal:
            raise ValueError(
                f"GridGeometry.build: compat name {name!r} does not exist for convention={convention!r}, "
                f"which has {', '.join(legal) or 'none'}"
            )
    if {"tcnn_index_overflow", "tcnn_legacy_overflow"} <= set(names):
        raise ValueError(
            "GridGeometry.build: compat names tcnn_index_overflow and tcnn_legacy_overflow exclude each other"
        )
    return names


def _check_int(name: str, value, low: int, high: int, why: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"GridGeometry.build: {name} must be an int, got {value!r} ({type(value).__name__})")
    if not low <= value <= high:
        raise ValueError(f"GridGeometry.build: {name} must be between {low} and {high}, got {value}; {why}")
    return int(value)


def _check_number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"GridGeometry.build: {name} must be a number, got {value!r} ({type(value).__name__})")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"GridGeometry.build: {name} must be positive and finite, got {value}")
    return float(value)


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"GridGeometry.build: {name} must be one of {', '.join(choices)}, got {value!r}")


def _check_kept_ints(name: str, values: Sequence[Any], low: int, high: int) -> None:
    if any(isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high for v in values):
        raise ValueError(f"GridGeometry: {name} must be ints between {low} and {high}, got {values}")


def _check_kept_length(name: str, value: Any, counted: str, count: int) -> None:
    if not isinstance(value, tuple) or len(value) != count:
        raise ValueError(f"GridGeometry: {name} must have {counted}={count} items, got {value}")


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value
