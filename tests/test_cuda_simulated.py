# SPDX-License-Identifier: MIT
"""The CUDA kernels of the hash grid, executed by the simulator in tests/sim, compute what the definition says.

The public function is routed to operators of the simulated library: the same glue, kernels and launchers that a GPU
runs. No GPU takes part.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import camkernels
from camkernels import testing
from camkernels._autograd import Operator
from conftest import require
from sim import build, library, toolkit

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

CASES = testing.cases("hash_grid")
MODULE = sys.modules["camkernels.hash_grid"]
HALF = (torch.float16, torch.bfloat16)


# ---- The public function on simulated kernels ------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return Simulated(build.production())


# ---- Agreement with the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_in_three_schedules(sim: Simulated, case: testing.Case, dtype: torch.dtype) -> None:
    for schedule in library.SCHEDULES:
        with sim.library.schedule(schedule):
            sim.check(case, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_half_precision(sim: Simulated, case: testing.Case, dtype: torch.dtype) -> None:
    sim.check(case, dtype)


def regular_call(dims: int, features: int, dtype: torch.dtype, n: int, levels: int = 4) -> testing.Call:
    """A call that the specialised kernels take, with coarse levels and hashed ones."""
    geometry = camkernels.GridGeometry.build(dims, levels, features, 9, base_resolution=4, finest_resolution=24)
    generator = torch.Generator().manual_seed(dims * 10 + features)
    x = torch.rand(n, dims, generator=generator)
    table = (torch.rand(geometry.n_entries, features, generator=generator) * 2 - 1).to(dtype)
    return testing.Call({"x": x, "table": table}, {"geometry": geometry, "interpolation": "linear", "max_level": None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("features", [1, 2, 4, 8])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_axes_and_features_with_many_points(sim: Simulated, dims: int, features: int, dtype: torch.dtype) -> None:
    """Enough points for threads that take several levels, output words, several tiles and partial ones."""
    call = regular_call(dims, features, dtype, 5001)
    results = [testing.evaluate(f, call) for f in (sim.hash_grid, camkernels.reference.hash_grid)]
    for name, quantity in (("value", "value"), ("grad.table", "grad.parameters")):
        rtol, atol = testing.tolerance(dtype, quantity)
        testing.assert_close(results[0][name], results[1][name], rtol=rtol, atol=atol, name=name)


def test_more_levels_than_one_launch_holds(sim: Simulated) -> None:
    call = regular_call(2, 2, torch.float32, 40, levels=40)
    results = [testing.evaluate(f, call, order=2) for f in (sim.hash_grid, camkernels.reference.hash_grid)]
    for name, expected in results[1].items():
        testing.assert_close(results[0][name], expected, rtol=1e-4, atol=1e-4, name=name)


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single(sim: Simulated, n: int) -> None:
    call = regular_call(3, 2, torch.float16, n)
    results = [testing.evaluate(f, call, order=2) for f in (sim.hash_grid, camkernels.reference.hash_grid)]
    for name, expected in results[1].items():
        testing.assert_close(results[0][name], expected, rtol=2e-3, atol=1e-4, name=name)


def test_misaligned_tensors(sim: Simulated) -> None:
    call = regular_call(3, 2, torch.float32, 50)
    table = call.inputs["table"]
    shifted = torch.cat([table.new_zeros(1), table.flatten()])[1:].view_as(table)
    assert shifted.data_ptr() % 16 != 0 and shifted.is_contiguous()
    torch.testing.assert_close(
        sim.hash_grid(call.inputs["x"], shifted, call.options["geometry"]),
        sim.hash_grid(call.inputs["x"], table, call.options["geometry"]),
    )


# ---- Derivatives by finite differences -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_gradcheck_and_gradgradcheck(sim: Simulated, case: testing.Case) -> None:
    call = case.make(torch.float64, points="safe")
    unit = max(map(max, call.options["geometry"].scales))  # in cells, derivatives are of order 1

    x = call.inputs["x"].reshape(-1, call.inputs["x"].shape[-1])[:6]
    options = {k: v.reshape(-1)[:6] if torch.is_tensor(v) else v for k, v in call.options.items()}
    inputs = require(testing.Call({"x": x * unit, "table": call.inputs["table"]}, options), "both")

    def function(points: Tensor, table: Tensor) -> Tensor:
        return camkernels.hash_grid(points / unit, table, **options)

    with sim.routed():
        assert gradcheck(function, tuple(inputs.values()), eps=1e-4, fast_mode=True)
        assert gradgradcheck(function, tuple(inputs.values()), eps=1e-4, fast_mode=True)


# ---- Repeatable sums -------------------------------------------------------------------------------------------------


def table_gradient(sim: Simulated, call: testing.Call, schedule: str) -> Tensor:
    with sim.library.schedule(schedule):
        return testing.evaluate(sim.hash_grid, call)["grad.table"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_deterministic_sums_do_not_depend_on_the_order(sim: Simulated, dtype: torch.dtype) -> None:
    call = regular_call(3, 2, dtype, 600)
    call.inputs["x"] = call.inputs["x"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    fast = [table_gradient(sim, call, schedule) for schedule in library.SCHEDULES]
    torch.use_deterministic_algorithms(True)
    try:
        same = [table_gradient(sim, call, schedule) for schedule in library.SCHEDULES]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    if dtype == torch.float32:
        assert not torch.equal(fast[0], fast[1])  # the schedules do differ
    rtol, atol = testing.tolerance(dtype, "grad.parameters")
    testing.assert_close(same[0], fast[0], rtol=rtol, atol=atol)


def test_deterministic_sums_keep_infinities_and_nan(sim: Simulated) -> None:
    call = regular_call(2, 1, torch.float32, 60)
    geometry = call.options["geometry"]
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            table = call.inputs["table"].clone().requires_grad_()
            y = sim.hash_grid(call.inputs["x"], table, geometry)
            ct = torch.ones_like(y)
            ct[3, 0], ct[7, 1] = torch.inf, torch.nan
            results.append(torch.autograd.grad(y, table, ct)[0])
        finally:
            torch.use_deterministic_algorithms(False)
    assert results[0].isinf().any() and results[0].isnan().any()
    torch.testing.assert_close(*results, equal_nan=True)


# ---- Counts: what csrc/cuda/README.md states -------------------------------------------------------------------------


def counted(sim: Simulated, call: testing.Call, backward: bool) -> dict[str, float]:
    """Counters per point of a forward, or of the table's gradient."""
    n = len(call.inputs["x"])
    table = call.inputs["table"].clone().requires_grad_()
    sim.library.counters()
    y = sim.hash_grid(call.inputs["x"], table, call.options["geometry"])
    if backward:
        sim.library.counters()
        torch.autograd.grad(y.sum(), table)
    return {name: count / n for name, count in sim.library.counters().items()}


