# SPDX-License-Identifier: MIT
"""`hash_grid` on the CUDA kernels that tests/sim executes: the same glue, kernels and launchers that a GPU runs.

The public function is routed to operators of a simulated library. No GPU takes part.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
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


def table_gradient(sim: Simulated, call: testing.Call, schedule: str) -> Tensor:
    with sim.library.schedule(schedule):
        return testing.evaluate(sim.hash_grid, call)["grad.table"]
