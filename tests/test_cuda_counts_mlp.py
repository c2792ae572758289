# SPDX-License-Identifier: MIT
"""Products, copies, loads, stores, atomics of the modulated MLP's CUDA kernels are as many as csrc/cuda/README.md says.

Counted while the simulator in tests/sim executes the kernels; no GPU takes part.
"""

from __future__ import annotations

from itertools import pairwise
from math import ceil
from typing import NamedTuple

import pytest
import torch

from camkernels import testing
from sim import toolkit
from simulated import Simulated, network, production

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALF)
EITHER = pytest.mark.parametrize("tf32", [False, True], ids=["exact", "tf32"])


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


def counted(sim: Simulated, call: testing.Call, *, gradients: bool, tf32: bool = False) -> dict[str, int]:
    inputs = {name: t.clone().requires_grad_(gradients) for name, t in call.inputs.items()}
    sim.library.counters()
    with testing.tf32(tf32):
        y = sim.function("modulated_mlp")(**call.arguments(inputs))
    if gradients:
        sim.library.counters()
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    return sim.library.counters()


# ---- layers of up to 256 columns -------------------------------------------------------------------------------------

NETWORKS = {"instant-ngp": [32, 64, 64, 16], "odd": [3, 40, 20, 2], "wide": [5, 130, 70, 3], "long": [70, 100, 90]}
STEP, WARP_ROWS, SUM_TILE, SUM_DEPTH = 16, 32, 64, 32
# Of 32 points, 16 inputs and 16 outputs: products of 16 x 8 x 8, in bfloat16 of 16 x 8 x 16; under TF32.
PRODUCTS = {torch.float32: 24, torch.float16: 16, torch.bfloat16: 12}
TF32_PRODUCTS = 8


class Layer(NamedTuple):
    """Inputs from the layer before, from x; outputs."""

    own: int
    x: int
    out: int

    def forward(self) -> int:
        """Steps of 16 inputs, for tiles of 16 outputs."""
        return (ceil(self.own / STEP) + ceil(self.x / STEP)) * ceil(self.out / STEP)

    def back(self, columns: int) -> int:
        """Steps of 16 outputs, for tiles of 16 inputs; those of x in parts as wide as a block."""
        widths = [self.own, *(min(columns, self.x - first) for first in range(0, self.x, columns))]
        return ceil(self.out / STEP) * sum(ceil(width / STEP) for width in widths)

    def sums(self, products: int) -> int:
        """Products of a slab of 32 points: so many for every 32 x 8 sums, 32 x 64 at a time."""
        return products * 8 * ceil(self.out / 32) * (ceil(self.own / SUM_TILE) + ceil(self.x / SUM_TILE))


def layers(widths: list[int]) -> list[Layer]:
    """With x again behind the first layer."""
    return [Layer(fan_in * (i > 0), widths[0] * (i < 2), out) for i, (fan_in, out) in enumerate(pairwise(widths))]


def columns(widths: list[int]) -> int:
    return next(size for size in (64, 128, 256) if max(widths[1:]) <= size)


