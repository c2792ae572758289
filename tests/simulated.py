# SPDX-License-Identifier: MIT
"""Ops on the CUDA kernels that tests/sim executes: the same glue, kernels and launchers that a GPU runs.

The public functions are routed to operators of a simulated library. No GPU takes part.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import camkernels
from camkernels import _neighbor_cells, _neighbor_fallbacks, neighbors, optim, testing
from camkernels._autograd import Operator
from conftest import require
from sim import build, library
from sim.selftests import round_to_tf32

CASES = testing.cases("hash_grid")
OPS = ("hash_grid", "modulated_mlp", "modulate", "coordinate_modulation", "radial_basis")
MODULES = [sys.modules[f"camkernels.{op}"] for op in OPS]


def chain(operator: Operator) -> Iterator[Operator]:
    while operator is not None:
        yield operator
        operator = operator.next


def define(namespace: str) -> torch.library.Library:
    """The real operators' schemas in another namespace."""
    defined = torch.library.Library(namespace, "DEF")
    for module in MODULES:
        compiled = module._COMPILED
        for root in (compiled,) if isinstance(compiled, Operator) else compiled:
            for operator in chain(root):
                defined.define(str(operator.call._schema).split("::", 1)[1])
    for operator in (neighbors._NEAREST, optim._STEP):
        defined.define(str(operator._schema).split("::", 1)[1])
    return defined


def rerouted(operator: Any, namespace: str) -> Any:
    """The operator or operators, and those of their derivatives, calling what another namespace registers."""
    if isinstance(operator, tuple):
        return tuple(rerouted(root, namespace) for root in operator)
    other = copy.copy(operator)
    other.apart = ()  # these are no kernels of the CPU
    other.call = getattr(getattr(torch.ops, namespace), operator.name).default
    other.next = rerouted(operator.next, namespace) if operator.next is not None else None
    return other


class Simulated:
    """A simulated library and the ops on it."""

    def __init__(self, recipe: build.Recipe) -> None:
        self.schemas = define(recipe.namespace)
        self.library = library.load(recipe)
        self.operators = [rerouted(module._COMPILED, recipe.namespace) for module in MODULES]
        operators = getattr(torch.ops, recipe.namespace)
        self.search, self.adam = operators.nearest.default, operators.sparse_row_adam.default

    @contextmanager
    def routed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module, operators in zip(MODULES, self.operators, strict=True):
                routes = {"_COMPILED": operators, "choose": lambda call, backend: "cuda"}
                stack.enter_context(mock.patch.multiple(module, **routes))
            yield

    def function(self, op: str) -> Callable[..., Any]:
        def run(*args, **options):
            with self.routed():
                return getattr(camkernels, op)(*args, **options)

        return run

    def hash_grid(self, *args, **options):
        return self.function("hash_grid")(*args, **options)

    def check(self, case: testing.Case, dtype: torch.dtype, schedules: Sequence[str] = ("forward",)) -> None:
        """Value, gradients, second order; where there is one, Jacobian and its gradients."""
        call = case.make(dtype)
        ways = [partial(testing.evaluate, call=call, order=2)]
        if testing.has_jacobian(case.op):
            ways += [
                partial(testing.evaluate, call=call, order=1, jacobian=True),
                partial(jacobian_gradients, call=call),
            ]
        for way in ways:
            expected = way(getattr(camkernels.reference, case.op))
            for schedule in schedules:
                with self.library.schedule(schedule):
                    testing.compare(case, call, way(self.function(case.op)), expected)

    def check_search(self, x: Tensor, centers: Tensor, k: int) -> None:
        """Nearest centres against all distances."""
        rows, squares = self.search(x, *_neighbor_cells.build(centers), k)
        wanted = _neighbor_fallbacks.search_all(centers.double(), x.double(), k)
        assert torch.equal(rows, wanted[0]), "neighbors: rows differ"
        assert torch.equal(squares, wanted[1]), "neighbors: distances differ"

    def check_numerically(self, case: testing.Case) -> None:
        """First and second derivatives against finite differences."""
        call = case.make(torch.float64, points="safe")
        inputs = require(call, "both")

        def function(*tensors: Tensor) -> Tensor:
            return getattr(camkernels, case.op)(**call.arguments(dict(zip(inputs, tensors, strict=True))))

        with self.routed():
            assert gradcheck(function, tuple(inputs.values()), eps=1e-5, fast_mode=True)
            assert gradgradcheck(function, tuple(inputs.values()), eps=1e-5, fast_mode=True)

    def agree_rounded(self, call: testing.Call) -> None:
        """A linear layer under TF32 against exact products of rounded factors, up to second order."""
        with testing.tf32(True):
            actual = testing.evaluate(self.function("modulated_mlp"), call, order=2)
        with mock.patch("torch.nn.functional.linear", rounded_linear):
            expected = testing.evaluate(camkernels.reference.modulated_mlp, call, order=2)
        rtol, atol = testing.tolerance(call.inputs["weights.0"].dtype, "second")
        for name, wanted in expected.items():
            testing.assert_close(actual[name], wanted, rtol=rtol, atol=atol, name=f"tf32 {name}")

    def agree(self, call: testing.Call, order: int = 2, op: str = "hash_grid") -> None:
        """`check` for a call that is no case, of points that are far enough from faces."""
        functions = (self.function(op), getattr(camkernels.reference, op))
        actual, expected = (testing.evaluate(f, call, order=order) for f in functions)
        if order == 2 and testing.has_jacobian(op):
            for results, function in zip((actual, expected), functions, strict=True):
                results |= {f"jacobian {name}": g for name, g in jacobian_gradients(function, call).items()}
        parameter = next(t for name, t in call.inputs.items() if name != call.points)
        rtol, atol = testing.tolerance(parameter.dtype, "second")
        for name, wanted in expected.items():
            testing.assert_close(actual[name], wanted, rtol=10 * rtol, atol=10 * atol, name=name)


