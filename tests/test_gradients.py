# SPDX-License-Identifier: MIT
"""Derivatives are those of the values: finite differences in float64, for every choice of what requires a gradient."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from camkernels import testing
from conftest import CASES, MASKS, WITH_JACOBIAN, each, function_of, make, require

SMALL = 150  # numbers up to which every entry is perturbed alone; above, gradcheck takes random directions


def masked(cases):
    return [
        pytest.param(*pair.values, mask, id=f"{pair.id}-{mask}")
        for pair in each(cases)
        for mask in (MASKS if pair.values[1] != "reference" else ("both",))
    ]


def prepare(case, backend, mask, points=None, **extra):
    """(function of the tensors, leaves, step of the differences); coordinates in cells of the finest level.

    Counted in cells, derivatives are of order 1 and one step serves every resolution: "safe" points keep 1e-3 cells
    from where a derivative jumps.
    """
    call = make(case, backend, points="safe")
    call = call if points is None else shortened(call, points)
    geometry = call.options.get("geometry")
    unit, step = (max(map(max, geometry.scales)), 1e-4) if geometry else (1.0, 1e-6)
    inputs = dict(call.inputs)
    call.inputs[call.points] = inputs[call.points] * unit
    function = function_of(case.op, backend)

    def in_cells(*tensors):
        arguments = dict(zip(inputs, tensors, strict=True))
        return function(**call.arguments(arguments | {call.points: arguments[call.points] / unit}), **extra)

    return in_cells, tuple(require(call, mask).values()), step


def shortened(call, n):
    """The call on its first n points, where that is a call."""
    if not call.separable:
        return call
    x = call.inputs[call.points]
    leading, options = x.shape[:-1], {}
    for name, option in call.options.items():
        per_point = torch.is_tensor(option) and option.shape == leading
        options[name] = option.reshape(-1)[:n] if per_point else option
    return testing.Call(call.inputs | {call.points: x.reshape(-1, x.shape[-1])[:n]}, options, call.points)


@pytest.mark.parametrize(("case", "backend", "mask"), masked(CASES))
def test_first_and_second_order(case, backend, mask):
    function, inputs, step = prepare(case, backend, mask, points=12)
    assert gradcheck(function, inputs, eps=step, fast_mode=True)
    assert gradgradcheck(function, inputs, eps=step, fast_mode=True)


@pytest.mark.parametrize(("case", "backend", "mask"), masked(WITH_JACOBIAN))
def test_first_order_of_the_jacobian(case, backend, mask):
    function, inputs, step = prepare(case, backend, mask, points=6, return_jacobian=True)
    assert gradcheck(function, inputs, eps=step, fast_mode=True)
    assert gradcheck(lambda *tensors: function(*tensors)[1], inputs, eps=step, fast_mode=True)  # without the value


@pytest.mark.slow
@pytest.mark.parametrize(("case", "backend"), each(CASES, reference=False))
def test_every_entry_of_small_cases(case, backend):
    function, inputs, step = prepare(case, backend, "both", points=3)
    if max(t.numel() for t in inputs) > SMALL:
        function, inputs, step = prepare(case, backend, "points", points=3)
    assert gradcheck(function, inputs, eps=step)
    assert gradgradcheck(function, inputs, eps=step)


@pytest.mark.parametrize(("case", "backend"), each(CASES[::3], reference=False))
def test_frozen_parameters_keep_the_second_order_of_points(case, backend):
    call = make(case, backend, points="safe")
    found = {}
    for mask in ("points", "both"):
        x = (inputs := require(call, mask))[call.points]
        value = function_of(case.op, backend)(**call.arguments(inputs))
        (gradient,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        found[mask] = torch.autograd.grad(gradient.square().sum(), x)[0]
    assert torch.equal(found["points"], found["both"])
    assert found["points"].abs().max() > 0 or call.options.get("interpolation") == "nearest"


@pytest.mark.parametrize(("case", "backend"), each(CASES[::3]))
def test_backward_twice_gives_the_same(case, backend):
    call = make(case, backend)
    inputs = require(call, "both")
    saved = {name: t.detach().clone() for name, t in inputs.items()}
    value = function_of(case.op, backend)(**call.arguments(inputs))
    ct = torch.rand_like(value)
    before = ct.clone()
    first = torch.autograd.grad(value, list(inputs.values()), ct, retain_graph=True)
    second = torch.autograd.grad(value, list(inputs.values()), ct)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ct, before)
    for name, tensor in inputs.items():  # nothing was written to
        torch.testing.assert_close(tensor.detach(), saved[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, list(inputs.values()), ct)


@pytest.mark.parametrize(("case", "backend"), each(CASES[:1], reference=False))
def test_unused_and_detached_outputs(case, backend):
    call = make(case, backend, points="safe")
    inputs = require(call, "both")
    function = function_of(case.op, backend)
    value, jacobian = function(**call.arguments(inputs), return_jacobian=True)
    by_value = torch.autograd.grad(value.sum(), list(inputs.values()))
    expected = torch.autograd.grad(function(**call.arguments(inputs)).sum(), list(inputs.values()))
    for a, b in zip(by_value, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not function(**call.arguments(require(call, "none"))).requires_grad
    with torch.no_grad():
        assert not function(**call.arguments(inputs)).requires_grad
    assert jacobian.requires_grad


# ---- no further ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrt", MASKS[:2])
@pytest.mark.parametrize(("case", "backend"), each(CASES[:1], reference=False))
def test_third_order_is_refused(case, backend, wrt):
    call = make(case, backend, points="safe")
    inputs = require(call, "both")
    x = inputs[call.points]
    value = function_of(case.op, backend)(**call.arguments(inputs))
    (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    target = x if wrt == "points" else next(t for name, t in inputs.items() if name != call.points)
    with pytest.raises(
        RuntimeError, match=rf"^{case.op}: no derivatives beyond .*backward_backward .*backend='reference'"
    ):
        torch.autograd.grad(second.sum(), target)


@pytest.mark.parametrize(("case", "backend"), each(CASES[:1], reference=False))
def test_second_order_of_the_jacobian_is_refused(case, backend):
    call = make(case, backend, points="safe")
    inputs = require(call, "both")
    _, jacobian = function_of(case.op, backend)(**call.arguments(inputs), return_jacobian=True)
    (first,) = torch.autograd.grad(jacobian.square().sum(), inputs[call.points], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{case.op}_jacobian: no derivatives beyond {case.op}_jacobian_backward "):
        torch.autograd.grad(first.sum(), inputs[call.points])
