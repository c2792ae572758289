# SPDX-License-Identifier: MIT
"""Hash-grid inputs: small tables, every option, and the points at which implementations tend to differ."""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .._geometry import GridGeometry, geometry_support
from .._grid_conventions import CONVENTIONS, KINDS, OUTSIDE
from ..reference.hash_grid import BLENDS, count_levels, hash_grid
from .golden import Golden
from .pairwise import pairwise

FACTORS: dict[str, tuple[Any, ...]] = {
    "dims": (3, 2, 1, 4, 5, 6, 7),
    "features": (2, 1, 4, 8, 3, 5, 16),
    "convention": CONVENTIONS,
    "kind": KINDS,
    "interpolation": tuple(BLENDS),
    "outside": OUTSIDE,
    "progression": ("scale", "finest", "uneven", "per_axis"),
    "max_level": (None, "int", "float", "per_point"),
    "align_corners": (False, True),
    "log2_hashmap_size": (7, 4, 10),
    "compat": (False, True),
    "layout": ("flat", "grid", "strided"),
}
GEOMETRY_FACTORS = ("dims", "convention", "kind", "progression", "align_corners", "log2_hashmap_size", "compat")
COMPAT = {"tcnn": ("tcnn_legacy_overflow",), "torch-ngp": ("ngp_tiled_leading_axes", "ngp_stride_overflow")}
# What the cover does not reach: sizes by two roundings, levels finer than any dense index, one level, one vertex.
SPECIAL: dict[str, dict[str, Any]] = {
    "torch-ngp-hashed-2200-rows": dict(
        dims=3, n_levels=2, log2_hashmap_size=12, base_resolution=2, per_level_scale=6.0, convention="torch-ngp"
    ),
    "tcnn-hash-fine": dict(dims=3, n_levels=3, log2_hashmap_size=8, base_resolution=16, finest_resolution=65536),
    "tcnn-hash-fine-legacy": dict(
        dims=3, n_levels=3, log2_hashmap_size=17, base_resolution=16, finest_resolution=65536,
        compat=("tcnn_legacy_overflow",),
    ),
    "tcnn-tiled-fine-one-entry": dict(
        dims=3, n_levels=4, log2_hashmap_size=8, base_resolution=6, finest_resolution=3000, kind="tiled",
        compat=("tcnn_index_overflow",),
    ),
    "one-level": dict(dims=2, n_levels=1, log2_hashmap_size=8, base_resolution=9),
    "one-vertex": dict(dims=3, n_levels=2, log2_hashmap_size=4, base_resolution=1, per_level_scale=2.0),
}  # fmt: skip


def case_options() -> dict[str, dict[str, Any]]:
    """Options of every case by name: a pairwise cover of FACTORS, then SPECIAL."""
    named = {}
    for options in _cover():
        parts = [f"d{options['dims']}f{options['features']}", options["convention"], options["kind"]]
        parts += [options["interpolation"], options["outside"], options["progression"]]
        parts += [f"max-{options['max_level']}"] if options["max_level"] else []
        parts += ["ac"] if options["align_corners"] else []
        parts += ["compat"] if options["compat"] else []
        parts += [f"t{options['log2_hashmap_size']}", options["layout"]]
        named["-".join(parts)] = options
    for name, arguments in SPECIAL.items():
        named[name] = {"arguments": arguments, "features": 2, "interpolation": "linear", "max_level": None}
    return named


@cache
def _cover() -> tuple[dict[str, Any], ...]:
    return tuple(pairwise(FACTORS, _legal))


def _legal(options: dict[str, Any]) -> bool:
    """Whether these options, of which some may still be missing, can be those of a case."""
    convention, kind, align = (options.get(name) for name in ("convention", "kind", "align_corners"))
    if convention and kind and geometry_support(convention, kind, 3, align_corners=bool(align)):
        return False
    if convention and options.get("compat") and convention not in COMPAT:
        return False
    known = [name in options for name in GEOMETRY_FACTORS]
    return not all(known) or _buildable(*(options[name] for name in GEOMETRY_FACTORS))


@cache
def _buildable(*values: Any) -> bool:
    try:
        build_geometry(dict(zip(GEOMETRY_FACTORS, values, strict=True), features=1, outside="clamp"))
    except ValueError:  # a level which its convention would index with fewer axes
        return False
    return True


