# SPDX-License-Identifier: MIT
"""The modulated MLP on a GPU multiplies float32 exactly unless PyTorch allows TF32 at the time of the call.

The CUDA kernels are executed by the simulator in tests/sim. No GPU takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import camkernels
from camkernels import testing
from camkernels._cases.modulated_mlp import KINKED
from conftest import backends
from sim import toolkit
from sim.selftests import round_to_tf32
from simulated import Simulated, network, production

OP = "modulated_mlp"
CASES = testing.cases(OP)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_simulator = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))
needs_cpu_kernels = pytest.mark.skipif("cpu" not in backends(OP), reason="there are no CPU kernels to call")


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


# ---- the kernels -----------------------------------------------------------------------------------------------------


@needs_simulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_agrees_with_the_definition(sim: Simulated, case: testing.Case, dtype: torch.dtype) -> None:
    """Up to second order; behind a relu, whose derivative jumps between values and their roundings, the value alone."""
    call = case.make(dtype)
    names = call.options["activation"]
    order = 0 if set(names if isinstance(names, list) else [names]) & set(KINKED) else 2
    with testing.tf32(True):
        actual = testing.evaluate(sim.function(OP), call, order=order)
    expected = testing.evaluate(camkernels.reference.modulated_mlp, call, order=order)
    testing.compare(case, call, actual, expected, tf32=True)


@needs_simulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [[20, 40], [70, 130], [5, 300]], ids=str)
def test_a_linear_layer_multiplies_rounded_factors(sim: Simulated, widths: list[int], dtype: torch.dtype) -> None:
    sim.agree_rounded(network(70, widths, dtype))


@needs_simulator
def test_float64_is_float64(sim: Simulated) -> None:
    call = network(20, [3, 24, 2], torch.float64)
    with testing.tf32(True):
        allowed = testing.evaluate(sim.function(OP), call, order=2)
    for name, exact in testing.evaluate(sim.function(OP), call, order=2).items():
        assert torch.equal(allowed[name], exact), name


# ---- to the bit ------------------------------------------------------------------------------------------------------

STEP = 16
ORDER = ((0, 4, 8, 12, 1, 5, 9, 13), (2, 6, 10, 14, 3, 7, 11, 15))  # in which products take the inputs of a step


def cut(x: Tensor) -> Tensor:
    """Without the last 13 bits."""
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def three_products(x: Tensor, w: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of the parts of float32, the small ones first."""
    return [(cut(x - cut(x)), cut(w)), (cut(x), cut(w - cut(w))), (cut(x), cut(w))]


def one_product(x: Tensor, w: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(round_to_tf32(x), round_to_tf32(w))]


@needs_simulator
@pytest.mark.parametrize(("allowed", "factors"), [(None, three_products), (False, three_products), (True, one_product)])
def test_sums_to_the_bit(sim: Simulated, allowed: bool | None, factors: Callable[..., Any]) -> None:
    """A linear layer is the sum, in float32, of the products of these factors; None: PyTorch's default."""
    call = network(40, [2 * STEP, 24])
    x, w, y = call.inputs["x"], call.inputs["weights.0"], call.inputs["biases.0"].expand(40, -1).clone()
    for first in range(0, 2 * STEP, STEP):
        for eight in ORDER:
            for left, right in factors(x, w):
                for i in eight:
                    y += left[:, first + i, None] * right[:, first + i]
    if allowed is None:
        found = call.run(sim.function(OP))
    else:
        with testing.tf32(allowed):
            found = call.run(sim.function(OP))
    assert torch.equal(found, y)


# ---- the setting -----------------------------------------------------------------------------------------------------

MATMUL = torch.backends.cuda.matmul
SWITCHES: dict[str, Callable[[], Any]] = {
    "allow_tf32": lambda: setattr(MATMUL, "allow_tf32", True),
    "fp32_precision": lambda: setattr(MATMUL, "fp32_precision", "tf32"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "of all backends": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.fixture
def untouched() -> Iterator[None]:
    """All settings at PyTorch's defaults."""
    MATMUL.fp32_precision = "none"
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = "ieee"


def layer() -> camkernels.ModulatedMLP:
    return camkernels.ModulatedMLP(3, 2, width=8, hidden_layers=1)


def calls_of(graph: torch.fx.Graph) -> list[bool]:
    """Whether the calls of the operator in a graph allow TF32."""
    operator = torch.ops.camkernels.modulated_mlp.default
    place = [argument.name for argument in operator._schema.arguments].index("tf32")
    return [node.args[place] for node in graph.nodes if node.target is operator]


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_all_settings_of_pytorch_are_one(switch: Callable[[], Any], untouched: None) -> None:
    assert not camkernels._gpu.allows_tf32()
    switch()
    assert camkernels._gpu.allows_tf32()


@needs_simulator
def test_derivatives_do_as_their_call(sim: Simulated) -> None:
    """Whatever the setting is when they are computed."""
    call = network(20, [3, 24, 2])
    found = []
    for of_call, of_derivatives in ((True, True), (True, False), (False, False), (False, True)):
        inputs = {name: t.clone().requires_grad_() for name, t in call.inputs.items()}
        with testing.tf32(of_call):
            y = sim.function(OP)(**call.arguments(inputs))
        with testing.tf32(of_derivatives), sim.routed():
            grads = torch.autograd.grad(y.square().sum(), list(inputs.values()), create_graph=True)
            found.append([*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), list(inputs.values()))])
    for allowed, still_allowed, exact, still_exact in zip(*found, strict=True):
        assert torch.equal(allowed, still_allowed) and torch.equal(exact, still_exact)
        assert not torch.equal(allowed, exact)


@needs_cpu_kernels
def test_the_cpu_does_not_ask() -> None:
    call = CASES[0].make(torch.float32)
    exact = testing.evaluate(camkernels.modulated_mlp, call, order=2, backend="cpu")
    with testing.tf32(True):
        allowed = testing.evaluate(camkernels.modulated_mlp, call, order=2, backend="cpu")
    for name, tensor in exact.items():
        assert torch.equal(tensor, allowed[name]), name


@needs_cpu_kernels
def test_torch_compile_compiles_again_where_the_setting_has_changed() -> None:
    graphs = []

    def keep(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(calls_of(module.graph))
        return module.forward

    torch._dynamo.reset()
    compiled, x = torch.compile(layer(), backend=keep, fullgraph=True), torch.rand(5, 3)
    for allowed in (False, True, False, True):
        with testing.tf32(allowed), torch.no_grad():
            compiled(x)
    assert graphs == [[False], [True]]


@needs_cpu_kernels
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_does_as_at_its_export(strict: bool) -> None:
    for allowed in (False, True):
        with testing.tf32(allowed):
            program = torch.export.export(layer(), (torch.rand(5, 3),), strict=strict)
        assert calls_of(program.graph) == [allowed]
