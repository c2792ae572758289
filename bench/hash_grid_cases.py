# SPDX-License-Identifier: MIT
"""Cases of the hash grid."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

import camkernels

from .case import Case, Floor, Inputs, Pass

# ---- points ----------------------------------------------------------------------------------------------------------


def uniform_points(n: int, dims: int, seed: int) -> Tensor:
    """[n, dims] uniform in [0, 1)."""
    return torch.rand(n, dims, generator=torch.Generator().manual_seed(seed))


def raster_points(n: int, dims: int, seed: int) -> Tensor:
    """[n, 2]: the pixels of an image, row by row, one random place in each pixel; n a power of two."""
    width = 1 << math.ceil(math.log2(n) / 2)
    pixel = torch.arange(n)
    corner = torch.stack([pixel % width, pixel // width], -1)
    return (corner + uniform_points(n, dims, seed)) / torch.tensor([width, -(-n // width)])


def morton_points(n: int, dims: int, seed: int, bits: int = 10) -> Tensor:
    """[n, dims] uniform points in Morton order: neighbours in the list are neighbours in space."""
    x = uniform_points(n, dims, seed)
    cell = (x * (1 << bits)).long()
    code = torch.zeros(n, dtype=torch.long)
    for bit in range(bits):
        for d in range(dims):
            code |= (cell[:, d] >> bit & 1) << (bit * dims + d)
    return x[code.argsort()]


# ---- hash grid -------------------------------------------------------------------------------------------------------

LEVELS, FEATURES, LOG2_SIZE, BASE, FINEST = 16, 2, 19, 16, 2048
CACHE_LINE = 64
HASH_GRID_PASSES = {
    "forward": Pass("forward", "forward"),
    "fb-table": Pass("fb-table", "forward + backward (table)", ("table",)),
    "fb-x": Pass("fb-x", "forward + backward (x)", ("x",)),
    "fb-both": Pass("fb-both", "forward + backward (both)", ("x", "table")),
    "jacobian": Pass("jacobian", "value + Jacobian", jacobian=True),
}
# Positions rounded twice instead of once move weights by 1e-4 at resolution 2048 and single points into the next cell,
# where the derivative differs. bfloat16 gradients of the table are summed in bfloat16 by PyTorch, up to some thousand
# times for one entry.
TOLERANCES = {
    torch.float32: {"value": 1e-3, "jacobian": 3e-2, "x": 3e-2, "table": 1e-3},
    torch.bfloat16: {"value": 1e-2, "jacobian": 3e-2, "x": 3e-2, "table": 2e-1},
}
PLAIN_PYTORCH_BYTES = {2: 4600, 3: 7500}  # per point, forward + backward of the eager provider, by dims


@functools.cache
def grid_geometry(dims: int, convention: str) -> camkernels.GridGeometry:
    return camkernels.GridGeometry.build(
        dims, LEVELS, FEATURES, LOG2_SIZE, BASE, finest_resolution=FINEST, convention=convention
    )


def _level_bytes(geometry: camkernels.GridGeometry, level: int, row: int) -> int:
    """Memory that lookups of a level can touch: its rows, or a cache line per vertex where few vertices are hashed."""
    whole = geometry.sizes[level] * row
    return min(whole, math.prod(geometry.resolutions[level]) * CACHE_LINE) if geometry.hashed[level] else whole


def hash_grid_floor(dims: int, convention: str, size: int, points: int, task: Pass) -> Floor:
    """Floor of a hash grid of `size`-byte numbers; a gradient of the table is dense, so all of it is written.

    Every level is read once per corner in the forward pass, written once per corner for the table's gradient, and read
    once more for the gradient of x, whose sums need the values of the corners again. The Jacobian comes with the value.
    """
    geometry = grid_geometry(dims, convention)
    corners, row, outputs = 2**dims, FEATURES * size, geometry.output_dim * size
    sweeps = 1 + len(task.wrt)
    lookups = tuple((_level_bytes(geometry, level, row), corners * sweeps) for level in range(geometry.n_levels))
    touched = min(geometry.n_entries, geometry.n_levels * corners * points) * row / points
    memory = 4 * dims + outputs + touched
    if task.wrt:
        memory += outputs  # the gradient of the output is read
    if "table" in task.wrt:
        memory += geometry.n_entries * row / points
    if "x" in task.wrt:
        memory += 4 * dims
    if task.jacobian:
        memory += geometry.output_dim * dims * 4
    weights, sums = corners * (dims - 1), corners * 2 * FEATURES
    slopes = dims * (weights + sums) if task.jacobian else 0
    per_level = 3 * dims + sweeps * (weights + sums) + slopes
    return Floor(lookups, memory, geometry.n_levels * per_level)


def _hash_grid_case(dims: int, convention: str, order: str, dtype: torch.dtype, log2_points: int) -> Case:
    kind = str(dtype).removeprefix("torch.")
    draw = uniform_points if order == "uniform" else (raster_points if dims == 2 else morton_points)

    def make_parameters(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed + 1)
        shape = (grid_geometry(dims, convention).n_entries, FEATURES)
        return {"table": (torch.rand(shape, generator=generator) * 2 - 1).to(dtype)}

    tags = {"hash_grid", order, convention}
    if (convention, order, kind, log2_points) == ("nerfstudio", "uniform", "float32", 17):
        tags.add("gate")
    if (order, kind, log2_points) == ("uniform", "float32", 17):
        tags.add("default")
    if (order, kind, log2_points) == ("uniform", "float32", 14):
        tags.add("quick")
    return Case(
        op="hash_grid",
        name=f"hash_grid/{dims}d/{convention}/{order}/{kind}/n{log2_points}",
        points=1 << log2_points,
        facts={"dims": dims, "convention": convention, "order": order, "dtype": kind, "levels": LEVELS}
        | {"features": FEATURES, "log2_hashmap_size": LOG2_SIZE, "base_resolution": BASE, "finest_resolution": FINEST},
        passes=HASH_GRID_PASSES,
        scratch=PLAIN_PYTORCH_BYTES[dims],
        tolerances=TOLERANCES[dtype],
        tags=frozenset(tags),
        options=lambda: {"geometry": grid_geometry(dims, convention)},
        make_parameters=make_parameters,
        make_points=lambda n, seed: {"x": draw(n, dims, seed)},
        floor=functools.partial(hash_grid_floor, dims, convention, dtype.itemsize, 1 << log2_points),
    )


def make() -> Iterator[Case]:
    """16 levels x 2 features, 2^19 rows, 16 to 2048; "nerfstudio" hashes every level, "tcnn" stores coarse ones."""
    for dims in (3, 2):
        for convention in ("nerfstudio", "tcnn"):
            for order in ("uniform", "coherent"):
                for dtype in (torch.float32, torch.bfloat16):
                    for log2_points in (14, 17, 20):
                        yield _hash_grid_case(dims, convention, order, dtype, log2_points)