def build_geometry(options: dict[str, Any]) -> GridGeometry:
    """Geometry of a case: few levels and a base resolution which keeps even a dense 7-D level small."""
    if "arguments" in options:
        return GridGeometry.build(n_features_per_level=options["features"], **options["arguments"])
    dims = options["dims"]
    base = {1: 16, 2: 8, 3: 5, 4: 3}.get(dims, 2)
    levels = {1: 4, 2: 4, 3: 3, 4: 3}.get(dims, 2)
    progression: dict[str, Any] = {
        "scale": {"per_level_scale": 1.5},
        "finest": {"finest_resolution": base * 2 if dims < 5 else base + 1},
        "uneven": {"resolutions": [base + (level * level) // 2 for level in range(levels)]},
        "per_axis": {"resolutions": [[base + (level + d) % 3 for d in range(dims)] for level in range(levels)]},
    }[options["progression"]]
    return GridGeometry.build(
        dims,
        levels,
        options["features"],
        options["log2_hashmap_size"],
        base_resolution=base,
        convention=options["convention"],
        kind=options["kind"],
        align_corners=options["align_corners"],
        outside=options["outside"],
        compat=COMPAT[options["convention"]] if options["compat"] else (),
        **progression,
    )


def make(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int, points: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(inputs x and table, remaining arguments). x is float64 for a float64 table, else float32."""
    geometry = build_geometry(options)
    generator = torch.Generator().manual_seed(seed)
    if points == "safe":  # every second one outside, where a rule of its own applies
        around = [safe_points(geometry, 12, seed, outside=outside) for outside in (False, True)]
        x = torch.stack(around, 1).flatten(0, 1)
    else:
        x = mixed_points(geometry, generator)
    x = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
    layout = options.get("layout", "flat")
    if layout == "grid":
        x = x[: len(x) // 3 * 3].reshape(3, -1, geometry.dims)
    elif layout == "strided":
        x = torch.stack([x, -x], -1).flatten(-2)[..., ::2]
    table = torch.rand(geometry.n_entries, geometry.n_features_per_level, generator=generator, dtype=torch.float64)
    max_level: Any = {
        "int": geometry.n_levels - 1,
        "float": 0.5,
        "per_point": torch.rand(x.shape[:-1], generator=generator, dtype=torch.float64).to(x.dtype).to(device),
    }.get(options["max_level"])
    rest = {"geometry": geometry, "interpolation": options["interpolation"], "max_level": max_level}
    return {"x": x.to(device), "table": (table * 2 - 1).to(dtype).to(device)}, rest


def mixed_points(geometry: GridGeometry, generator: torch.Generator) -> Tensor:
    """[n, D] float64: random, on lattice points, on the borders, outside, not finite, and one point many times."""
    d = geometry.dims
    inside = torch.rand(24, d, generator=generator, dtype=torch.float64)
    lattice = [_vertices(geometry, level, 4, generator) for level in range(geometry.n_levels)]
    border = torch.randint(0, 3, (6, d), generator=generator).double() / 2
    border[0], border[1] = 0.0, 1.0
    outside = torch.rand(8, d, generator=generator, dtype=torch.float64) * 4 - 1.5
    outside[0], outside[1], outside[2, 0], outside[3, -1], outside[4, 0] = -0.117, 1.213, 1e6, -3e9, -3e38
    broken = torch.rand(5, d, generator=generator, dtype=torch.float64)
    broken[0, 0], broken[1], broken[2, -1] = torch.nan, torch.nan, torch.inf
    broken[3, 0], broken[4, 0], broken[4, -1] = -torch.inf, torch.inf, torch.nan
    return torch.cat([inside, *lattice, border, outside, broken, inside[:1].expand(9, d)])


def _vertices(geometry: GridGeometry, level: int, n: int, generator: torch.Generator) -> Tensor:
    """Points [n, D] whose position at `level` is an integer, as nearly as float32 has it."""
    scale = torch.tensor(geometry.scales[level], dtype=torch.float64).clamp(min=0.5)
    cell = (torch.rand(n, geometry.dims, generator=generator, dtype=torch.float64) * (scale + 1)).floor()
    return ((cell - geometry.shift) / scale).float().double()


def safe_points(geometry: GridGeometry, n: int, seed: int = 0, margin: float = 1e-3, outside: bool = False) -> Tensor:
    """Points [n, D] float64 inside [0, 1], at least `margin` cells from every cell face, and 1e-3 from 0 and 1.

    outside: the coordinates lie in [-1.5, 2.5]; one that is clamped may be on a face, where it moves nothing. Finite
    differences are meaningful at these points. Raises RuntimeError if the lattice leaves no such points.
    """
    low, high = (-1.5, 2.5) if outside else (1e-3, 1 - 1e-3)
    generator = torch.Generator().manual_seed(seed)
    found = torch.empty(0, geometry.dims, dtype=torch.float64)
    for _ in range(100):
        x = torch.rand(4 * n, geometry.dims, generator=generator, dtype=torch.float64)
        x = (x * (high - low) + low).float().double()
        clamped = ((x < 0) | (x > 1)) & (geometry.outside == "clamp")
        clear = ((_face_distances(x, geometry) >= margin) | clamped.unsqueeze(-2)).all(-1).all(-1)
        clear &= ((x - x.clamp(0, 1).round()).abs() >= 1e-3 - 1e-7).all(-1)
        found = torch.cat([found, x[clear]])
        if len(found) >= n:
            return found[:n]
    raise RuntimeError(f"safe_points: found {len(found)} of {n} points {margin:g} cells away from every face")


def _positions(x: Tensor, geometry: GridGeometry) -> tuple[Tensor, Tensor]:
    """(positions [..., L, D], scales [L, D]) in float64; x as the outside rule leaves it."""
    scales = torch.tensor(geometry.scales, dtype=torch.float64, device=x.device)
    x = x.double().clamp(0, 1) if geometry.outside == "clamp" else x.double()
    return x.unsqueeze(-2) * scales + geometry.shift, scales


def face_distance(x: Tensor, geometry: GridGeometry) -> Tensor:
    """Distance in cells from the nearest cell face, over all axes: [..., L]; NaN where the position is not finite."""
    return _face_distances(x, geometry).amin(-1)


def _face_distances(x: Tensor, geometry: GridGeometry) -> Tensor:
    """Distance in cells from the nearest cell face along each axis: [..., L, D]."""
    position, scales = _positions(x, geometry)
    distance = (position - position.round()).abs()
    return torch.where(scales > 0, distance, 0.5)  # x moves nothing on an axis of scale 0


def face_width(x: Tensor, geometry: GridGeometry) -> Tensor:
    """Distance in cells below which rounding in x's dtype may decide the cell: [..., L, D]; four ulps of position."""
    position, _ = _positions(x, geometry)
    return 4 * torch.finfo(x.dtype).eps * position.abs().clamp(min=1)


def term_sizes(options: dict[str, Any]) -> Tensor:
    """Mean size, per table row [entries, 1], of the terms that a row sums up in `second.table`.

    A term is cotangent * cotangent * slope, with cotangents drawn from [-1, 1] and sum_a scale_a / 2^(D-1) for the
    slopes of a corner. Terms cancel in a row that corners of one cell share, exactly to 0 where one row serves all.
    """
    geometry = options["geometry"]
    sizes = torch.tensor(geometry.scales, dtype=torch.float64).sum(-1) / 4 / 2 ** (geometry.dims - 1)
    return sizes.repeat_interleave(torch.tensor(geometry.sizes)).unsqueeze(-1)


def one_sided(inputs: dict[str, Tensor], options: dict[str, Any], level: int) -> tuple[list[Tensor], list[Tensor]]:
    """Value [n, F] and Jacobian [n, F, D] of one level as seen from the sides of the faces a point lies on, in float64.

    First the point itself; then with x moved by twice `face_width` down, and up, along the axes that are near a face.
    The Jacobian along one axis jumps only at faces of that axis, so moving all together shows every value it takes;
    "nearest" jumps at all of them and gets every combination.
    """
    geometry, dims = options["geometry"], options["geometry"].dims
    x, table = inputs["x"], inputs["table"].double()
    position, scales = _positions(x, geometry)
    width = face_width(x, geometry)
    near = (position - position.round()).abs() <= width
    shift = torch.where(near & (scales > 0), 2 * width / scales.clamp(min=1e-30), 0.0)[..., level, :]
    single = dataclasses.replace(
        geometry, n_levels=1, offsets=(0, geometry.sizes[level]),
        **{k: getattr(geometry, k)[level : level + 1] for k in ("scales", "strides", "sizes", "hashed", "resolutions")},
    )  # fmt: skip
    table = table[geometry.offsets[level] : geometry.offsets[level + 1]]
    x = x.double()
    bounded = (x >= 0) & (x <= 1) & (geometry.outside != "wrap")
    signs = (
        list(product((-1, 1), repeat=dims)) if options["interpolation"] == "nearest" else [(-1,) * dims, (1,) * dims]
    )
    values, jacobians = [], []
    for sign in [(0,) * dims, *signs]:
        moved = x + shift * torch.tensor(sign, device=x.device)
        moved = torch.where(bounded, moved.clamp(0, 1), moved)
        y, jacobian = hash_grid(moved, table, single, interpolation=options["interpolation"], return_jacobian=True)
        values.append(y)
        jacobians.append(jacobian)
    return values, jacobians


def near_faces(inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Points within rounding of a cell face, and the width of that in cells: [n] each."""
    geometry = options["geometry"]
    x = inputs["x"].reshape(-1, geometry.dims)
    width = face_width(x, geometry).amax(-1)
    return (face_distance(x, geometry) <= width).any(-1), width.amax(-1)


def sides(inputs: dict[str, Tensor], options: dict[str, Any], quantity: str, at: Tensor, ct: Tensor) -> list[Tensor]:
    """What each side of the faces would give at the points `at`: tensors [len(at), ...] in float64.

    quantity: "value", "jacobian", or "grad.points" of the cotangent ct of the value."""
    geometry: GridGeometry = options["geometry"]
    x = inputs["x"].reshape(-1, geometry.dims)[at]
    levels = [one_sided(inputs | {"x": x}, options, level) for level in range(geometry.n_levels)]
    shape = inputs["x"].shape[:-1]
    count = count_levels(options["max_level"], geometry.n_levels, shape, x.dtype)
    count = count.reshape(-1, 1)[at] if torch.is_tensor(count) else torch.full((len(at), 1), count, device=x.device)
    active = [level < count for level in range(geometry.n_levels)]
    values = [[y * active[level] for y in values] for level, (values, _) in enumerate(levels)]
    jacobians = [[j * active[level].unsqueeze(-1) for j in found] for level, (_, found) in enumerate(levels)]
    if quantity == "value":
        return [torch.cat(side, -1) for side in zip(*values, strict=True)]
    if quantity == "jacobian":
        return [torch.cat(side, -2).flatten(1) for side in zip(*jacobians, strict=True)]
    ct = ct.double().reshape(-1, geometry.n_levels, geometry.n_features_per_level)[at]
    sums = [torch.zeros_like(x, dtype=torch.float64)]
    for level, found in enumerate(jacobians):  # any side at each level
        sums = [total + (ct[:, level, :, None] * j).sum(1) for total in sums for j in found]
    return sums


def golden_options(golden: Golden) -> dict[str, Any]:
    """Arguments besides x and table of the call that a hashgrid_* fixture records; its own rule outside [0, 1]."""
    hyper = golden.hyper
    convention = {"tcnn": "tcnn", "torchngp": "torch-ngp", "nerfstudio": "nerfstudio"}[golden.meta["op"].split("_")[1]]
    if convention == "nerfstudio":
        progression = {"base_resolution": hyper["min_res"], "finest_resolution": hyper["max_res"]}
    else:
        progression = {"base_resolution": hyper["base_resolution"], "per_level_scale": hyper["per_level_scale"]}
    geometry = GridGeometry.build(
        hyper["dim"],
        hyper["levels"],
        hyper["features"],
        hyper["log2_hashmap_size"],
        convention=convention,
        kind=hyper.get("grid_type", "hash"),
        align_corners=hyper.get("align_corners", False),
        outside="convention",
        **progression,
    )
    interpolation, max_level = hyper.get("interpolation", "linear"), hyper.get("max_level")
    return {"geometry": geometry, "interpolation": interpolation, "max_level": max_level}
