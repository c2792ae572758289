# SPDX-License-Identifier: MIT
"""Loads, stores and sums of coordinate_modulation's CUDA kernels are as many as csrc/cuda/README.md states.

Counted while the simulator in tests/sim executes the kernels; no GPU takes part.
"""

from __future__ import annotations

from math import prod

import pytest
import torch

from camkernels import testing
from sim import toolkit
from simulated import Simulated, lookup_call, production

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

POINTS, NUMBERS = 256, 4  # float32 numbers in a word of 16 bytes
NODES_PER_BLOCK = 128  # of a word that are packed together
SHAPES = [(nodes, channels) for nodes in ([9], [5, 6], [3, 4, 5]) for channels in (2, 6)]


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


def inner(nodes: list[int], channels: int, dtype: torch.dtype = torch.float32) -> testing.Call:
    """Points that lie among the nodes, so that all corners exist, and rows of whole words."""
    call = lookup_call(POINTS, nodes, dtype, channels=channels, layers=2)
    call.inputs["coords"] /= 1.3
    return call


def words(channels: int) -> int:
    """Of a node: 2 layers, gamma and beta."""
    return 2 * 2 * channels // NUMBERS


def lanes(channels: int) -> int:
    return 1 << (words(channels).bit_length() - 1)


def packing(nodes: list[int], channels: int) -> int:
    """Loads: every number of the grids once."""
    return prod(nodes) * words(channels) * NUMBERS


def gradient(sim: Simulated, call: testing.Call, name: str) -> dict[str, int]:
    inputs = {key: t.clone().requires_grad_(key == name) for key, t in call.inputs.items()}
    y = sim.function("coordinate_modulation")(**inputs, **call.options)
    sim.library.counters()
    torch.autograd.grad(y, inputs[name], torch.ones_like(y))
    return sim.library.counters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("nodes", "channels"), SHAPES)
def test_value(sim: Simulated, nodes: list[int], channels: int, dtype: torch.dtype) -> None:
    """2^D rows in words of 16 bytes; each lane of a point reads its coordinates; results in whole words."""
    call = inner(nodes, channels, dtype)
    sim.library.counters()
    with torch.no_grad():
        call.run(sim.function("coordinate_modulation"))
    found = sim.library.counters()
    assert found["launches"] == 2
    rows = 2 ** len(nodes) * words(channels)
    expected = POINTS * (rows + len(nodes) * lanes(channels))
    assert found["loads"] == packing(nodes, channels) + expected
    assert found["stores"] == POINTS * words(channels)
    assert found["bytes_stored"] == POINTS * words(channels) * NUMBERS * dtype.itemsize
    assert found["atomics"] == found["vector_reductions"] == 0


@pytest.mark.parametrize(("nodes", "channels"), SHAPES)
def test_gradient_of_the_grids(sim: Simulated, nodes: list[int], channels: int) -> None:
    """2^D sums of a word for each word of a row; the grids themselves are not read."""
    call = inner(nodes, channels)
    found = gradient(sim, call, "grids")
    sums = POINTS * 2 ** len(nodes) * words(channels)
    assert (found["vector_reductions"], found["atomics"]) == (sums, 0)
    unpacking = prod(nodes) * words(channels)
    assert found["loads"] == POINTS * (words(channels) + len(nodes) * lanes(channels)) + unpacking
    with sim.library.architecture(80):
        before = gradient(sim, call, "grids")
    assert (before["vector_reductions"], before["atomics"]) == (0, NUMBERS * sums)


@pytest.mark.parametrize(("nodes", "channels"), SHAPES)
def test_gradient_of_the_coordinates(sim: Simulated, nodes: list[int], channels: int) -> None:
    """Rows are read once; lanes add up what they found by shuffles, and nothing is added atomically."""
    found = gradient(sim, inner(nodes, channels), "coords")
    rows = 2 ** len(nodes) * words(channels)
    read = POINTS * (rows + words(channels) + len(nodes) * lanes(channels))
    assert found["loads"] == packing(nodes, channels) + read
    assert found["atomics"] == found["vector_reductions"] == 0
    threads = POINTS * lanes(channels)
    assert found["threads"] == threads + NODES_PER_BLOCK * words(channels)
    assert found["warp_operations"] == threads * len(nodes) * (lanes(channels).bit_length() - 1)
