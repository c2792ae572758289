# SPDX-License-Identifier: MIT
"""`hash_grid` on the CUDA kernels that tests/sim executes: the same glue, kernels and launchers that a GPU runs.

The public function is routed to operators of a simulated library. No GPU takes part.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import camkernels
from camkernels import testing
from camkernels._autograd import Operator
from sim import build, library

CASES = testing.cases("hash_grid")
MODULE = sys.modules["camkernels.hash_grid"]


def chain(operator: Operator) -> Iterator[Operator]:
    while operator is not None:
        yield operator
        operator = operator.next


def define(namespace: str) -> torch.library.Library:
    """The real operators' schemas in another namespace."""
    defined = torch.library.Library(namespace, "DEF")
    for root in MODULE._COMPILED:
        for operator in chain(root):
            defined.define(str(operator.call._schema).split("::", 1)[1])
    return defined


def rerouted(operator: Operator, namespace: str) -> Operator:
    """The operator, and those of its derivatives, calling what another namespace registers."""
    other = copy.copy(operator)
    other.call = getattr(getattr(torch.ops, namespace), operator.name).default
    other.next = rerouted(operator.next, namespace) if operator.next is not None else None
    return other


class Simulated:
    """A simulated library and `hash_grid` on it."""

    def __init__(self, recipe: build.Recipe) -> None:
        self.schemas = define(recipe.namespace)
        self.library = library.load(recipe)
        self.operators = tuple(rerouted(root, recipe.namespace) for root in MODULE._COMPILED)

    @contextmanager
    def routed(self) -> Iterator[None]:
        with mock.patch.multiple(MODULE, _COMPILED=self.operators, choose=lambda call, backend: "cuda"):
            yield

    def hash_grid(self, *args, **options):
        with self.routed():
            return camkernels.hash_grid(*args, **options)

    def check(self, case: testing.Case, dtype: torch.dtype) -> None:
        """Value, gradients, second order, Jacobian and its gradients."""
        call = case.make(dtype)
        for options in ({"order": 2}, {"order": 1, "jacobian": True}):
            actual = testing.evaluate(self.hash_grid, call, **options)
            expected = testing.evaluate(camkernels.reference.hash_grid, call, **options)
            testing.compare(case, call, actual, expected)
        actual, expected = (jacobian_gradients(f, call) for f in (self.hash_grid, camkernels.reference.hash_grid))
        testing.compare(case, call, actual, expected)

    def agree(self, call: testing.Call, order: int = 2) -> None:
        """`check` for a call that is no case, of points that are far enough from faces."""
        functions = (self.hash_grid, camkernels.reference.hash_grid)
        actual, expected = (testing.evaluate(f, call, order=order) for f in functions)
        if order == 2:
            for results, function in zip((actual, expected), functions, strict=True):
                results |= {f"jacobian {name}": g for name, g in jacobian_gradients(function, call).items()}
        rtol, atol = testing.tolerance(call.inputs["table"].dtype, "second")
        for name, wanted in expected.items():
            testing.assert_close(actual[name], wanted, rtol=10 * rtol, atol=10 * atol, name=name)


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


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def regular_call(dims: int, features: int, dtype: torch.dtype, n: int, levels: int = 4) -> testing.Call:
    """A call that the specialised kernels take, with coarse levels and hashed ones."""
    geometry = camkernels.GridGeometry.build(dims, levels, features, 9, base_resolution=4, finest_resolution=24)
    generator = torch.Generator().manual_seed(dims * 10 + features)
    x = torch.rand(n, dims, generator=generator)
    table = (torch.rand(geometry.n_entries, features, generator=generator) * 2 - 1).to(dtype)
    return testing.Call({"x": x, "table": table}, {"geometry": geometry, "interpolation": "linear", "max_level": None})


def shifted(tensor: Tensor) -> Tensor:
    """The same numbers at an address that no vector access may use."""
    moved = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)
    assert moved.data_ptr() % 16 != 0 and moved.is_contiguous()
    return moved


def table_gradient(sim: Simulated, call: testing.Call, schedule: str) -> Tensor:
    with sim.library.schedule(schedule):
        return testing.evaluate(sim.hash_grid, call)["grad.table"]
