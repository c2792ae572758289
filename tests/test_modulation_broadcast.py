# SPDX-License-Identifier: MIT
"""modulate: gamma and beta may broadcast to h in any way, and what shares them is added up in one order."""

import itertools

import pytest
import torch

from camkernels import testing
from conftest import backends, definition_of, device_of, function_of

BACKENDS = [b for b in backends("modulate") if b != "reference"]
NORMS = (None, "point", "ray", "frame")
SHAPE = (2, 3, 4, 5)
BROADCASTS = [*itertools.product(*((1, size) for size in SHAPE)), (3, 1, 1), (4, 1), (5,), (1,), ()]


def draw(shape, device, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def agree(call, backend):
    actual, expected = (
        testing.evaluate(f, call, order=2) for f in (function_of("modulate", backend), definition_of("modulate"))
    )
    for name, wanted in expected.items():
        testing.assert_close(actual[name], wanted, rtol=1e-12, atol=1e-12, name=name)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", BROADCASTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_broadcast(backend, shape, norm):
    device = device_of(backend)
    inputs = {"h": draw(SHAPE, device), "gamma": draw(shape, device, seed=1)}
    inputs["beta"] = draw(BROADCASTS[-1 - BROADCASTS.index(shape)], device, seed=2)
    agree(testing.Call(inputs, {"norm": norm, "eps": 1e-2, "activation": "tanh"}, "h"), backend)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_frequencies_belong_to_channels(backend, norm):
    """Channels: axis 1 of a frame, else the last one."""
    device = device_of(backend)
    inputs = {"h": draw(SHAPE, device), "gamma": draw((2, 1, 1, 1), device, seed=1), "beta": draw((), device, seed=2)}
    frequencies = draw(SHAPE[1 if norm == "frame" else -1], device, seed=3) * 9
    agree(testing.Call(inputs, {"norm": norm, "activation": "residual_sine", "frequencies": frequencies}, "h"), backend)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [5, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_without_that_of_the_cotangent(backend, dtype, width, norm):
    """A penalty on gradients: its own cotangent is a constant."""
    shape = (7, 4, 3, width)
    h, gamma, beta, ct, along = (draw(shape, device_of(backend), dtype, seed) for seed in range(5))

    def of_h(function):
        x = h.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(x, gamma, beta, norm=norm, activation="silu"), x, ct, create_graph=True)
        return torch.autograd.grad(slope, x, along)[0]

    found, wanted = (of_h(f("modulate")) for f in (lambda op: function_of(op, backend), definition_of))
    rtol = 1e-12 if dtype == torch.float64 else 1e-4
    testing.assert_close(found, wanted, rtol=rtol, atol=rtol)


def many_groups(device, dtype):
    """Groups in more pieces than one, which end within what shares a gamma; a beta for all."""
    shape = (7, 1000, 64)
    inputs = {"h": draw(shape, device, dtype), "gamma": draw((7, 1, 64), device, dtype, 1)}
    inputs["beta"] = draw((1,), device, dtype, 2)
    return testing.Call(inputs, {"norm": "point", "activation": "silu"}, "h")


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_many_groups(backend):
    agree(many_groups(device_of(backend), torch.float64), backend)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "cpu"])
def test_sums_over_many_groups_have_the_same_bits_for_any_number_of_threads(backend):
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(testing.evaluate(function_of("modulate", backend), many_groups("cpu", torch.float32), order=2))
    finally:
        torch.set_num_threads(before)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]) and torch.equal(tensor, found[2][name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_groups_keep_the_digits_of_float32(backend):
    """A frame of 2^18 numbers, whose mean is large beside their deviation."""
    h = 8 + draw((1, 1, 512, 512), device_of(backend), torch.float32)
    one, zero = torch.ones((), device=h.device), torch.zeros((), device=h.device)
    function, definition = function_of("modulate", backend), definition_of("modulate")
    options = {"norm": "frame", "activation": None}
    exact = definition(h.double(), one.double(), zero.double(), **options)
    error = (function(h, one, zero, **options).double() - exact).abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_what_no_group_reads_are_zero(backend, norm):
    device = device_of(backend)
    h = torch.rand(0, 3, 4, 5, device=device)
    for _ in range(3):  # memory that was written to before
        torch.full((64,), 7.0, device=device)
        gamma = torch.rand(1, 3, 1, 1, device=device, requires_grad=True)
        beta = torch.rand(3, 4, 5, device=device, requires_grad=True)
        y = function_of("modulate", backend)(h, gamma, beta, norm=norm)
        for t, gradient in zip((gamma, beta), torch.autograd.grad(y.sum(), (gamma, beta)), strict=True):
            assert torch.equal(gradient, torch.zeros_like(t))
