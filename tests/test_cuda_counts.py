# SPDX-License-Identifier: MIT
"""Loads, sectors, stores and atomics of the hash grid's CUDA kernels are as many as csrc/cuda/README.md states.

Counted while the simulator in tests/sim executes the kernels; no GPU takes part.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import camkernels
from camkernels import testing
from sim import toolkit
from simulated import Simulated, production

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

LEVELS = 4
POINTS = 4096  # whole tiles, and enough of them for threads to take all the levels that fill a sector
WORD, SECTOR = 16, 32
ABOUT = 0.03  # half of the pairs are aligned: among 4 * 4096 * 2^(D-1) of them to within five standard deviations
SHAPES = [(dims, features) for dims in (2, 3, 4) for features in (1, 2, 4)]


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


def fine_call(dims: int, features: int, dtype: torch.dtype = torch.float32) -> testing.Call:
    """Hashed levels alone, too large to be summed in shared memory; random points."""
    geometry = camkernels.GridGeometry.build(dims, LEVELS, features, 15, base_resolution=256, finest_resolution=1024)
    assert all(geometry.hashed)
    x = torch.rand(POINTS, dims, generator=torch.Generator().manual_seed(dims))
    return testing.Call({"x": x, "table": torch.rand(geometry.n_entries, features).to(dtype)}, {"geometry": geometry})


def forward(sim: Simulated, call: testing.Call) -> dict[str, float]:
    """Counters per point and level of a forward, the loads of coordinates left out."""
    sim.library.counters()
    sim.hash_grid(call.inputs["x"], call.inputs["table"], call.options["geometry"])
    found = sim.library.counters()
    dims = call.inputs["x"].shape[1]
    found["loads"] -= found["threads"] * dims
    found["bytes_loaded"] -= found["threads"] * dims * 4
    begins_and_ends = torch.arange(POINTS)[:, None] * dims * 4 + torch.tensor([0, dims * 4 - 1])
    sectors = 1 + (begins_and_ends // SECTOR).diff().double().mean()  # of a point's coordinates
    found["sectors_loaded"] -= found["threads"] * sectors.item()
    return {name: count / (POINTS * LEVELS) for name, count in found.items()}


def gradient(sim: Simulated, call: testing.Call, name: str) -> dict[str, float]:
    """Counters per point and level of the gradient in one input."""
    inputs = dict(call.inputs)
    inputs[name] = wanted = inputs[name].clone().requires_grad_()
    y: Tensor = sim.hash_grid(inputs["x"], inputs["table"], call.options["geometry"])
    sim.library.counters()
    torch.autograd.grad(y.sum(), wanted)
    levels = call.options["geometry"].n_levels
    return {name: count / (len(inputs["x"]) * levels) for name, count in sim.library.counters().items()}


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("dims", "features"), SHAPES)
def test_loads_of_the_value(sim: Simulated, dims: int, features: int, dtype: torch.dtype, sm: int) -> None:
    """F <= 2: 2^(D-1) loads of two rows and half as many of one; else 2^D of one row."""
    with sim.library.architecture(sm):
        found = forward(sim, fine_call(dims, features, dtype))
    row, corners = features * dtype.itemsize, 2**dims
    wide, narrow = (corners / 2, corners / 4) if features <= 2 else (0, corners)
    assert found["loads"] == pytest.approx(wide + narrow, rel=ABOUT)
    assert found["bytes_loaded"] == pytest.approx(wide * 2 * row + narrow * row, rel=ABOUT)
    if features > 2:
        assert found["loads"] == corners
    assert found["atomics"] == found["vector_reductions"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("dims", "features"), SHAPES)
def test_sectors_of_the_value(sim: Simulated, dims: int, features: int, dtype: torch.dtype) -> None:
    """No more than random points touch: neighbours along the first axis share one unless they lie across its border."""
    found = forward(sim, fine_call(dims, features, dtype))
    across = features * dtype.itemsize / SECTOR  # of neighbouring rows
    assert found["sectors_loaded"] == pytest.approx(2 ** (dims - 1) * (1 + across), rel=ABOUT)


def test_loads_of_three_axes_and_two_features(sim: Simulated) -> None:
    """The column of the table in README.md: exactly 4 loads of 16 bytes, and about 2 of 8: 80 bytes, 5 sectors."""
    found = forward(sim, fine_call(3, 2))
    narrow = (found["loads"] - 4, (found["bytes_loaded"] - 4 * 16) / 8)
    assert narrow[0] == narrow[1] == pytest.approx(2, rel=2 * ABOUT)
    assert found["bytes_loaded"] == pytest.approx(80, rel=ABOUT)
    assert found["sectors_loaded"] == pytest.approx(5, rel=ABOUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("dims", "features"), SHAPES)
def test_stores_of_the_value(sim: Simulated, dims: int, features: int, dtype: torch.dtype) -> None:
    """s F bytes: in words of 16 where four levels are whole words, else row by row."""
    found = forward(sim, fine_call(dims, features, dtype))
    row = features * dtype.itemsize
    assert found["bytes_stored"] == row
    assert found["stores"] == row / min(WORD, LEVELS * row if LEVELS * row % WORD == 0 else row)


@pytest.mark.parametrize(("dims", "features"), SHAPES)
def test_sums_of_the_table_gradient(sim: Simulated, dims: int, features: int) -> None:
    """A pair of corners is added at once where it is one vector, half of the time; a single number is no vector."""
    corners = 2**dims
    vectors, scalars = {1: (corners / 4, corners / 2), 2: (corners * 3 / 4, 0), 4: (corners, 0)}[features]
    found = gradient(sim, fine_call(dims, features), "table")
    assert found["vector_reductions"] == pytest.approx(vectors, rel=ABOUT)
    assert found["atomics"] == pytest.approx(scalars, rel=ABOUT)
    with sim.library.architecture(80):
        before = gradient(sim, fine_call(dims, features), "table")
    assert before["vector_reductions"] == 0 and before["atomics"] == features * corners


@pytest.mark.parametrize("sm", [80, 90])
def test_coarse_levels_are_summed_in_shared_memory(sim: Simulated, sm: int) -> None:
    geometry = camkernels.GridGeometry.build(2, 1, 2, 15, base_resolution=8)
    call = testing.Call({"x": torch.rand(4000, 2), "table": torch.rand(geometry.n_entries, 2)}, {"geometry": geometry})
    with sim.library.architecture(sm):
        found = gradient(sim, call, "table")
    assert found["vector_reductions"] < 0.3  # 4 corners in global memory otherwise
    assert found["barriers"] > 0


@pytest.mark.parametrize("sm", [80, 90])
def test_coordinates_need_no_atomics(sim: Simulated, sm: int) -> None:
    with sim.library.architecture(sm):
        found = gradient(sim, fine_call(3, 2), "x")
    assert found["threads"] > 0
    assert found["atomics"] == found["vector_reductions"] == 0
