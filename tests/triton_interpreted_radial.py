# SPDX-License-Identifier: MIT
"""radial_basis on the Triton backend in Triton's interpreter: run by test_triton_interpreted.py, or alone with
TRITON_INTERPRET=1. The registered cases are in triton_interpreted.py."""

import os

import pytest
import torch

import test_radial_kernels as shared
import triton_interpreter
from camkernels import testing
from camkernels.reference.radial_basis import ROOTED
from camkernels.triton import radial_basis as kernels
from conftest import definition_of, function_of
from test_operators import Recorder

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
triton_interpreter.repair()

TRITON, REFERENCE = function_of("radial_basis", "triton"), definition_of("radial_basis")
# (points, kernels, kernels of a point): one block of a point's kernels, several, blocks of all kernels
SIZES = [(70, 9, 4), (5, 90, 70), (40, 21, None)]


def gradients(function, call, *wanted):
    inputs = {name: t.detach().clone().requires_grad_(name in wanted) for name, t in call.inputs.items()}
    y = function(**call.arguments(inputs))
    return y.detach(), *torch.autograd.grad(y.square().sum(), [inputs[name] for name in wanted])


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_several_programs_and_blocks_of_kernels_and_features(sizes):
    call = shared.call_of(*sizes)
    assert_same(gradients(TRITON, call, *call.inputs), gradients(REFERENCE, call, *call.inputs))


@pytest.mark.parametrize("name", ["x", "centers", "shapes", "features", "phase"])
def test_one_gradient_alone(name):
    for sizes in SIZES[::2]:
        call = shared.call_of(*sizes)
        assert_same(gradients(TRITON, call, name), gradients(REFERENCE, call, name))


@pytest.mark.parametrize("sizes", [(0, 5, 3), (1, 1, 1), (0, 5, None)], ids=str)
def test_no_point_and_one(sizes):
    call = shared.call_of(*sizes)
    call.inputs["x"] = shared.rand(sizes[0], 2)  # none that is lost
    assert_same(gradients(TRITON, call, *call.inputs), gradients(REFERENCE, call, *call.inputs))


@pytest.mark.parametrize("kind", ROOTED)
def test_derivatives_are_zero_where_the_root_is_singular(kind):
    """At a centre, of a shape that is 0, and off the centre of one with both signs."""
    inputs = {
        "x": torch.tensor([[0.0, 0.0], [0.5, 0.25], [1.0, 1.0]]),
        "centers": torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]),
        "shapes": torch.tensor([[2.0, 0.5, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, -1.0]]),
        "features": torch.eye(3),
    }
    options = {"neighbors": torch.arange(3).unsqueeze(-1), "kind": kind, "shape": "symmetric", "normalize": False}
    call = testing.Call({name: t.double() for name, t in inputs.items()}, options)
    y, *found = gradients(TRITON, call, "x", "centers", "shapes")
    assert_same([y], [call.run(REFERENCE)])
    assert not any(g.any() for g in found)


@pytest.mark.parametrize("largest", [1e3, 9.9e5, 1e8, 1e30])
def test_phases_of_any_size_keep_the_digits_of_float32(monkeypatch, largest):
    monkeypatch.setattr(kernels, "WORD_BYTES", 1 << 13)
    shared.test_phases_of_any_size_keep_the_digits_of_float32(largest, torch.float32, "triton")


@pytest.mark.parametrize("wrong", [-1, 9, 2**32])
def test_a_neighbour_that_names_no_kernel_makes_its_point_nan(wrong):
    shared.test_a_neighbour_that_names_no_kernel_makes_its_point_nan_where_values_cannot_be_looked_at(wrong, "triton")


@pytest.mark.parametrize("launches", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_deterministic_algorithms(monkeypatch, sizes, launches):
    """What is added to a kernel lies in memory first, in one launch or several, and is added up in order."""
    call = shared.call_of(*sizes)
    expected = gradients(REFERENCE, call, *call.inputs)
    if launches > 1:
        monkeypatch.setattr(kernels, "ORDERED_NUMBERS", 1)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients(TRITON, call, *call.inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(first, expected)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, second, strict=True))


def test_no_two_programs_add_to_one_row_where_the_order_counts(monkeypatch):
    call = shared.call_of(40, 21, None)
    seen = []
    monkeypatch.setattr(kernels, "_add_in_order", lambda total, parts, neighbors: seen.append((total, parts)))
    torch.use_deterministic_algorithms(True)
    try:
        gradients(TRITON, call, *call.inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for total, parts in seen:
        by_program = parts.unflatten(0, (-1, len(total)))
        assert len(by_program) > 1 and by_program.flatten(1).any(1).all()


def test_compiled_and_mapped():
    call = shared.call_of(20, 9, 4)
    call.inputs["x"] = shared.rand(20, 2)
    names = list(call.inputs)

    def loss(*tensors):
        return TRITON(**call.arguments(dict(zip(names, tensors, strict=True)))).square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = [t.detach().clone().requires_grad_() for t in call.inputs.values()]
        results.append(torch.autograd.grad(function(*inputs), inputs))
    torch.testing.assert_close(*results)
    rest = call.arguments() | {"x": None, "neighbors": None}

    def mapped(function):
        return torch.func.vmap(lambda x, near: function(**rest | {"x": x, "neighbors": near}))

    points = call.inputs["x"], call.options["neighbors"]
    assert_same([mapped(TRITON)(*points)], [mapped(REFERENCE)(*points)])


def test_opcheck():
    call = testing.cases("radial_basis")[3].make(torch.float64, points="safe")
    with Recorder() as recorder:
        testing.evaluate(TRITON, call, order=2)
    assert len(recorder.calls) == 3
    for operator, arguments in recorder.calls.items():
        assert operator._schema.name.startswith("camkernels::triton_radial_basis")
        torch.library.opcheck(operator, arguments[0])
