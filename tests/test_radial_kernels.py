# SPDX-License-Identifier: MIT
"""What the kernels of radial_basis do beyond its cases: many pairs, long phases, neighbours that nobody checked."""

import pytest
import torch

import camkernels
from camkernels import testing
from conftest import backends

BACKENDS = [backend for backend in ("cpu",) if backend in backends("radial_basis")]


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call_of(points, kernels, per_point):
    """Points of which some have no value, each with random neighbours."""
    x = rand(points, 2)
    x[::97] = torch.nan
    neighbors = None if per_point is None else (rand(points, per_point, seed=1) * kernels).int()
    inputs = {"x": x, "centers": rand(kernels, 2, seed=2), "shapes": rand(kernels, 3, seed=3), "phase": rand(4, seed=4)}
    inputs["features"] = rand(kernels, 5, seed=5)
    options = {"kind": "ivq", "shape": "symmetric", "detach_normalizer": False, "keep": 1, "neighbors": neighbors}
    return testing.Call(inputs, options | {"frequencies": torch.tensor([0.5, 1.0, 2.0, 4.0]).double()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(40000, 70, 4), (1500, 100, None), (50, 300000, 2), (45000, 90000, 4)], ids=str)
def test_more_pairs_than_are_kept_at_a_time_and_more_kernels_than_pairs(sizes, backend):
    call = call_of(*sizes)
    functions = (lambda **rest: camkernels.radial_basis(**rest, backend=backend), camkernels.reference.radial_basis)
    actual, expected = (testing.evaluate(function, call, order=2) for function in functions)
    finite = call.inputs["x"].isfinite().all(-1, keepdim=True)
    for name, wanted in expected.items():
        got = actual[name]
        if name == "second.x":  # undefined where there is no value
            got, wanted = (torch.where(finite, t, 0.0) for t in (got, wanted))
        testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11, name=name)


def waves_of(phase, dtype, backend):
    """sin(phase) [n], by one kernel of weight 1, in the dtype of features."""
    one, constants = torch.ones(1, 1), torch.zeros(len(phase))
    y = camkernels.radial_basis(
        one, one, one, torch.ones(1, len(phase), dtype=dtype), kind="qd", frequencies=constants, phase=phase,
        backend=backend,
    )  # fmt: skip
    return y[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("largest", [1.0, 1e3, 9.9e5, 1e8])
def test_phases_of_any_size_keep_the_digits_of_float32(largest, dtype, backend):
    """Whatever the features are stored in: a value below 1 is rounded to it once, by half an ulp at most."""
    phase = (rand(4096) * 2 - 1).mul(largest).float().requires_grad_()
    y = waves_of(phase, dtype, backend)
    (slope,) = torch.autograd.grad(y.sum(), phase)
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 4
    assert y.dtype == dtype and (y - phase.double().sin()).abs().max() < 1.3e-7 + rounding
    assert slope.dtype == torch.float32 and (slope - phase.double().cos()).abs().max() < 1.3e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_phases_stay_float32_under_autocast(dtype, backend):
    phase = (rand(4096) * 8192 - 4096).float().requires_grad_()
    y = waves_of(phase, torch.float32, backend)
    with torch.autocast("cpu", dtype):
        rounded = waves_of(phase, torch.float32, backend)
    assert torch.equal(rounded, y.to(dtype))
    slopes = [torch.autograd.grad(v.float().sum(), phase)[0] for v in (y, rounded)]
    assert torch.equal(*slopes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [-1, 9, -(2**31), 2**32, 2**32 + 1, -(2**33)])
def test_a_neighbour_that_names_no_kernel_makes_its_point_nan_where_values_cannot_be_looked_at(wrong, backend):
    x, features = rand(6, 2), rand(9, 4, seed=2).requires_grad_()
    centers, shapes = rand(9, 2, seed=1), torch.eye(2).double().flatten().expand(9, 4)
    neighbors = (torch.arange(12) % 9).reshape(6, 2)
    neighbors[2, 1] = wrong
    dtype = torch.int32 if abs(wrong) < 2**31 else torch.int64

    def of_point(x, neighbors):
        return camkernels.radial_basis(x, centers, shapes, features, neighbors, backend=backend)

    y = torch.vmap(of_point)(x, neighbors.to(dtype))
    assert y.isnan().any(-1).tolist() == [False, False, True, False, False, False] and y[2].isnan().all()
    (found,) = torch.autograd.grad(y.sum(), features)
    neighbors[2, 1] = 0
    (whole,) = torch.autograd.grad(of_point(x, neighbors)[[0, 1, 3, 4, 5]].sum(), features)
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_have_the_same_bits_for_any_number_of_threads(backend):
    """With more features than the loops take at a time."""
    generator = torch.Generator().manual_seed(0)
    x, centers, features = (torch.rand(*size, generator=generator) for size in ((300, 3), (200, 3), (200, 48)))
    shapes, grad = torch.rand(200, 9, generator=generator), torch.rand(300, 48, generator=generator)
    neighbors = torch.randint(200, (300, 5), generator=generator)
    frequencies = torch.rand(45, generator=generator) * 30

    def gradients(threads):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, centers, shapes, features)]
        y = camkernels.radial_basis(*leaves, neighbors, frequencies=frequencies, keep=3, backend=backend)
        return torch.autograd.grad(y, leaves, grad)

    before = torch.get_num_threads()
    try:
        alone, together = gradients(1), gradients(2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("kernels", [100, 1 << 14])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_too_large_for_the_caches_has_the_bits_of_its_parts(kernels, backend):
    """In the points' own order and, with many kernels, in another one."""
    points, features = 1 << 16, 64
    x = rand(points, 2).float()
    x[::97] = torch.nan
    neighbors = (rand(points, 2, seed=1) * kernels).int()
    rest = [rand(kernels, *size, seed=2).float() for size in ((2,), (4,), (features,))]
    options = {"frequencies": rand(features, seed=3).float(), "backend": backend}
    parts = [
        camkernels.radial_basis(a, *rest, b, **options) for a, b in zip(x.chunk(4), neighbors.chunk(4), strict=True)
    ]
    whole = camkernels.radial_basis(x, *rest, neighbors, **options)
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=0, equal_nan=True)
