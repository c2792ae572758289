# SPDX-License-Identifier: MIT
"""Ops take any number of points, in any axes, and tensors in any layout: strided, expanded, not aligned."""

import dataclasses
import math

import pytest
import torch

from camkernels import testing
from conftest import FIRST, WITH_JACOBIAN, along, definition_of, each, function_of, make, repeated
from test_agreement import jacobian_results

SIZES = (1, 15, 16, 17, 255, 256, 257)
CLOSE = {"rtol": 1e-12, "atol": 1e-12, "equal_nan": True}
GROUPED = [testing.cases("modulate", norm=norm)[0] for norm in ("ray", "frame")]
EACH = pytest.mark.parametrize(("case", "backend"), each([*FIRST, *GROUPED]))


def with_axes(call, leading):
    """The call on points of these axes, its own again and again."""
    names, flat = along(call), repeated(call, math.prod(leading))

    def folded(part):
        return {name: t.reshape(leading + t.shape[1:]) if name in names else t for name, t in part.items()}

    return dataclasses.replace(flat, inputs=folded(flat.inputs), options=folded(flat.options), axes=len(leading))


def all_of(case, function, call):
    """Values, derivatives of both orders, and what a Jacobian gives."""
    found = testing.evaluate(function, call, order=2)
    return found | jacobian_results(function, call) if case in WITH_JACOBIAN else found


# ---- numbers and axes of points --------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2, 0)], ids=str)
def test_no_points(leading, case, backend):
    call = with_axes(make(case, backend), leading)
    found, expected = (all_of(case, f, call) for f in (function_of(case.op, backend), definition_of(case.op)))
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape and not found[name].any(), name
    assert found["value"].shape[: len(leading)] == leading


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("case", "backend"), each(FIRST, reference=False))
def test_every_size_of_batch(n, case, backend):
    call = repeated(make(case, backend, torch.float32), n)
    results = [testing.evaluate(f, call, order=2) for f in (function_of(case.op, backend), definition_of(case.op))]
    testing.compare(case, call, *results)


@EACH
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (1, 1, 6), (2, 1, 3)], ids=str)
def test_leading_dimensions(leading, case, backend):
    function, call = function_of(case.op, backend), make(case, backend)
    found = all_of(case, function, with_axes(call, leading))
    assert found["value"].shape[: len(leading)] == leading
    for name, wanted in all_of(case, function, repeated(call, math.prod(leading))).items():
        torch.testing.assert_close(found[name].reshape(wanted.shape), wanted, **CLOSE, msg=name)


# ---- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda t: torch.stack([t, t.neg()], 1).flatten(0, 1)[::2],
    "columns of a wider one": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "shifted": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "one row for all": lambda t: t[:1].expand(t.shape),
    "one column for all": lambda t: t[..., :1].expand(t.shape),
}


def dense(change):
    """The numbers of a layout, one behind the other."""
    return lambda t: change(t).clone(memory_format=torch.contiguous_format)


def derivatives(case, function, call, layouts, of_cotangents):
    """Values, gradients, and gradients of those, with inputs {name: layout} and cotangents of these layouts."""
    generator = torch.Generator().manual_seed(0)
    leaves = {name: layout(call.inputs[name]).requires_grad_() for name, layout in layouts.items()}

    def gradients(outputs, inputs):
        outputs = [y for y in outputs if y.requires_grad]
        drawn = [torch.rand(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
        cotangents = [of_cotangents(t).requires_grad_() for t in drawn]
        found = torch.autograd.grad(
            outputs, inputs, cotangents, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return cotangents, list(found)

    tensors = list(leaves.values())
    value = function(**call.arguments(leaves))
    cotangents, first = gradients([value], tensors)
    results = [value, *first, *gradients(first, cotangents + tensors)[1]]
    if case in WITH_JACOBIAN:
        both = function(**call.arguments(leaves), return_jacobian=True)
        results += [*both, *gradients(both, tensors)[1]]
    return results


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, case, backend):
    for dtype in (torch.float64,) if backend == "reference" else (torch.float64, torch.float32, torch.bfloat16):
        call, function = make(case, backend, dtype), function_of(case.op, backend)
        everything, points = call.inputs.keys(), {call.points}
        rtol, atol = (0, 0) if backend == "cpu" else testing.tolerance(dtype, "second")
        for names, cotangents in ((points, False), (everything - points, False), ((), True), (everything, True)):
            found, expected = (
                derivatives(
                    case,
                    function,
                    call,
                    {name: change if name in names else torch.clone for name in everything},
                    change if cotangents else torch.clone,
                )
                for change in (LAYOUTS[layout], dense(LAYOUTS[layout]))
            )
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


@EACH
def test_the_gradient_of_an_expanded_input_is_a_sum(case, backend):
    function, call = function_of(case.op, backend), make(case, backend, points="safe")
    leaf = call.inputs[call.points][:1].clone().requires_grad_()
    wide = leaf.expand(call.inputs[call.points].shape).clone().requires_grad_()

    def gradient(x, leaf):
        value = function(**call.arguments(call.inputs | {call.points: x}))
        return torch.autograd.grad(value.sum(), leaf)[0]

    expected = gradient(wide, wide).sum(0, keepdim=True)
    torch.testing.assert_close(gradient(leaf.expand(wide.shape), leaf), expected, rtol=1e-12, atol=1e-12)
