# SPDX-License-Identifier: MIT
"""The CUDA kernels of modulate, executed by the simulator in tests/sim, compute what the definition says."""

from __future__ import annotations

import pytest
import torch

from camkernels import testing
from sim import library, toolkit
from simulated import Simulated, production, shifted
from test_modulation_broadcast import BROADCASTS, NORMS, SHAPE, draw

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

OP = "modulate"
CASES = testing.cases(OP)


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


def call_of(shape, gamma, beta, dtype=torch.float32, **options) -> testing.Call:
    tensors = {"h": shape, "gamma": gamma, "beta": beta}
    inputs = {name: draw(size, "cpu", dtype, seed) for seed, (name, size) in enumerate(tensors.items())}
    return testing.Call(inputs, {"activation": "tanh", "eps": 1e-2} | options, "h")


# ---- agreement with the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
def test_every_broadcast(sim: Simulated, shape: tuple[int, ...], norm: str | None) -> None:
    other = BROADCASTS[-1 - BROADCASTS.index(shape)]
    sim.agree(call_of(SHAPE, shape, other, torch.float64, norm=norm), op=OP)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["scalar", "column", "row", "full"])
def test_groups_that_a_block_takes(sim: Simulated, form: str, dtype: torch.dtype) -> None:
    """Frames of more numbers than a warp takes, and rows within rays that are as long."""
    frame = {"scalar": (2, 1, 1), "column": (1, 45), "row": (50, 1), "full": (2, 50, 45)}[form]
    sim.agree(call_of((1, 2, 50, 45), frame, (), dtype, norm="frame"), op=OP)
    ray = {"scalar": (3, 1, 1), "column": (300,), "row": (5, 1), "full": (3, 5, 300)}[form]
    sim.agree(call_of((3, 5, 300), (3, 5, 1), ray, dtype, norm="ray"), op=OP)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("norm", ["point", None])
def test_empty_and_single(sim: Simulated, n: int, norm: str | None) -> None:
    sim.agree(call_of((n, 8), (8,), (1, 1), norm=norm), op=OP)


def test_misaligned_tensors(sim: Simulated) -> None:
    call = call_of((50, 17), (50, 1), (17,), norm="point")
    moved = {name: shifted(t) for name, t in call.inputs.items()}
    found = [
        testing.evaluate(sim.function(OP), testing.Call(i, call.options, "h"), order=2) for i in (call.inputs, moved)
    ]
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_gradcheck_and_gradgradcheck(sim: Simulated, case: testing.Case) -> None:
    sim.check_numerically(case)


@pytest.mark.parametrize("wanted", ["h", "gamma", "beta"])
def test_one_gradient_alone_is_the_same(sim: Simulated, wanted: str) -> None:
    call = call_of((40, 12), (12,), (40, 1), torch.float64, norm="point")
    results = []
    for names in ((wanted,), tuple(call.inputs)):
        inputs = {name: t.clone().requires_grad_(name in names) for name, t in call.inputs.items()}
        y = sim.function(OP)(**call.arguments(inputs))
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[wanted], create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), inputs[wanted])])
    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone, together)


def test_sums_over_more_groups_than_pieces_do_not_depend_on_the_order(sim: Simulated) -> None:
    """Three scales, each of 3000 groups: pieces end within what shares one."""
    call = call_of((3, 3000, 4), (3, 1, 4), (1,), norm="point")
    sim.agree(call, op=OP)
    found = []
    for schedule in library.SCHEDULES:
        with sim.library.schedule(schedule):
            found.append(testing.evaluate(sim.function(OP), call))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]) and torch.equal(tensor, found[2][name]), name
