# SPDX-License-Identifier: MIT
"""Every backend computes what the definition says: values, gradients, second order and Jacobians, in every dtype."""

from dataclasses import replace

import pytest
import torch

import camkernels
from camkernels import _backends, testing
from conftest import (
    CASES,
    DTYPES,
    OPS,
    WITH_JACOBIAN,
    backends,
    definition_of,
    device_of,
    each,
    function_of,
    make,
    reason_against,
    some,
)
from mlp_cases import make_mlp

GOLDENS = testing.golden_names("hashgrid_")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", _backends.BACKENDS)
def test_backends_that_are_compared_here(backend, op):
    reason = reason_against(backend, op)
    if reason is not None:
        pytest.skip(reason)
    assert backend in backends(op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "backend"), each(CASES, reference=False))
def test_value_gradients_and_second_order(case, backend, dtype):
    call = make(case, backend, dtype)
    actual = testing.evaluate(function_of(case.op, backend), call, order=2)
    expected = testing.evaluate(definition_of(case.op), call, order=2)
    testing.compare(case, call, actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", some(5), ids=str)
def test_the_reference_backend_is_the_definition(case, dtype):
    call = case.make(dtype)
    for options in ({"order": 2}, *([{"order": 0, "jacobian": True}] if case in WITH_JACOBIAN else [])):
        actual = testing.evaluate(function_of(case.op, "reference"), call, **options)
        expected = testing.evaluate(definition_of(case.op), call, **options)
        for name, wanted in expected.items():
            torch.testing.assert_close(actual[name], wanted, rtol=0, atol=0, equal_nan=True)


def jacobian_results(function, call):
    """The Jacobian and, as parts of the second order, the gradients of <ct, Jacobian>."""

    def jacobian_alone(**arguments):
        return function(**arguments, return_jacobian=True)[1].flatten(-2)

    found = testing.evaluate(jacobian_alone, call)
    dims = call.inputs[call.points].shape[-1]
    named = {"jacobian": found["value"].unflatten(-1, (-1, dims))}
    return named | {name.replace("grad.", "second."): t for name, t in found.items() if name.startswith("grad.")}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "backend"), each(WITH_JACOBIAN, reference=False))
def test_jacobian_and_its_gradients(case, backend, dtype):
    call = make(case, backend, dtype)
    function, definition = function_of(case.op, backend), definition_of(case.op)
    testing.compare(case, call, jacobian_results(function, call), jacobian_results(definition, call))
    results = [testing.evaluate(f, call, jacobian=True) for f in (function, definition)]
    testing.compare(case, call, *results)


@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.float64, torch.float32), (torch.float64, torch.bfloat16)])
@pytest.mark.parametrize(("case", "backend"), each(some(3), reference=False))
def test_coordinates_wider_than_the_table(case, backend, x_dtype, dtype):
    call = make(case, backend, dtype)
    call.inputs[call.points] = make(case, backend, torch.float64).inputs[call.points].to(x_dtype)
    results = [testing.evaluate(f, call, order=2) for f in (function_of(case.op, backend), definition_of(case.op))]
    assert results[0][f"grad.{call.points}"].dtype == x_dtype
    testing.compare(case, call, *results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "backend"), each([c for c in some(3) if c.op != "modulate"], reference=False))
def test_coordinates_in_half_precision_are_computed_in_float32(case, backend, dtype):
    call = make(case, backend, torch.float32)
    call.inputs[call.points] = call.inputs[call.points].to(dtype)
    actual = testing.evaluate(function_of(case.op, backend), call)
    assert actual[f"grad.{call.points}"].dtype == dtype and actual["value"].dtype == torch.float32
    call.inputs[call.points] = call.inputs[call.points].float()
    expected = testing.evaluate(definition_of(case.op), call)
    expected[f"grad.{call.points}"] = expected[f"grad.{call.points}"].to(dtype)
    for name, wanted in expected.items():
        rtol, atol = testing.tolerance(dtype if name == f"grad.{call.points}" else torch.float32, "grad.parameters")
        testing.assert_close(actual[name], wanted, rtol=rtol, atol=atol, name=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "backend"), each(testing.cases("modulate")[::3], reference=False))
def test_half_values_beside_float32_scales_stay_half(case, backend, dtype):
    call = make(case, backend, torch.float32)
    call.inputs["h"] = call.inputs["h"].to(dtype)
    actual, expected = (
        testing.evaluate(f, call) for f in (function_of("modulate", backend), definition_of("modulate"))
    )
    assert actual["value"].dtype == actual["grad.h"].dtype == dtype and actual["grad.gamma"].dtype == torch.float32
    for name, wanted in expected.items():
        rtol, atol = testing.tolerance(wanted.dtype, "grad.parameters")
        testing.assert_close(actual[name], wanted, rtol=rtol, atol=atol, name=name)


