# SPDX-License-Identifier: MIT
"""The CUDA kernels of the hash grid, executed by the simulator in tests/sim, compute what the definition says."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import camkernels
from camkernels import testing
from conftest import deterministic, require
from sim import library, toolkit
from simulated import CASES, Simulated, production, regular_call, shifted, table_gradient

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


# ---- Agreement with the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("features", [1, 2, 4, 8])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_axes_and_features_with_many_points(sim: Simulated, dims: int, features: int, dtype: torch.dtype) -> None:
    """Enough points for threads that take several levels, output words, several tiles and partial ones."""
    many_points(sim, regular_call(dims, features, dtype, 5001), dtype)


@pytest.mark.parametrize("features", [1, 2, 4, 8])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_axes_and_features_on_sm_80(sim: Simulated, dims: int, features: int) -> None:
    sim.library.counters()
    with sim.library.architecture(80):
        many_points(sim, regular_call(dims, features, torch.float32, 1001), torch.float32)
    found = sim.library.counters()
    assert found["atomics"] > 0 and found["vector_reductions"] == 0


def many_points(sim: Simulated, call: testing.Call, dtype: torch.dtype) -> None:
    """Value and table gradient."""
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
    torch.testing.assert_close(
        sim.hash_grid(call.inputs["x"], shifted(table), call.options["geometry"]),
        sim.hash_grid(call.inputs["x"], table, call.options["geometry"]),
    )


@pytest.mark.parametrize("sm", [80, 90])
def test_rows_too_long_for_shared_memory(sim: Simulated, sm: int) -> None:
    """128 threads' rows of 1024 float16 are 256 KB, more than a multiprocessor has."""
    with sim.library.architecture(sm):
        sim.agree(regular_call(2, 1024, torch.float16, 3, levels=1), order=1)


def test_out_of_memory_is_told_in_pytorch_s_own_words(sim: Simulated) -> None:
    """Callers look for them, to try a smaller batch."""
    geometry = camkernels.GridGeometry.build(1, 16, 1 << 16, 1)
    x = torch.rand(1 << 24, 1)  # 2^46 bytes of output
    with pytest.raises(RuntimeError, match=r"^\[enforce fail at alloc_cpu.cpp.*can't allocate memory"):
        sim.hash_grid(x, torch.zeros(geometry.n_entries, 1 << 16), geometry)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_deterministic_sums_do_not_depend_on_the_order(sim: Simulated, dtype: torch.dtype) -> None:
    call = regular_call(3, 2, dtype, 600)
    call.inputs["x"] = call.inputs["x"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    fast = [table_gradient(sim, call, schedule) for schedule in library.SCHEDULES]
    with deterministic():
        same = [table_gradient(sim, call, schedule) for schedule in library.SCHEDULES]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    if dtype == torch.float32:
        assert not torch.equal(fast[0], fast[1])  # the schedules do differ
    rtol, atol = testing.tolerance(dtype, "grad.parameters")
    testing.assert_close(same[0], fast[0], rtol=rtol, atol=atol)


def test_deterministic_sums_keep_infinities_and_nan(sim: Simulated) -> None:
    call = regular_call(2, 1, torch.float32, 60)
    geometry = call.options["geometry"]
    results = []
    for context in (nullcontext, deterministic):
        with context():
            table = call.inputs["table"].clone().requires_grad_()
            y = sim.hash_grid(call.inputs["x"], table, geometry)
            ct = torch.ones_like(y)
            ct[3, 0], ct[7, 1] = torch.inf, torch.nan
            results.append(torch.autograd.grad(y, table, ct)[0])
    assert results[0].isinf().any() and results[0].isnan().any()
    torch.testing.assert_close(*results, equal_nan=True)
