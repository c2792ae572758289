# SPDX-License-Identifier: MIT
"""coordinate_modulation on the Triton backend in Triton's interpreter: run by test_triton_interpreted.py, or alone with
TRITON_INTERPRET=1."""

import os

import pytest
import torch

import triton_interpreter
from camkernels import testing
from conftest import DTYPES, definition_of, function_of, require
from simulated import lookup_call
from test_operators import Recorder

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
triton_interpreter.repair()

OP = "coordinate_modulation"
CASES = testing.cases(OP)
TRITON, REFERENCE = function_of(OP, "triton"), definition_of(OP)
COMBINES = ("single", "plane_product")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case, dtype):
    testing.check(case, TRITON, REFERENCE, dtype=dtype, order=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_second_order_by_the_reference_formula(case, dtype):
    testing.check(case, TRITON, REFERENCE, dtype=dtype, order=2)


def gradients(function, call, mask="both"):
    inputs = require(call, mask)
    y = function(**inputs, **call.options)
    wanted = [t for t in inputs.values() if t.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), wanted)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [None, 5, 8])
@pytest.mark.parametrize("n", [0, 1, 300])
def test_any_number_of_points_and_tiles(n, channels):
    call = lookup_call(n, [5, 6], channels=channels)
    assert_same(gradients(TRITON, call), gradients(REFERENCE, call))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("mask", ["points", "parameters"])
def test_one_gradient_alone(mask, combine):
    call = lookup_call(20, [5, 6], combine=combine)
    assert_same(gradients(TRITON, call, mask), gradients(REFERENCE, call, mask))


def test_coordinates_wider_than_the_grids():
    call = CASES[0].make(torch.bfloat16)
    call.inputs["coords"] = CASES[0].make(torch.float64).inputs["coords"]
    testing.compare(CASES[0], call, *(testing.evaluate(f, call, order=2) for f in (TRITON, REFERENCE)))


def test_compiled():
    call = lookup_call(20, [5, 6])

    def loss(coords, grids):
        return TRITON(coords, grids, **call.options).square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = require(call, "both").values()
        results.append(torch.autograd.grad(function(*inputs), list(inputs)))
    assert_same(*results)


def test_functorch():
    coords, grids = lookup_call(6, [5, 6]).inputs.values()

    def transformed(f):
        yield torch.func.vmap(f, (0, None))(coords, grids)
        yield from torch.func.grad(lambda u, t: f(u, t).square().sum(), argnums=(0, 1))(coords, grids)
        yield torch.func.vmap(torch.func.jacrev(f), (0, None))(coords, grids)
        slope = torch.func.grad(lambda u: f(u, grids).square().sum())
        yield torch.func.grad(lambda u: slope(u).square().sum())(coords)

    assert_same(list(transformed(TRITON)), list(transformed(REFERENCE)))


def test_opcheck():
    call = lookup_call(20, [5, 6], channels=2)
    with Recorder() as recorder:
        testing.evaluate(TRITON, call, order=2)
    assert len(recorder.calls) == 3
    for operator, arguments in recorder.calls.items():
        assert operator._schema.name.startswith("camkernels::triton_coordinate_modulation")
        torch.library.opcheck(operator, arguments[0])


def test_deterministic_algorithms():
    call = lookup_call(20, [5, 6])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(TRITON, call, "points"), gradients(TRITON, call, "points")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match=r"coordinate_modulation_backward .* does not have a deterministic"):
            gradients(TRITON, call, "parameters")
    finally:
        torch.use_deterministic_algorithms(False)