# ---- recorded results of public code ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("backend", backends("hash_grid"))
@pytest.mark.parametrize("name", GOLDENS)
def test_goldens_of_hash_grid(name, backend, dtype):
    golden = testing.load_golden(name)
    call = testing.golden_call(golden, dtype)
    x, table = (call.inputs[key].requires_grad_() for key in ("x", "table"))
    function, ct = function_of("hash_grid", backend), golden.tensor("ct.y", dtype).requires_grad_()
    y = call.run(function)
    dx, dtable = torch.autograd.grad(y, (x, table), ct, create_graph=True)
    value, jacobian = call.run(function, return_jacobian=True)
    by_jacobian = torch.einsum("nod,no->nd", jacobian, ct)
    found = {"out.y": y, "g.in.x": dx, "g.p.table": dtable, "out.y ": value, "g.in.x ": by_jacobian}
    if "gg.in.x" in golden:
        for label, gradient in (("", dx), (" ", by_jacobian)):
            h = (golden.tensor("v.in.x", dtype) * gradient).sum()
            second = torch.autograd.grad(h, (table, x, ct), retain_graph=True)
            found |= {f"gg.{key}{label}": g for key, g in zip(("p.table", "in.x", "ct.y"), second, strict=True)}
    for key, result in found.items():
        testing.assert_close_golden(result, golden, key.strip(), dtype)


# ---- what the comparison forgives ------------------------------------------------------------------------------------


def test_only_second_derivatives_at_points_that_are_not_finite_are_left_out():
    case = next(c for c in testing.cases("hash_grid") if c.options.get("layout") == "flat")
    call = case.make(torch.float64)
    expected = testing.evaluate(definition_of("hash_grid"), call, order=2)
    broken = ~call.inputs["x"].isfinite().all(-1)
    assert broken.any() and not broken.all()
    for name, rows, forgiven in (("second.x", broken, True), ("second.x", ~broken, False), ("grad.x", broken, False)):
        actual = dict(expected)
        actual[name] = torch.where(rows.unsqueeze(-1), 3.0, expected[name])
        if forgiven:
            testing.compare(case, call, actual, expected)
        else:
            with pytest.raises(AssertionError, match=f"{name}: "):
                testing.compare(case, call, actual, expected)


def test_terms_that_cancel_leave_their_rounding_and_no_more():
    case = next(c for c in testing.cases("hash_grid") if c.name == "tcnn-tiled-fine-one-entry")
    call = case.make(torch.float32)
    expected = testing.evaluate(definition_of("hash_grid"), call, order=2)
    geometry = call.options["geometry"]
    shared = geometry.offsets[-2]  # the row that every corner of the finest level reads
    assert geometry.strides[-1] == (0, 0, 0) and geometry.scales[-1][0] > 2000
    rounding = 2000 * torch.finfo(torch.float32).eps
    for row, error, forgiven in (
        (shared, rounding, True),
        (shared, 1000 * rounding, False),
        (0, 100 * rounding, False),
    ):
        actual = dict(expected)
        actual["second.table"] = expected["second.table"].clone()
        actual["second.table"][row] += error
        if forgiven:
            testing.compare(case, call, actual, expected)
        else:
            with pytest.raises(AssertionError, match=r"second\.table: 2 of "):
                testing.compare(case, call, actual, expected)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 4, 1), (3, 4, 1), (1, 1, 5), (4, 1), (5,), (1, 1, 1), ()], ids=str)
@pytest.mark.parametrize("backend", [b for b in backends("modulated_mlp") if b != "reference"])
def test_modulation_that_broadcasts_to_the_points(backend, shape):
    generator = torch.Generator().manual_seed(0)
    place = {"generator": generator, "dtype": torch.float64}
    inputs = {
        "x": torch.rand(3, 4, 5, 2, **place),
        "weights.0": torch.rand(6, 2, **place),
        "weights.1": torch.rand(3, 6, **place),
        "modulation": torch.rand(*shape, 1, 2, **place),
    }
    call = testing.Call({name: t.to(device_of(backend)) for name, t in inputs.items()}, {"activation": "tanh"})
    functions = (function_of("modulated_mlp", backend), definition_of("modulated_mlp"))
    actual, expected = (testing.evaluate(f, call, order=2) for f in functions)
    for name, wanted in expected.items():
        testing.assert_close(actual[name], wanted, rtol=1e-12, atol=1e-12, name=name)