def tile(widths: list[int]) -> int:
    """Points of a block."""
    return 128 if columns(widths) == 64 else 64


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", NETWORKS.values(), ids=NETWORKS)
def test_value(sim: Simulated, widths: list[int], dtype: torch.dtype, tf32: bool) -> None:
    """Every tile multiplies whole steps, and copies the packed weights once; x in words of 16 bytes if it has them."""
    tiles, points, network_layers = 2, tile(widths), layers(widths)
    found = counted(sim, network(tiles * points, widths, dtype, skips=[0]), gradients=False, tf32=tf32)
    assert found["launches"] == 2 and found["blocks"] == 16 * len(network_layers) + tiles
    steps = sum(layer.forward() for layer in network_layers)
    products = TF32_PRODUCTS if tf32 else PRODUCTS[dtype]
    assert found["matrix_products"] == 32 * tiles * points // WARP_ROWS * products * steps
    words = steps * STEP * STEP * (2 if dtype == torch.bfloat16 and not tf32 else 4) // 16
    x_steps = sum(ceil(layer.x / STEP) for layer in network_layers)
    if widths[0] % 4 == 0:
        words += 4 * x_steps * points
    assert found["asynchronous_copies"] == tiles * words
    assert found["stores"] == tiles * points * widths[-1]
    assert found["bytes_stored"] == found["stores"] * dtype.itemsize
    assert found["atomics"] == found["vector_reductions"] == 0


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", NETWORKS.values(), ids=NETWORKS)
def test_gradients(sim: Simulated, widths: list[int], dtype: torch.dtype, tf32: bool) -> None:
    """Three products instead of one: the values anew, the gradients of the points, and those of the weights."""
    tiles, points, network_layers = 2, tile(widths), layers(widths)
    found = counted(sim, network(tiles * points, widths, dtype, skips=[0]), gradients=True, tf32=tf32)
    assert found["launches"] == 4
    steps = sum(layer.forward() + layer.back(columns(widths)) for layer in network_layers)
    sums = sum(layer.sums(8 if tf32 else 24) for layer in network_layers) * points // SUM_DEPTH
    products = TF32_PRODUCTS if tf32 else PRODUCTS[dtype]
    assert found["matrix_products"] == 32 * tiles * (points // WARP_ROWS * products * steps + sums)
    parameters = sum((layer.own + layer.x + 1) * layer.out for layer in network_layers)
    assert found["bytes_stored"] == parameters * dtype.itemsize + 4 * tiles * points * widths[0]
    assert found["atomics"] == found["vector_reductions"] == 0


# ---- wider layers, and float64 ---------------------------------------------------------------------------------------

WIDE = [5, 300, 70, 3]
TILE, GROUP, DEPTH = 64, 64, 32  # points of a block, columns of 4 warps, columns of a slab
TERMS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 2}


def products(columns: int, depth: int) -> int:
    """Tiles of 16 x 8 and steps of 8 that 4 warps take for 64 rows."""
    return 4 * ceil(columns / 8) * ceil(depth / DEPTH) * (DEPTH // 8)


@EITHER
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_of_wider_layers(sim: Simulated, dtype: torch.dtype, sm: int, tf32: bool) -> None:
    """Every weight is loaded once per 64 points, and x once per 128 columns; nothing is added atomically."""
    tiles, pairs = 2, list(pairwise(WIDE))
    with sim.library.architecture(sm):
        found = counted(sim, network(tiles * TILE, WIDE, dtype), gradients=False, tf32=tf32)
    assert found["launches"] == 1 and found["blocks"] == tiles
    terms = 1 if tf32 else TERMS[dtype]
    assert found["matrix_products"] == tiles * 32 * terms * sum(products(o, i) for i, o in pairs)
    weights, biases = sum(o * i for i, o in pairs), sum(WIDE[1:])
    points = TILE * WIDE[0] * ceil(WIDE[1] / (2 * GROUP))
    assert found["loads"] == tiles * (weights + points + TILE * biases)
    assert found["stores"] == tiles * TILE * WIDE[-1]
    assert found["bytes_stored"] == found["stores"] * dtype.itemsize
    assert found["atomics"] == found["vector_reductions"] == 0


@EITHER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_wider_layers(sim: Simulated, dtype: torch.dtype, tf32: bool) -> None:
    tiles, pairs = 2, list(pairwise(WIDE))
    found = counted(sim, network(tiles * TILE, WIDE, dtype), gradients=True, tf32=tf32)
    assert found["launches"] == 3
    terms, sum_terms = (1, 1) if tf32 else (TERMS[dtype], 3)
    once = terms * sum(products(o, i) + products(i, o) for i, o in pairs)
    sums = sum_terms * sum(ceil(o / TILE) * products(i, tiles * TILE) for i, o in pairs)
    assert found["matrix_products"] == 32 * (tiles * once + sums)
    assert found["atomics"] == found["vector_reductions"] == 0


def test_float64_leaves_the_tensor_cores_alone(sim: Simulated) -> None:
    assert counted(sim, network(TILE, [3, 40, 20, 2], torch.float64), gradients=True)["matrix_products"] == 0
