# SPDX-License-Identifier: MIT
"""The modulated MLP on the CPU multiplies float32 exactly unless PyTorch allows bfloat16 at the time of the call."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import camkernels
from camkernels import testing
from camkernels._cases.modulated_mlp import KINKED
from conftest import backends

OP = "modulated_mlp"
CASES = testing.cases(OP)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.skipif("cpu" not in backends(OP), reason="there are no CPU kernels")


def differs_when_allowed() -> bool:
    """Whether this machine has the instruction and the library in use takes it."""
    if "cpu" not in backends(OP):
        return False
    x, w = torch.full((1, 1), 1 + 2**-12), torch.ones(1, 1)
    with testing.bfloat16(True):
        return bool(camkernels.modulated_mlp(x, [w], backend="cpu") != x)


takes_bfloat16 = pytest.mark.skipif(not differs_when_allowed(), reason="no AVX512_BF16, or another library is in use")


def network(
    points: int, widths: list[int], dtype: torch.dtype = torch.float32, activation: str | None = "tanh"
) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(0)
    pairs = list(itertools.pairwise(widths))
    weights = [torch.randn(o, i).div(i**0.5).to(dtype) for i, o in pairs]
    biases = [torch.randn(o).to(dtype) for _, o in pairs]
    return {"x": torch.randn(points, widths[0]), "weights": weights, "biases": biases, "activation": activation}


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_agrees_with_the_definition(case: testing.Case, dtype: torch.dtype) -> None:
    """Up to second order; behind a relu, whose derivative jumps between values and their roundings, the value alone.
    A residual sine multiplies errors by its frequency: there values take the tolerance of a derivative."""
    call = case.make(dtype)
    names = call.options["activation"]
    names = set(names if isinstance(names, list) else [names])
    order = 0 if names & set(KINKED) else 2
    with testing.bfloat16(True):
        actual = testing.evaluate(camkernels.modulated_mlp, call, order=order, backend="cpu")
    expected = testing.evaluate(camkernels.reference.modulated_mlp, call, order=order)
    if "residual_sine" in names:
        rtol, atol = testing.tolerance(dtype, "grad.points", bfloat16=True)
        testing.assert_close(actual.pop("value"), expected.pop("value"), rtol=rtol, atol=atol, name="value")
    testing.compare(case, call, actual, expected, bfloat16=True)


@takes_bfloat16
@pytest.mark.parametrize("inputs", [1, 2, 15, 16, 31, 32, 33, 63, 100, 600, 1100])
@pytest.mark.parametrize("outputs", [1, 17, 48])
def test_a_linear_layer_multiplies_rounded_factors(inputs: int, outputs: int) -> None:
    call = network(100, [inputs, outputs])
    with testing.bfloat16(True):
        found = camkernels.modulated_mlp(**call, backend="cpu")
    expected = rounded(call["x"]) @ rounded(call["weights"][0]).T + call["biases"][0].double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


@takes_bfloat16
@pytest.mark.parametrize("points", [1, 2, 96, 200, 231])
@pytest.mark.parametrize("outputs", [3, 16, 33, 50])
@pytest.mark.parametrize("inputs", [5, 17, 48])
def test_gradients_are_of_rounded_factors_and_a_bias_is_summed_exactly(inputs: int, outputs: int, points: int) -> None:
    call = network(points, [inputs, outputs], activation=None)
    given = [t.requires_grad_() for t in (call["x"], call["weights"][0], call["biases"][0])]
    cotangent = torch.randn(points, outputs)
    with testing.bfloat16(True):
        y = camkernels.modulated_mlp(**call, backend="cpu")
    of_x, of_weight, of_bias = torch.autograd.grad(y, given, cotangent)
    x, weight = (rounded(t.detach()) for t in given[:2])
    torch.testing.assert_close(of_x.double(), rounded(cotangent) @ weight, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(of_weight.double(), rounded(cotangent).T @ x, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(of_bias.double(), cotangent.double().sum(0), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("inputs", [1, 15, 17, 33])
def test_points_do_not_meet_in_a_pair(inputs: int) -> None:
    """What is not finite stays in its row, also behind an odd number of inputs."""
    call = network(200, [inputs, 20, 3])
    with testing.bfloat16(True):
        clean = camkernels.modulated_mlp(**call, backend="cpu")
        call["x"][::2] = float("nan")
        found = camkernels.modulated_mlp(**call, backend="cpu")
    assert found[::2].isnan().all() and torch.equal(found[1::2], clean[1::2])


def test_float64_is_float64() -> None:
    call = CASES[0].make(torch.float64)
    with testing.bfloat16(True):
        allowed = testing.evaluate(camkernels.modulated_mlp, call, order=2, backend="cpu")
    for name, exact in testing.evaluate(camkernels.modulated_mlp, call, order=2, backend="cpu").items():
        assert torch.equal(allowed[name], exact), name


@takes_bfloat16
@pytest.mark.parametrize("recompute", ["0", "1"])
def test_derivatives_do_as_their_call(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the setting is when they are computed, and with the bits of the call's own values."""
    monkeypatch.setenv("CAMKERNELS_RECOMPUTE", recompute)
    found = []
    for of_call, of_derivatives in ((True, True), (True, False), (False, False), (False, True)):
        call = network(150, [40, 64, 64, 3])
        inputs = [t.requires_grad_() for t in (call["x"], *call["weights"], *call["biases"])]
        with testing.bfloat16(of_call):
            y = camkernels.modulated_mlp(**call, backend="cpu")
        with testing.bfloat16(of_derivatives):
            grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            found.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)])
    for allowed, still_allowed, exact, still_exact in zip(*found, strict=True):
        assert torch.equal(allowed, still_allowed) and torch.equal(exact, still_exact)
    assert not all(torch.equal(allowed, exact) for allowed, _, exact, _ in zip(*found, strict=True))


@pytest.mark.parametrize(("precision", "allowed"), [("highest", False), ("high", False), ("medium", True)])
def test_the_setting_is_that_of_pytorch(precision: str, allowed: bool) -> None:
    try:
        torch.set_float32_matmul_precision(precision)
        assert camkernels._gpu.allows_bfloat16() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")


def test_torch_compile_compiles_again_where_the_setting_has_changed() -> None:
    operator = torch.ops.camkernels.modulated_mlp.default
    place = [argument.name for argument in operator._schema.arguments].index("bfloat16")
    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append([node.args[place] for node in module.graph.nodes if node.target is operator])
        return module.forward

    torch._dynamo.reset()
    mlp = camkernels.ModulatedMLP(3, 2, width=8, hidden_layers=1)
    compiled, x = torch.compile(mlp, backend=keep, fullgraph=True), torch.rand(5, 3)
    try:
        for precision in ("highest", "medium", "highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            with torch.no_grad():
                compiled(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert graphs == [[False], [True]]
