# SPDX-License-Identifier: MIT
"""Derivatives are those of the values: finite differences in float64, for every choice of what requires a gradient."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import camkernels
from camkernels import testing
from conftest import (
    CASES,
    FIRST,
    MASKS,
    WITH_JACOBIAN,
    backends,
    definition_of,
    device_of,
    each,
    function_of,
    make,
    require,
    rows,
    some,
    who_refuses,
)

# A detached normaliser is a constant to derivatives, not to differences: tests/test_radial_definition.py.
DIFFERENCES = [case for case in CASES if case.options.get("normalize") != "detached"]
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
    call = rows(call, slice(points)) if points is not None and points < call.leading.numel() else call
    geometry = call.options.get("geometry")
    unit, step = (max(map(max, geometry.scales)), 1e-4) if geometry else (1.0, 1e-6)
    inputs = dict(call.inputs)
    call.inputs[call.points] = inputs[call.points] * unit
    function = function_of(case.op, backend)

    def in_cells(*tensors):
        arguments = dict(zip(inputs, tensors, strict=True))
        return function(**call.arguments(arguments | {call.points: arguments[call.points] / unit}), **extra)

    return in_cells, tuple(require(call, mask).values()), step


@pytest.mark.parametrize(("case", "backend", "mask"), masked(DIFFERENCES))
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
@pytest.mark.parametrize(("case", "backend"), each(DIFFERENCES, reference=False))
def test_every_entry_of_small_cases(case, backend):
    function, inputs, step = prepare(case, backend, "both", points=3)
    if max(t.numel() for t in inputs) > SMALL:
        function, inputs, step = prepare(case, backend, "points", points=3)
    assert gradcheck(function, inputs, eps=step)
    assert gradgradcheck(function, inputs, eps=step)


@pytest.mark.parametrize(("case", "backend"), each(some(3), reference=False))
def test_frozen_parameters_keep_the_second_order_of_points(case, backend):
    call = make(case, backend, points="safe")

    def second_order(function, mask):
        x = (inputs := require(call, mask))[call.points]
        (gradient,) = torch.autograd.grad(
            function(**call.arguments(inputs)).square().sum(), x, create_graph=True, materialize_grads=True
        )
        return torch.autograd.grad(gradient.square().sum(), x, materialize_grads=True)[0]

    frozen, trained = (second_order(function_of(case.op, backend), mask) for mask in ("points", "both"))
    assert torch.equal(frozen, trained)
    expected = second_order(definition_of(case.op), "points")
    rtol, atol = testing.tolerance(torch.float64, "second")
    testing.assert_close(frozen, expected, rtol=rtol, atol=atol, name=str(case))
    constant = call.options.get("interpolation") == "nearest" or case.name == "width-one-normalised"
    assert expected.abs().max() > 0 or constant


@pytest.mark.parametrize(("case", "backend"), each(some(3)))
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


@pytest.mark.parametrize(("case", "backend"), each(FIRST, reference=False))
def test_nothing_requires_a_gradient_where_nothing_is_asked(case, backend):
    call = make(case, backend, points="safe")
    function = function_of(case.op, backend)
    assert not function(**call.arguments(require(call, "none"))).requires_grad
    with torch.no_grad():
        assert not function(**call.arguments(require(call, "both"))).requires_grad


@pytest.mark.parametrize(("case", "backend"), each(WITH_JACOBIAN[:1], reference=False))
def test_unused_and_detached_outputs(case, backend):
    call = make(case, backend, points="safe")
    inputs = require(call, "both")
    function = function_of(case.op, backend)
    value, jacobian = function(**call.arguments(inputs), return_jacobian=True)
    by_value = torch.autograd.grad(value.sum(), list(inputs.values()))
    expected = torch.autograd.grad(function(**call.arguments(inputs)).sum(), list(inputs.values()))
    for a, b in zip(by_value, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert jacobian.requires_grad


@pytest.mark.parametrize("backend", [b for b in backends("modulate") if b != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_derivatives_that_are_infinite(dtype, backend):
    """Those of e^z where it overflows, and NaN nowhere: what is absent adds nothing."""
    device = device_of(backend)
    z = torch.tensor([[1.0], [80.0], [1000.0]], dtype=dtype, device=device)
    one = torch.ones(1, 1, dtype=dtype, device=device)
    found = {}
    for way in (backend, "reference"):
        x, gamma, beta, weight, last = (t.clone().requires_grad_() for t in (z, one[0], 0 * one[0], one, one))
        options = {"activation": "exponential", "backend": way}
        calls = [(camkernels.modulate(x, gamma, beta, **options), (x, gamma, beta))]
        if device == "cpu":  # GPUs multiply matrices in parts, which infinity has not
            calls += [
                (camkernels.modulated_mlp(x, [weight], output_layer=False, **options), (x, weight)),
                (camkernels.modulated_mlp(x, [weight, last], **options), (x, weight)),
            ]
        found[way] = []
        for y, inputs in calls:
            (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            found[way] += torch.autograd.grad(first.sum(), inputs)
    for got, wanted in zip(*found.values(), strict=True):
        assert wanted.isinf().any()
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("norm", ["point", "ray"])
@pytest.mark.parametrize("backend", [b for b in backends("modulate") if b != "reference"])
def test_samples_of_a_ray_are_coupled_by_its_norm_alone(backend, norm):
    rays, samples, channels = 2, 3, 4
    generator = torch.Generator().manual_seed(0)
    shapes = (rays, samples, channels), (rays, samples, 1), (channels,)
    h, gamma, beta = (
        torch.rand(s, generator=generator, dtype=torch.float64).to(device_of(backend)) + 0.5 for s in shapes
    )

    def jacobian(way):
        options = {"norm": norm, "activation": "tanh", "backend": way}
        return torch.autograd.functional.jacobian(lambda h: camkernels.modulate(h, gamma, beta, **options), h)

    found = jacobian(backend)
    torch.testing.assert_close(found, jacobian("reference"), rtol=1e-12, atol=1e-12)
    for i, j in product(range(rays), range(rays)):
        for s, t in product(range(samples), range(samples)):
            coupled = i == j and (s == t or norm == "ray")
            assert (found[i, s, :, j, t] != 0).all() == found[i, s, :, j, t].any() == coupled


# ---- no further ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrt", MASKS[:2])
@pytest.mark.parametrize(("case", "backend"), each(FIRST, reference=False))
def test_third_order_is_refused(case, backend, wrt):
    call = make(case, backend, points="safe")
    inputs = require(call, "both")
    x = inputs[call.points]
    value = function_of(case.op, backend)(**call.arguments(inputs))
    (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    target = x if wrt == "points" else next(t for name, t in inputs.items() if name != call.points)
    with pytest.raises(
        RuntimeError, match=rf"^{who_refuses(case.op)}: no derivatives beyond .*backward_backward .*backend='reference'"
    ):
        torch.autograd.grad(second.sum(), target)


@pytest.mark.parametrize(("case", "backend"), each(WITH_JACOBIAN[:1], reference=False))
def test_second_order_of_the_jacobian_is_refused(case, backend):
    call = make(case, backend, points="safe")
    inputs = require(call, "both")
    _, jacobian = function_of(case.op, backend)(**call.arguments(inputs), return_jacobian=True)
    (first,) = torch.autograd.grad(jacobian.square().sum(), inputs[call.points], create_graph=True)
    with pytest.raises(RuntimeError, match=rf"^{case.op}_jacobian: no derivatives beyond {case.op}_jacobian_backward "):
        torch.autograd.grad(first.sum(), inputs[call.points])
