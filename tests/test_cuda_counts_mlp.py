# SPDX-License-Identifier: MIT
"""Products, loads, stores and atomics of the modulated MLP's CUDA kernels are as many as csrc/cuda/README.md states.

Counted while the simulator in tests/sim executes the kernels; no GPU takes part.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil

import pytest
import torch

from camkernels import testing
from sim import toolkit
from simulated import Simulated, network, production

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

TILE, GROUP, DEPTH = 64, 64, 32  # points of a block, columns of 4 warps, columns of a slab
NETWORKS = {"instant-ngp": [32, 64, 64, 16], "odd": [3, 40, 20, 2], "wide": [5, 130, 70, 3]}
TERMS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


def layers(widths: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(widths))


def products(columns: int, depth: int) -> int:
    """Tiles of 16 x 8 and steps of 8 that 4 warps take for 64 rows."""
    return 4 * ceil(columns / 8) * ceil(depth / DEPTH) * (DEPTH // 8)


def passes(width: int, widths: list[int]) -> int:
    """How often a block goes over what it multiplies: once per 64 columns, or per 128 where a layer is wider."""
    return ceil(width / (2 * GROUP if max(widths[1:]) > GROUP else GROUP))


def counted(sim: Simulated, call: testing.Call, *, gradients: bool) -> dict[str, int]:
    inputs = {name: t.clone().requires_grad_(gradients) for name, t in call.inputs.items()}
    sim.library.counters()
    y = sim.function("modulated_mlp")(**call.arguments(inputs))
    if gradients:
        sim.library.counters()
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return sim.library.counters()


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", TERMS, ids=str)
@pytest.mark.parametrize("widths", NETWORKS.values(), ids=NETWORKS)
def test_value(sim: Simulated, widths: list[int], dtype: torch.dtype, sm: int) -> None:
    """Every weight is loaded once per 64 points, and x once per pass of its layer; nothing is added atomically."""
    tiles = 2
    with sim.library.architecture(sm):
        found = counted(sim, network(tiles * TILE, widths, dtype), gradients=False)
    assert found["launches"] == 1 and found["blocks"] == tiles
    assert found["matrix_products"] == tiles * 32 * TERMS[dtype] * sum(products(o, i) for i, o in layers(widths))
    weights, biases = sum(o * i for i, o in layers(widths)), sum(widths[1:])
    points = TILE * widths[0] * passes(widths[1], widths)
    assert found["loads"] == tiles * (weights + points + TILE * biases)
    assert found["stores"] == tiles * TILE * widths[-1]
    assert found["bytes_stored"] == found["stores"] * dtype.itemsize
    assert found["atomics"] == found["vector_reductions"] == 0


@pytest.mark.parametrize("dtype", TERMS, ids=str)
@pytest.mark.parametrize("widths", NETWORKS.values(), ids=NETWORKS)
def test_gradients(sim: Simulated, widths: list[int], dtype: torch.dtype) -> None:
    """Three products instead of one: the values anew, the gradients of the points, and those of the weights."""
    tiles = 2
    found = counted(sim, network(tiles * TILE, widths, dtype), gradients=True)
    assert found["launches"] == 3
    once = TERMS[dtype] * sum(products(o, i) + products(i, o) for i, o in layers(widths))
    sums = 3 * sum(ceil(o / TILE) * products(i, tiles * TILE) for i, o in layers(widths))
    assert found["matrix_products"] == 32 * (tiles * once + sums)
    assert found["atomics"] == found["vector_reductions"] == 0


def test_float64_leaves_the_tensor_cores_alone(sim: Simulated) -> None:
    assert counted(sim, network(TILE, NETWORKS["odd"], torch.float64), gradients=True)["matrix_products"] == 0
