# SPDX-License-Identifier: MIT
"""The CUDA kernels of coordinate_modulation, executed by the simulator, compute what the definition says."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from camkernels import testing
from conftest import deterministic
from sim import library, toolkit
from simulated import Simulated, lookup_call, production, shifted

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

OP = "coordinate_modulation"
CASES = testing.cases(OP)


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


# ---- agreement with the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_with_deterministic_sums(sim: Simulated, case: testing.Case) -> None:
    with deterministic():
        sim.check(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [None, 5, 16, 37])
def test_many_points_and_numbers(sim: Simulated, channels: int | None, dtype: torch.dtype) -> None:
    """Points of one lane to 32, rows of several words per lane, whole and not; several blocks, the last one partial."""
    sim.agree(lookup_call(333, [5, 6], dtype, channels=channels), op=OP)


def test_coordinates_wider_than_the_grids(sim: Simulated) -> None:
    call = lookup_call(50, [5, 6], torch.float16)
    call.inputs["coords"] = call.inputs["coords"].double()
    sim.agree(call, op=OP)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("context", [nullcontext, deterministic])
def test_empty_and_single(sim: Simulated, context, n: int) -> None:
    with context():
        sim.agree(lookup_call(n, [3, 4]), op=OP)


def test_misaligned_tensors(sim: Simulated) -> None:
    call = lookup_call(50, [5, 6])
    moved = {name: shifted(t) for name, t in call.inputs.items()}
    found = [testing.evaluate(sim.function(OP), replace(call, inputs=i), order=2) for i in (call.inputs, moved)]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], msg=name)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_gradcheck_and_gradgradcheck(sim: Simulated, case: testing.Case) -> None:
    sim.check_numerically(case)


@pytest.mark.parametrize("combine", ["single", "plane_product"])
@pytest.mark.parametrize("wanted", ["coords", "grids"])
def test_one_gradient_alone_is_the_same(sim: Simulated, wanted: str, combine: str) -> None:
    call = lookup_call(40, [5, 6], torch.float64, combine=combine)
    results = []
    for names in ([wanted], list(call.inputs)):
        inputs = {key: t.clone().requires_grad_(key in names) for key, t in call.inputs.items()}
        y = sim.function(OP)(**call.arguments(inputs))
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[wanted], create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), inputs[wanted])])
    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone, together)


# ---- sums ------------------------------------------------------------------------------------------------------------


def gradients(sim: Simulated, call: testing.Call, schedule: str) -> dict[str, torch.Tensor]:
    with sim.library.schedule(schedule):
        return testing.evaluate(sim.function(OP), call, order=2)


@pytest.mark.parametrize("combine", ["single", "plane_product"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_deterministic_sums_do_not_depend_on_the_order(sim: Simulated, dtype: torch.dtype, combine: str) -> None:
    call = lookup_call(400, [3, 4], dtype, combine=combine)
    fast = [gradients(sim, call, schedule) for schedule in library.SCHEDULES[:2]]
    with deterministic():
        same = [gradients(sim, call, schedule) for schedule in library.SCHEDULES]
    for name, tensor in same[0].items():
        assert torch.equal(tensor, same[1][name]) and torch.equal(tensor, same[2][name]), name
    if dtype == torch.float32:
        assert not torch.equal(fast[0]["grad.grids"], fast[1]["grad.grids"])  # the schedules do differ
    rtol, atol = testing.tolerance(dtype, "grad.parameters")
    testing.assert_close(same[0]["grad.grids"], fast[0]["grad.grids"], rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_deterministic_sums_keep_infinities_and_nan(sim: Simulated, dtype: torch.dtype) -> None:
    call = lookup_call(60, [3, 4], dtype)
    results = []
    for context in (nullcontext, deterministic):
        with context():
            grids = call.inputs["grids"].clone().requires_grad_()
            y = sim.function(OP)(call.inputs["coords"], grids)
            ct = torch.ones_like(y)
            ct[3, 0, 0], ct[7, 1, 1] = torch.inf, torch.nan
            results.append(torch.autograd.grad(y, grids, ct)[0])
    assert results[0].isinf().any() and results[0].isnan().any()
    torch.testing.assert_close(*results, equal_nan=True)
