# SPDX-License-Identifier: MIT
"""Modulate's Triton kernels in Triton's interpreter: run by test_triton_modulate.py, or alone with
TRITON_INTERPRET=1."""

import os

import pytest
import torch

import triton_interpreter
from camkernels import testing
from conftest import DTYPES, definition_of, function_of, require
from test_modulation_broadcast import BROADCASTS, NORMS, SHAPE, draw
from test_operators import Recorder

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
triton_interpreter.repair()

CASES = testing.cases("modulate")
TRITON, REFERENCE = function_of("modulate", "triton"), definition_of("modulate")


def agree(call):
    actual, expected = (testing.evaluate(f, call, order=2) for f in (TRITON, REFERENCE))
    for name, wanted in expected.items():
        testing.assert_close(actual[name], wanted, rtol=1e-12, atol=1e-12, name=name)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, DTYPES[(i + j) % 4], id=f"{c}-{j}") for i, c in enumerate(CASES) for j in (0, 1)],
)
def test_every_case_in_two_dtypes(case, dtype):
    """The second order by the reference formula."""
    testing.check(case, TRITON, REFERENCE, dtype=dtype, order=2)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", BROADCASTS[::3], ids=str)
def test_broadcasts(shape, norm):
    tensors = {"h": SHAPE, "gamma": shape, "beta": BROADCASTS[-1 - BROADCASTS.index(shape)]}
    inputs = {name: draw(size, "cpu", seed=seed) for seed, (name, size) in enumerate(tensors.items())}
    agree(testing.Call(inputs, {"norm": norm, "eps": 1e-2, "activation": "tanh"}, "h"))


@pytest.mark.parametrize("form", [(2, 1, 1), (1, 60), (40, 1), (2, 40, 60)], ids=str)
def test_groups_longer_than_a_block(form):
    inputs = {"h": draw((1, 2, 40, 60), "cpu"), "gamma": draw(form, "cpu", seed=1), "beta": draw((), "cpu", seed=2)}
    agree(testing.Call(inputs, {"norm": "frame", "activation": "silu"}, "h"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["softplus", "tanh", "gelu", "silu"])
def test_small_and_large_numbers_keep_their_digits(activation, norm):
    """Each number by itself: what is small is not hidden behind what is large."""
    h = torch.cat([-torch.logspace(-6, 1.5, 40), torch.logspace(-6, 1.5, 40)]).reshape(1, 1, 8, 10)
    inputs = {"h": h, "gamma": torch.ones(()), "beta": torch.zeros(())}
    options = {"activation": activation, "norm": norm}
    exact = REFERENCE(**{name: t.double() for name, t in inputs.items()}, **options)
    plain = (REFERENCE(**inputs, **options) - exact).abs()
    found = (TRITON(**inputs, **options) - exact).abs()
    assert (found <= 4 * plain + 2e-6 * exact.abs() + 1e-7 * (activation != "tanh")).all()


@pytest.mark.parametrize("mask", ["points", "parameters"])
def test_one_gradient_alone(mask):
    call = CASES[3].make(torch.float64)

    def gradients(function):
        inputs = require(call, mask)
        y = function(**call.arguments(inputs))
        return torch.autograd.grad(y.square().sum(), [t for t in inputs.values() if t.requires_grad])

    for a, b in zip(gradients(TRITON), gradients(REFERENCE), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single(n):
    inputs = {"h": draw((n, 8), "cpu"), "gamma": draw((8,), "cpu", seed=1), "beta": draw((1, 1), "cpu", seed=2)}
    agree(testing.Call(inputs, {"norm": "point"}, "h"))


def test_compiled_and_mapped():
    call = CASES[1].make(torch.float64, points="safe")

    def loss(h, gamma, beta):
        return TRITON(h, gamma, beta, **call.options).square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = require(call, "both").values()
        results.append(torch.autograd.grad(function(*inputs), list(inputs)))
    torch.testing.assert_close(*results)
    mapped = [
        torch.func.vmap(lambda h, f=f: f(h, call.inputs["gamma"], call.inputs["beta"], **call.options))(
            torch.stack([call.inputs["h"]] * 2)
        )
        for f in (TRITON, REFERENCE)
    ]
    torch.testing.assert_close(*mapped, rtol=1e-12, atol=1e-12)


def test_opcheck():
    with Recorder() as recorder:
        testing.evaluate(TRITON, CASES[1].make(torch.float64, points="safe"), order=2)
    assert len(recorder.calls) == 3
    for operator, arguments in recorder.calls.items():
        assert operator._schema.name.startswith("camkernels::triton_modulate")
        torch.library.opcheck(operator, arguments[0])