def fine_call(features: int = 2, n: int = 2000) -> testing.Call:
    """Hashed levels alone, and of more rows than points: none is summed in shared memory."""
    geometry = camkernels.GridGeometry.build(3, 4, features, 15, base_resolution=64, finest_resolution=512)
    x = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    return testing.Call({"x": x, "table": torch.rand(geometry.n_entries, features)}, {"geometry": geometry})


def test_bytes_per_point(sim: Simulated) -> None:
    """Four levels, 3-D, two float32 features: pairs of corners share a load half of the time."""
    found = counted(sim, fine_call(), backward=False)
    pairs, alone = 4 * 4 * 16, 4 * 4 * 8 * 0.5  # per pair of corners 16 bytes, and 8 more where the pair is not aligned
    coordinates = found["bytes_loaded"] - pairs - alone
    assert found["bytes_stored"] == 4 * 2 * 4
    assert 12 <= coordinates + 4 <= 12 * 4 + 8  # once per thread of the point


def test_coarse_levels_are_summed_in_shared_memory(sim: Simulated) -> None:
    geometry = camkernels.GridGeometry.build(2, 1, 2, 15, base_resolution=8)
    call = testing.Call({"x": torch.rand(4000, 2), "table": torch.rand(geometry.n_entries, 2)}, {"geometry": geometry})
    found = counted(sim, call, backward=True)
    assert found["vector_reductions"] < 0.3  # 4 corners in global memory otherwise
    assert found["barriers"] > 0


def test_coordinates_need_no_atomics(sim: Simulated) -> None:
    call = fine_call(n=200)
    x = call.inputs["x"].requires_grad_()
    y = sim.hash_grid(x, call.inputs["table"], call.options["geometry"])
    sim.library.counters()
    torch.autograd.grad(y.sum(), x)
    found = sim.library.counters()
    assert found["atomics"] == found["vector_reductions"] == 0
