# SPDX-License-Identifier: MIT
"""The CUDA kernels of radial_basis, executed by the simulator in tests/sim, compute what the definition says."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import camkernels
from camkernels import testing
from conftest import deterministic
from sim import library, toolkit
from simulated import Simulated, basis, production, shifted

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

OP = "radial_basis"
CASES = testing.cases(OP)
DIFFERENCES = [case for case in CASES if case.options["normalize"] != "detached"]  # see tests/test_gradients.py


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


# ---- agreement with the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_with_deterministic_sums(sim: Simulated, case: testing.Case) -> None:
    with deterministic():
        sim.check(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [2, 5, 16, 37, 160])
@pytest.mark.parametrize("per_point", [1, 7, 40, None])
def test_many_points_kernels_and_features(
    sim: Simulated, per_point: int | None, features: int, dtype: torch.dtype
) -> None:
    """Points of one lane to 32, blocks of kernels that are whole and not, one of them and several, rows of several
    packs per lane; several blocks of threads, the last one partial."""
    sim.agree(basis(150, 50, per_point, dtype, features=features), op=OP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_points_wider_than_the_features(sim: Simulated, dtype: torch.dtype) -> None:
    sim.agree(basis(50, 20, 3, dtype, wide=True), op=OP)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("context", [nullcontext, deterministic])
def test_empty_and_single(sim: Simulated, context, n: int) -> None:
    with context():
        sim.agree(basis(n, 20, 3), op=OP)


@pytest.mark.parametrize("context", [nullcontext, deterministic])
def test_no_features(sim: Simulated, context) -> None:
    leaves = [t.requires_grad_() for t in (torch.rand(4, 2), torch.rand(9, 2), torch.rand(9, 2), torch.rand(9, 0))]
    with context():
        y = sim.function(OP)(*leaves, shape="diagonal")
        grads = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == (4, 0) and [g.shape for g in grads] == [t.shape for t in leaves]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("features", [4, 5])
def test_features_without_waves_may_have_infinite_weights(sim: Simulated, features: int) -> None:
    """Whether or not the rows are whole packs."""
    x, center, shape = torch.full((1, 1), 1e18), torch.zeros(1, 1), torch.full((1, 1), 1e18, requires_grad=True)
    rows = torch.ones(1, features, requires_grad=True)
    for rest in ({}, {"frequencies": torch.ones(0), "keep": features}):
        y = sim.function(OP)(x, center, shape, rows, shape="isotropic", kind="qd", normalize=False, **rest)
        of_shape, of_rows = torch.autograd.grad(y.sum(), (shape, rows))
        assert y.isinf().all() and of_rows.isinf().all() and of_shape.isfinite().all()


def test_misaligned_tensors(sim: Simulated) -> None:
    call = basis(50, 20, 3)
    moved = {name: shifted(t) for name, t in call.inputs.items()}
    found = [testing.evaluate(sim.function(OP), replace(call, inputs=i), order=2) for i in (call.inputs, moved)]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], msg=name)


def test_phases_of_thousands_of_radians_keep_the_digits_of_float32(sim: Simulated) -> None:
    one, phase = torch.ones(1, 1), torch.linspace(-4096, 4096, 999).requires_grad_()
    options = {"kind": "qd", "frequencies": torch.zeros(999), "phase": phase}
    y = sim.function(OP)(one, one, one, torch.ones(1, 999), **options)
    (slope,) = torch.autograd.grad(y.sum(), phase)
    assert (y[0] - phase.double().sin()).abs().max() < 1.3e-7 and (slope - phase.double().cos()).abs().max() < 1.3e-7


# ---- points without value --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["neighbour", "coordinate"])
@pytest.mark.parametrize("per_point", [3, 20])
def test_a_point_without_value_is_nan_and_adds_nothing(sim: Simulated, per_point: int, broken: str) -> None:
    call = basis(20, 9, per_point, torch.float64)
    whole = replace(call, options=call.options | {"neighbors": call.options["neighbors"].clone()})
    if broken == "neighbour":
        call.options["neighbors"][4, -1], call.options["neighbors"][7, 0] = 9, -1
    else:
        call.inputs["x"] = call.inputs["x"].clone()
        call.inputs["x"][4, 0], call.inputs["x"][7, 1] = torch.nan, torch.inf
    lost = torch.zeros(20, dtype=torch.bool)
    lost[[4, 7]] = True
    results = []
    for each in (call, whole):
        inputs = {name: t.clone().requires_grad_() for name, t in each.inputs.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(camkernels._radial_basis, "can_look_at", lambda tensor: False)  # as on a GPU
            y = sim.function(OP)(**each.arguments(inputs))
        grads = torch.autograd.grad(y[~lost].square().sum(), list(inputs.values()))
        results.append({"y": y.detach()} | dict(zip(inputs, grads, strict=True)))
    found, expected = results
    for name in ("y", "x"):
        assert found[name][lost].isnan().all()
        found[name], expected[name] = (each[name][~lost] for each in results)
    for name, wanted in expected.items():
        torch.testing.assert_close(found[name], wanted, msg=name)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DIFFERENCES, ids=str)
def test_gradcheck_and_gradgradcheck(sim: Simulated, case: testing.Case) -> None:
    sim.check_numerically(case)


@pytest.mark.parametrize("wanted", ["x", "centers", "shapes", "phase", "features"])
def test_one_gradient_alone_is_the_same(sim: Simulated, wanted: str) -> None:
    call = basis(40, 9, 12, torch.float64)
    results = []
    for names in ([wanted], list(call.inputs)):
        inputs = {key: t.clone().requires_grad_(key in names) for key, t in call.inputs.items()}
        y = sim.function(OP)(**call.arguments(inputs))
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[wanted], create_graph=True)
        results.append([grad, *torch.autograd.grad(grad.square().sum(), inputs[wanted])])
    for alone, together in zip(*results, strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)  # sums are in another order


# ---- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_deterministic_sums_do_not_depend_on_the_order(sim: Simulated, dtype: torch.dtype) -> None:
    call = basis(300, 9, 4, dtype)

    def gradients(schedule: str) -> dict[str, torch.Tensor]:
        with sim.library.schedule(schedule):
            return testing.evaluate(sim.function(OP), call, order=2)

    fast = [gradients(schedule) for schedule in library.SCHEDULES[:2]]
    with deterministic():
        same = [gradients(schedule) for schedule in library.SCHEDULES]
    for name, tensor in same[0].items():
        assert torch.equal(tensor, same[1][name]) and torch.equal(tensor, same[2][name]), name
    if dtype == torch.float32:
        assert not torch.equal(fast[0]["grad.features"], fast[1]["grad.features"])  # the schedules do differ
    for name in ("x", "phase"):  # without atomics
        assert torch.equal(fast[0][f"grad.{name}"], fast[1][f"grad.{name}"])
    rtol, atol = testing.tolerance(dtype, "grad.parameters")
    testing.assert_close(same[0]["grad.features"], fast[0]["grad.features"], rtol=rtol, atol=atol)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_deterministic_sums_pass_on_what_is_not_finite(sim: Simulated, dtype: torch.dtype, value: float) -> None:
    call = basis(30, 9, 4, dtype)
    inputs = {name: t.clone().requires_grad_() for name, t in call.inputs.items()}
    with deterministic():
        y = sim.function(OP)(**call.arguments(inputs))
        grad = torch.ones_like(y)
        grad[3, 2] = value
        found = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), grad), strict=True))
    named = torch.zeros(9, dtype=torch.bool)
    named[call.options["neighbors"][3].long()] = True
    for name in ("centers", "shapes"):
        assert not found[name][named].isfinite().any() and found[name][~named].isfinite().all()
    others = torch.arange(8) != 2
    assert not found["features"][named, 2].isfinite().any() and found["features"][:, others].isfinite().all()
    assert found["features"][~named].isfinite().all()