class RoundedProduct(torch.autograd.Function):
    """a b^T of float32, both rounded to TF32, added up in float64; derivatives are such products too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return (round_to_tf32(a).double() @ round_to_tf32(b).double().T).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return RoundedProduct.apply(g, b.T), RoundedProduct.apply(g.T, a.T)


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear by TF32, for [n, in]."""
    return RoundedProduct.apply(x, weight) + bias


def jacobian_gradients(function: Callable[..., Any], call: testing.Call) -> dict[str, Tensor]:
    """Gradients of <random, value> + <random, Jacobian>, named as the second derivatives they are."""
    inputs = {name: tensor.detach().requires_grad_() for name, tensor in call.inputs.items()}
    outputs = function(**inputs, **call.options, return_jacobian=True)
    generator = torch.Generator().manual_seed(2)
    cotangents = [(torch.rand(out.shape, generator=generator) * 2 - 1).to(out.dtype) for out in outputs]
    grads = torch.autograd.grad(outputs, list(inputs.values()), cotangents, materialize_grads=True)
    return {f"second.{name}": grad for name, grad in zip(inputs, grads, strict=True)}


@lru_cache(maxsize=1)
def production() -> Simulated:
    """One for all test files: a namespace of operators can be defined once."""
    return Simulated(build.production())


def regular_call(dims: int, features: int, dtype: torch.dtype, n: int, levels: int = 4) -> testing.Call:
    """A call that the specialised kernels take, with coarse levels and hashed ones."""
    geometry = camkernels.GridGeometry.build(dims, levels, features, 9, base_resolution=4, finest_resolution=24)
    generator = torch.Generator().manual_seed(dims * 10 + features)
    x = torch.rand(n, dims, generator=generator)
    table = (torch.rand(geometry.n_entries, features, generator=generator) * 2 - 1).to(dtype)
    return testing.Call({"x": x, "table": table}, {"geometry": geometry, "interpolation": "linear", "max_level": None})


def network(
    points: int,
    widths: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    groups: int = 0,
    channels: bool = False,
    **options: Any,
) -> testing.Call:
    """Random points and layers of these widths, the first that of x; groups > 0: rows of modulation."""
    generator = torch.Generator().manual_seed(points + len(widths))

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * size).to(dtype)

    x = draw(points, widths[0])
    inputs = {"x": x if dtype == torch.float64 else x.float()}
    skips = options.get("skips", ())
    for i, out in enumerate(widths[1:]):
        fan_in = widths[i] + widths[0] * (i - 1 in skips)
        inputs[f"weights.{i}"] = draw(out, fan_in, size=(3 / fan_in) ** 0.5)
    inputs |= {f"biases.{i}": draw(out, size=0.5) for i, out in enumerate(widths[1:])}
    if groups:
        leading = (groups, 1) if groups < points else (points,)
        modulation = 1 + draw(*leading, len(widths) - 2, 2, *[widths[1]] * channels, size=0.5)
        inputs["modulation"] = modulation
        if groups < points:
            inputs["x"] = inputs["x"].unflatten(0, (groups, -1))
    return testing.Call(inputs, {"activation": "tanh"} | options)


def lookup_call(
    points: int,
    nodes: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    channels: int | None = None,
    layers: int = 3,
    combine: str = "single",
    padding: str = "border",
) -> testing.Call:
    """Random points, some beyond the outer nodes, and grids of a coordinate_modulation; planes take 3 coordinates."""
    generator = torch.Generator().manual_seed(points + len(nodes))
    planes = combine == "plane_product"
    shape = [layers, 2, *[3] * planes, *([] if channels is None else [channels]), *nodes]
    grids = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    coords = torch.rand(points, 3 if planes else len(nodes), generator=generator, dtype=torch.float64) * 2.4 - 1.2
    coords = coords if dtype == torch.float64 else coords.float()
    options = {"combine": combine, "padding": padding}
    return testing.Call({"coords": coords, "grids": grids.to(dtype)}, options, "coords")


def basis(
    points: int,
    kernels: int,
    per_point: int | None,
    dtype: torch.dtype = torch.float32,
    *,
    features: int = 8,
    dims: int = 2,
    keep: int = 1,
    wide: bool = False,
    **options: Any,
) -> testing.Call:
    """Random points and kernels away from them, each point with random neighbours or all; waves behind the features
    that are kept. wide: points in float64 beside features of another dtype."""
    generator = torch.Generator().manual_seed(points + kernels)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    inputs = {"centers": draw(kernels, dims) - 2, "shapes": draw(kernels, dims), "phase": draw(features - keep)}
    inputs = {name: t.to(dtype) for name, t in inputs.items()}
    inputs["x"] = draw(points, dims).to(torch.float64 if wide or dtype == torch.float64 else torch.float32)
    inputs["features"] = (draw(kernels, features) * 2 - 1).to(dtype)
    options = {"shape": "diagonal", "detach_normalizer": False, "keep": keep} | options
    options["frequencies"] = torch.linspace(0.5, 4, features - keep).to(inputs["x"].dtype)
    if per_point is not None:
        options["neighbors"] = (draw(points, per_point) * kernels).int()
    return testing.Call(inputs, options)


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers at an address that no vector access may use."""
    moved = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)
    assert moved.data_ptr() % 16 != 0 and moved.is_contiguous()
    return moved


def table_gradient(sim: Simulated, call: testing.Call, schedule: str) -> Tensor:
    with sim.library.schedule(schedule):
        return testing.evaluate(sim.hash_grid, call)["grad.table"]
