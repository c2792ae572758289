# SPDX-License-Identifier: MIT
"""Loads, stores and sums of radial_basis' CUDA kernels are as many as csrc/cuda/README.md states.

Counted while the simulator in tests/sim executes the kernels; no GPU takes part.
"""

from __future__ import annotations

import pytest
import torch

from camkernels import testing
from sim import toolkit
from simulated import Simulated, basis, production

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

POINTS, KERNELS = 128, 50
SIZES = [(2, 4, 32), (3, 8, 32), (2, 10, 64)]  # axes, kernels of a point, features: no more kernels than lanes


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


def call_of(dims: int, per_point: int, features: int) -> testing.Call:
    return basis(POINTS, KERNELS, per_point, features=features, dims=dims, keep=0)


def words(features: int) -> int:
    """Of a row, float32: each has a lane."""
    return features // 4


def common(dims: int, per_point: int, features: int) -> int:
    """Loads of a point before any row of features: coordinates, neighbours, kernels, rates and phases."""
    return dims * words(features) + 2 * per_point + per_point * 2 * dims + 2 * features


def count(sim: Simulated, call: testing.Call, *wanted: str) -> dict[str, int]:
    """What the value, or the gradients in these tensors, take for a point."""
    inputs = {name: t.clone().requires_grad_(name in wanted) for name, t in call.inputs.items()}
    sim.library.counters()
    y = sim.function("radial_basis")(**call.arguments(inputs))
    if wanted:
        sim.library.counters()
        torch.autograd.grad(y, [inputs[name] for name in wanted], torch.ones_like(y))
    return {name: number / POINTS for name, number in sim.library.counters().items()}


@pytest.mark.parametrize(("dims", "per_point", "features"), SIZES)
def test_a_value_reads_each_row_once(sim: Simulated, dims: int, per_point: int, features: int) -> None:
    found = count(sim, call_of(dims, per_point, features))
    rows = per_point * words(features)
    assert found["loads"] == common(dims, per_point, features) + rows
    assert found["bytes_loaded"] == 4 * common(dims, per_point, features) + 16 * rows
    assert found["stores"] == words(features) and found["atomics"] == found["barriers"] == 0


@pytest.mark.parametrize(("dims", "per_point", "features"), SIZES)
def test_the_gradient_in_features_reads_none(sim: Simulated, dims: int, per_point: int, features: int) -> None:
    found = count(sim, call_of(dims, per_point, features), "features")
    assert found["loads"] == common(dims, per_point, features) + words(features)
    assert found["vector_reductions"] == per_point * words(features) and found["atomics"] == 0


@pytest.mark.parametrize(("dims", "per_point", "features"), SIZES)
def test_all_gradients_read_each_row_once(sim: Simulated, dims: int, per_point: int, features: int) -> None:
    """Shapes are diagonal: of two axes, neither of centers nor of shapes is there more than a vector."""
    found = count(sim, call_of(dims, per_point, features), "x", "centers", "shapes", "features")
    assert found["loads"] == common(dims, per_point, features) + words(features) + per_point * words(features)
    vectors = per_point * words(features) + (per_point if dims == 2 else 0)
    numbers = per_point * dims if dims == 2 else per_point * 2 * dims
    assert (found["vector_reductions"], found["atomics"]) == (vectors, numbers)


def test_sums_on_sm_80_are_numbers(sim: Simulated) -> None:
    with sim.library.architecture(80):
        found = count(sim, call_of(2, 4, 32), "features")
    assert found["vector_reductions"] == 0 and found["atomics"] == 4 * 32
