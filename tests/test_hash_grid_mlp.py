# SPDX-License-Identifier: MIT
"""hash_grid_mlp is its two ops, on every backend: in one kernel on Triton, else one after the other."""

import functools

import pytest
import torch

import camkernels
from camkernels import _backends
from conftest import DTYPES, backends, definition_of, device_of, function_of
from mlp_cases import FUSED, MLPS, agree, stays_finite_inside, taken

BACKENDS = [b for b in backends("hash_grid_mlp") if b != "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_it_is_its_two_ops(case, dtype, backend):
    functions = function_of("hash_grid_mlp", backend), definition_of("hash_grid_mlp")
    agree(case, *functions, dtype=dtype, device=device_of(backend), order=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c}-{b}") for b in backends("modulated_mlp") if b != "reference" for c in taken(MLPS, b)],
)
def test_an_mlp_of_many_points_and_wide_layers(case, dtype, backend):
    functions = function_of("modulated_mlp", backend), definition_of("modulated_mlp")
    agree(case, *functions, dtype=dtype, device=device_of(backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", backends("modulated_mlp"))
def test_sums_beyond_the_range_of_float16_stay_finite_inside(backend, dtype):
    stays_finite_inside(function_of("modulated_mlp", backend), dtype, device_of(backend))


@pytest.mark.parametrize("name", ["width", "return_jacobian"])
def test_an_option_of_neither_op_is_refused_by_name(name):
    call = FUSED[0].make()
    with pytest.raises(
        TypeError, match=rf"^hash_grid_mlp: there is no option {name}; it has interpolation, .*backend$"
    ):
        camkernels.hash_grid_mlp(**call.arguments(call.inputs), **{name: True})


def test_a_backend_that_has_the_two_ops_has_the_pair():
    for device in ("cpu", "cuda"):
        found = [_backends.can_run(device, _backends.Call(op, device)) for op in ("hash_grid", "modulated_mlp")]
        reason = next((r for r in found if r is not None), None)
        assert _backends.can_run(device, _backends.Call("hash_grid_mlp", device)) == reason


def test_layers_too_wide_for_triton_are_left_to_the_next_backend(monkeypatch):
    from camkernels.triton import MISSING, WIDEST

    if MISSING is not None:
        pytest.skip(MISSING)
    real = _backends.can_run
    monkeypatch.setattr(_backends, "can_run", lambda b, c: "not built" if b == "cuda" else real(b, c))
    for op in ("modulated_mlp", "hash_grid_mlp"):
        fits, wide = (_backends.Call(op, "cuda", widest=n) for n in (WIDEST, WIDEST + 1))
        assert _backends.choose(fits, None) == "triton" and _backends.choose(wide, None) == "reference"
        with pytest.raises(RuntimeError, match=rf"{op}: .* layers of up to {WIDEST} channels, got {WIDEST + 1}"):
            _backends.choose(wide, "triton")


def test_features_and_layers_count_as_channels(monkeypatch):
    calls = []
    real = _backends.can_run
    monkeypatch.setattr(_backends, "can_run", lambda b, c: calls.append(c) or real(b, c))
    call = FUSED[0].make()
    call.run(camkernels.hash_grid_mlp)
    assert {c.widest for c in calls if c.op == "hash_grid_mlp"} == {20}
    geometry = camkernels.GridGeometry.build(2, 16, 2, 8)
    camkernels.hash_grid_mlp(torch.rand(3, 2), torch.rand(geometry.n_entries, 2), geometry, [torch.rand(4, 32)])
    assert {c.widest for c in calls if c.op == "hash_grid_mlp"} == {20, 32}


@pytest.mark.parametrize("backend", backends("hash_grid_mlp"))
def test_autocast_rounds_the_output_of_the_pair_and_nothing_between(backend):
    call = FUSED[0].make(device=device_of(backend))
    run = functools.partial(call.run, function_of("hash_grid_mlp", backend))
    inputs = [t.requires_grad_() for t in call.inputs.values()]
    expected = run()
    with torch.autocast(device_of(backend), dtype=torch.bfloat16):
        y = run()
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected.bfloat16())
    cotangent = torch.rand_like(y)
    found = torch.autograd.grad(y, inputs, cotangent)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, inputs, cotangent.float()), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)
