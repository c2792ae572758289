# SPDX-License-Identifier: MIT
"""Cases of the radial basis: NeuRBF's kernels, inverse quadratic with a full matrix, normalised, a sine per feature."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from camkernels import nearest
from camkernels.fields.neurbf import wave_frequencies

from .case import Case, Floor, Inputs, Pass
from .hash_grid_cases import uniform_points

WAVES = (2.0**-3, 2.0**12)  # NeuRBF's for pictures


@dataclass(frozen=True)
class Kernels:
    """`count` kernels uniform in [0, 1)^dims, of which each point has `neighbors`."""

    dims: int
    neighbors: int
    features: int
    count: int

    @functools.cached_property
    def centers(self) -> Tensor:
        return uniform_points(self.count, self.dims, seed=0)

    def options(self) -> dict[str, Any]:
        return {"kind": "ivq", "shape": "full", "frequencies": wave_frequencies(*WAVES, self.features)}


KERNELS = {
    "2d-k4-f32-20k": Kernels(2, 4, 32, 20_000),
    "3d-k8-f32-100k": Kernels(3, 8, 32, 100_000),
    "2d-k10-f64-100k": Kernels(2, 10, 64, 100_000),
}
SIZES = (14, 17, 20)
PASSES = {
    task.name: task
    for task in (
        Pass("forward", "forward"),
        Pass("fb-features", "forward + backward (features)", ("features",)),
        Pass("fb-all", "forward + backward (all)", ("x", "centers", "shapes", "features")),
    )
}
# A sine turns by up to 4096 rad, where float32 has three digits, and its derivative grows with its frequency.
TOLERANCES = {"value": 2e-3, "features": 2e-3, "x": 2e-2, "centers": 2e-2, "shapes": 2e-2}


# ---- inputs ----------------------------------------------------------------------------------------------------------


def draw_parameters(kernels: Kernels, seed: int) -> Inputs:
    """Kernels about as wide as they are apart: positive matrices near a multiple of the unit matrix."""
    generator = torch.Generator().manual_seed(seed + 1)
    dims, count = kernels.dims, kernels.count
    scale = (2 * count ** (1 / dims)) ** 2
    noise = torch.rand(count, dims, dims, generator=generator) - 0.5
    shapes = scale * (torch.eye(dims) + 0.25 * (noise + noise.mT))
    features = torch.rand(count, kernels.features, generator=generator) * 2 - 1
    return {"centers": kernels.centers, "shapes": shapes.flatten(1), "features": features}


def draw_points(kernels: Kernels, points: int, seed: int) -> Inputs:
    """Uniform points and their nearest kernels."""
    x = uniform_points(points, kernels.dims, seed + 2)
    return {"x": x, "neighbors": nearest(x, kernels.centers, kernels.neighbors)}


# ---- work ------------------------------------------------------------------------------------------------------------


def floor(kernels: Kernels, points: int, task: Pass) -> Floor:
    """Each neighbour's center, shape and features are looked up once, and where gradients of them are summed once more.

    A dense gradient of a table is written as a whole. Arithmetic: offset, quadratic form and its inverse, and for each
    feature a product, a sum and a sine of its product, counted as one each; as much again for each kind of derivative.
    """
    dims, neighbors, features, count = kernels.dims, kernels.neighbors, kernels.features, kernels.count
    rows = {"centers": 4 * dims, "shapes": 4 * dims * dims, "features": 4 * features}
    lookups = tuple((count * size, neighbors * (1 + (name in task.wrt))) for name, size in rows.items())
    memory = 4 * (dims + neighbors + features)
    if task.wrt:
        memory += 4 * features + sum(count * rows[name] for name in task.wrt if name in rows) / points
        memory += 4 * dims * ("x" in task.wrt)
    flops = neighbors * (2 * dims * dims + 2 * dims + 4 + 4 * features)
    return Floor(lookups, memory, flops * (1 + bool(task.wrt) + ("x" in task.wrt)))


def plain_pytorch_bytes(kernels: Kernels) -> int:
    """Per point, forward + backward of the eager provider: what it keeps for each neighbour, and gradients of it."""
    per_neighbor = 5 * kernels.features + 4 * kernels.dims**2 + 8 * kernels.dims
    return 4 * kernels.neighbors * per_neighbor


# ---- cases -----------------------------------------------------------------------------------------------------------


def _case(name: str, log2_points: int) -> Case:
    kernels, points = KERNELS[name], 1 << log2_points
    return Case(
        op="radial_basis",
        name=f"radial_basis/{name}/float32/n{log2_points}",
        points=points,
        facts={"dtype": "float32", "dims": kernels.dims, "neighbors": kernels.neighbors, "features": kernels.features}
        | {"kernels": kernels.count, "kind": "ivq", "shape": "full"},
        passes=PASSES,
        scratch=plain_pytorch_bytes(kernels),
        tolerances=TOLERANCES,
        tags=frozenset({"radial_basis", name} | {14: {"quick"}, 17: {"default", "gate"}}.get(log2_points, set())),
        options=kernels.options,
        make_parameters=functools.partial(draw_parameters, kernels),
        make_points=functools.partial(draw_points, kernels),
        floor=functools.partial(floor, kernels, points),
    )


def make() -> Iterator[Case]:
    for name in KERNELS:
        for log2_points in SIZES:
            yield _case(name, log2_points)