@pytest.mark.parametrize("channels", [(), (10,)], ids=["scalar", "channels"])
@pytest.mark.parametrize("norm", [None, "point"])
@pytest.mark.parametrize("backend", [b for b in backends("modulated_mlp") if b != "reference"])
def test_an_infinite_slope_behind_the_last_channel_is_none(backend, norm, channels):
    """Rows of 10 lie in rows of 16: the shift alone is beyond what exp() can take, shift and bias are not."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.rand(7, 3, generator=generator),
        "weights.0": torch.rand(10, 3, generator=generator),
        "weights.1": torch.rand(2, 10, generator=generator),
        "biases.0": torch.full((10,), -100.0) + torch.rand(10, generator=generator) * (norm is not None),
        "biases.1": torch.zeros(2),
        "modulation": torch.tensor([1.0, 100.0 if norm is None else 2.0]).reshape(2, *[1] * len(channels)).expand(
            7, 1, 2, *channels
        ).clone(),
    }  # fmt: skip
    call = testing.Call(
        {name: t.to(device_of(backend)) for name, t in inputs.items()}, {"activation": "exponential", "norm": norm}
    )
    functions = (function_of("modulated_mlp", backend), definition_of("modulated_mlp"))
    actual, expected = (testing.evaluate(f, call, order=2) for f in functions)
    for name, wanted in expected.items():
        assert wanted.isfinite().all()
        testing.assert_close(actual[name], wanted, rtol=1e-3, atol=1e-3, name=name)


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("backend", backends("modulated_mlp"))
def test_gradients_of_modulation_that_no_point_reads_are_zero(backend, channels):
    device = device_of(backend)
    weights = [torch.rand(4, 3, device=device), torch.rand(2, 4, device=device)]
    shape = (1, 2, 4) if channels else (1, 2)
    for _ in range(3):  # memory that was written to before
        torch.full((8,), 7.0, device=device)
        modulation = torch.rand(shape, device=device, requires_grad=True)
        y = camkernels.modulated_mlp(torch.rand(0, 3, device=device), weights, None, modulation, backend=backend)
        (gradient,) = torch.autograd.grad(y.sum(), modulation)
        assert torch.equal(gradient, torch.zeros_like(modulation))


@pytest.mark.parametrize("few", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("width", [16, 48])
@pytest.mark.parametrize("backend", [b for b in backends("modulated_mlp") if b != "reference"])
def test_layers_of_few_columns(backend, width, few):
    """Few outputs, and few inputs for the gradients in x, of layers without padding: products of another form."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x": (101, few), "weights.0": (width, few), "weights.1": (width, width), "weights.2": (few, width)}
    sizes |= {"biases.0": (width,), "biases.1": (width,), "biases.2": (few,)}
    inputs = {name: torch.rand(*size, generator=generator, dtype=torch.float64) - 0.5 for name, size in sizes.items()}
    call = testing.Call({name: t.to(device_of(backend)) for name, t in inputs.items()}, {"activation": "silu"})
    functions = (function_of("modulated_mlp", backend), definition_of("modulated_mlp"))
    actual, expected = (testing.evaluate(f, call, order=2) for f in functions)
    for name, wanted in expected.items():
        testing.assert_close(actual[name], wanted, rtol=1e-12, atol=1e-12, name=name)
    single = testing.Call({name: t.float() for name, t in call.inputs.items()}, call.options)
    found = testing.evaluate(functions[0], single, order=1)
    for name, tensor in found.items():
        testing.assert_close(tensor.double(), expected[name], rtol=1e-4, atol=1e-5, name=name)


@pytest.mark.parametrize("channels", [False, True], ids=["scalar", "channels"])
@pytest.mark.parametrize("backend", [b for b in backends("modulated_mlp") if b != "reference"])
def test_wide_layers_in_float32_err_as_the_root_of_their_width(backend, channels):
    """Several draws side by side: in one, the two sums over all points that are a shared scale and shift may cancel."""
    width, longest = (1024, 2**10) if backend == "cpu" else (256, 700)
    options = {"width": width, "features": 700, "hidden": 1, "leading": (70,), "output_layer": False, "norm": None}
    case = testing.Case("modulated_mlp", "wide", make_mlp, options | {"modulation": ((1,), channels)})
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for seed in range(4):
        call = case.make(torch.float32, device_of(backend), seed)
        exact = replace(call, inputs={name: t.double() for name, t in call.inputs.items()})
        actual = testing.evaluate(function_of(case.op, backend), call, order=2, seed=seed)
        expected = testing.evaluate(definition_of(case.op), exact, order=2, seed=seed, rounded=torch.float32)
        for name, wanted in expected.items():
            found.setdefault(name, []).append((actual[name].double(), wanted))
    for name, pairs in found.items():
        quantity = "grad.parameters" if name.startswith("grad") else name.partition(".")[0]
        rtol, atol = (t * (longest / 2**7) ** 0.5 for t in testing.tolerance(torch.float32, quantity))
        got, wanted = (torch.stack(side) for side in zip(*pairs, strict=True))
        testing.assert_close(got, wanted, rtol=rtol, atol=atol, name=name)
