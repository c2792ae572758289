# SPDX-License-Identifier: MIT
"""The CUDA kernels of the modulated MLP, executed by the simulator in tests/sim, compute what the definition says."""

from __future__ import annotations

import pytest
import torch

from camkernels import testing
from mlp_cases import stays_finite_inside
from sim import library, toolkit
from simulated import Simulated, network, production, shifted

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

OP = "modulated_mlp"
CASES = testing.cases(OP)
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


# ---- agreement with the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_layers_too_wide_for_shared_memory(sim: Simulated, dtype: torch.dtype) -> None:
    """Two tiles of 64 points and slabs of several columns; the rows of the forward pass are in global memory."""
    sim.agree(network(70, [5, 450, 270, 3], dtype, norm="point", skips=[0]), op=OP)


def test_a_width_of_352_leaves_shared_memory_for_one_pair_of_slabs(sim: Simulated) -> None:
    sim.agree(network(70, [5, 352, 352, 3], norm="point"), order=0, op=OP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 17, 32, 33, 40, 64, 65, 128, 129, 256])
def test_widths(sim: Simulated, width: int, dtype: torch.dtype) -> None:
    """Layers that end anywhere in a warp's 64 columns, and points that end anywhere in a tile."""
    for points, norm in [(1, "point"), (127, None), (129, "point")]:
        sim.agree(network(points, [3, width, width, 2], dtype, norm=norm), order=1, op=OP)


@pytest.mark.parametrize("features", [32, 33, 512])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_many_features(sim: Simulated, features: int, dtype: torch.dtype) -> None:
    """x in the weights' dtype, in front, in the middle and behind; read in words where those are whole."""
    call = network(40, [features, 24, 24, 3], dtype, skips=[0, 2], norm="point", output_layer=False)
    call.inputs["x"] = call.inputs["x"].to(dtype)
    sim.agree(call, order=1, op=OP)


@pytest.mark.parametrize("width", [24, 100, 200])
@pytest.mark.parametrize("output_layer", [False, True])
def test_a_norm_in_the_last_layer_and_a_way_back_at_once(sim: Simulated, width: int, output_layer: bool) -> None:
    call = network(70, [3, width, width], norm="point", groups=70, output_layer=output_layer)
    call.inputs["modulation"] = 1 + torch.rand(70, 2 - output_layer, 2)
    for schedule in library.SCHEDULES:
        with sim.library.schedule(schedule):
            sim.agree(call, order=1, op=OP)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize(("width", "points"), [(20, 3200), (72, 1100), (150, 600)])
def test_more_points_than_a_launch(sim: Simulated, width: int, points: int, channels: bool) -> None:
    """Sums over points and the gradient of modulation that crosses launches are those of all of them."""
    call = network(points, [3, width, 5], groups=2, channels=channels)
    sim.library.counters()
    sim.agree(call, order=1, op=OP)
    assert sim.library.counters()["launches"] == 2 + 1 + 2 * 3 + 1


@pytest.mark.parametrize("skips", [[], [0]])
def test_a_width_of_256_does_not_fit_into_the_shared_memory_of_sm_86(sim: Simulated, skips: list[int]) -> None:
    for sm, launches in ((80, 2), (86, 1)):
        with sim.library.architecture(sm):
            sim.library.counters()
            sim.agree(network(20, [5, 256, 256, 3], skips=skips), order=0, op=OP)
            assert sim.library.counters()["launches"] == launches


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_more_layers_than_arguments_hold_and_more_points_than_a_launch(
    sim: Simulated, dtype: torch.dtype, channels: bool
) -> None:
    """Groups of 90 points share their modulation, and one of them is computed in two launches."""
    widths = [3, *[26 if dtype == torch.float64 else 40] * 29, 2]
    call = network(270, widths, dtype, groups=3, channels=channels, norm="point")
    sim.library.counters()
    sim.agree(call, op=OP)
    assert sim.library.counters()["launches"] > 2 * 8


@pytest.mark.parametrize("groups", [270, 1])
def test_modulation_stored_as_weights(sim: Simulated, groups: int) -> None:
    sim.agree(network(270, [3, 40, 24, 2], torch.float16, groups=groups), op=OP)


@pytest.mark.parametrize("channels", [False, True])
def test_gradients_of_modulation_that_no_point_reads_are_zero(sim: Simulated, channels: bool) -> None:
    call = network(0, [3, 8, 8, 2])
    call.inputs["modulation"] = torch.rand(1, 2, 2, *[8] * channels)
    sim.agree(call, op=OP)


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single(sim: Simulated, n: int) -> None:
    sim.agree(network(n, [3, 8, 8, 2], torch.float32, groups=n), op=OP)


def test_misaligned_tensors(sim: Simulated) -> None:
    call = network(50, [3, 17, 2], torch.float32, groups=50)
    moved = {name: shifted(t) for name, t in call.inputs.items()}
    found = [testing.evaluate(sim.function(OP), testing.Call(i, call.options), order=2) for i in (call.inputs, moved)]
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_beyond_the_range_of_float16_stay_finite_inside(sim: Simulated, dtype: torch.dtype) -> None:
    stays_finite_inside(sim.function(OP), dtype)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_gradcheck_and_gradgradcheck(sim: Simulated, case: testing.Case) -> None:
    sim.check_numerically(case)


@pytest.mark.parametrize("wanted", ["x", "weights", "biases", "modulation"])
def test_one_gradient_alone_is_the_same(sim: Simulated, wanted: str) -> None:
    call = network(40, [3, 12, 12, 2], torch.float64, groups=40, skips=[1])
    results = []
    for name in (wanted, ""):
        inputs = {key: t.clone().requires_grad_(key.startswith(name)) for key, t in call.inputs.items()}
        some = [t for key, t in inputs.items() if key.startswith(wanted)]
        y = sim.function(OP)(**call.arguments(inputs))
        grads = torch.autograd.grad(y.square().sum(), some, create_graph=True)
        results.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), some)])
    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone, together)


def test_sums_do_not_depend_on_the_order(sim: Simulated) -> None:
    call = network(700, [3, 40, 24, 2], torch.float32, groups=1)
    found = []
    for schedule in library.SCHEDULES:
        with sim.library.schedule(schedule):
            found.append(testing.evaluate(sim.function(OP), call))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]) and torch.equal(tensor, found[2][name]), name
