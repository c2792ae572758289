# SPDX-License-Identifier: MIT
"""The definition of radial_basis gives the recorded results of the public code, and what its docstring says; so do the
backends where a case of the registry does not go: all functions of the public code, and singular points."""

import math

import pytest
import torch

from camkernels import testing
from camkernels._radial_basis import KINDS, SHAPES, shape_width
from camkernels.reference import radial_basis
from camkernels.reference.radial_basis import PROFILES
from conftest import backends, device_of, function_of

FORMS = {"s": "isotropic", "d": "diagonal", "a": "full", "f": "projected"}
RECORDED = [
    (name, kind)
    for name in testing.golden_names("rbf_functions__")
    for kind in testing.load_golden(name).hyper["kinds"]
]
CLOSE = {"rtol": 1e-13, "atol": 1e-13}
on_every_backend = pytest.mark.parametrize("backend", backends("radial_basis"))


def rand(*shape, seed=0, low=-1.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def positive(n, dims):
    """n positive matrices [n, dims * dims]."""
    roots = rand(n, dims, dims, seed=9)
    return (roots @ roots.mT + 0.5 * torch.eye(dims)).flatten(1)


# ---- recorded results of the public code -----------------------------------------------------------------------------


def test_all_functions_of_the_public_code_were_recorded():
    assert len(RECORDED) == 21 and {kind.rsplit("_", 1)[0] for _, kind in RECORDED} == set(KINDS)


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "kind"), RECORDED)
def test_values_and_gradients_of_the_public_code(name, kind, dtype, backend):
    golden, device = testing.load_golden(name), device_of(backend)
    family, form = kind.rsplit("_", 1)
    points, per_point, _ = golden.arrays["in.kc"].shape
    x, centers = (golden.tensor(key, dtype, device).requires_grad_() for key in ("in.x", "in.kc"))
    key, shapes = f"in.ks_{form}", torch.ones(points, per_point, 1, device=device)
    if key in golden:
        shapes = golden.tensor(key, dtype, device).requires_grad_()
    neighbors = torch.arange(points * per_point, dtype=torch.int32, device=device).reshape(points, per_point)
    one_hot = torch.eye(per_point, dtype=dtype, device=device).repeat(points, 1)
    flat = (centers.flatten(0, 1), shapes.flatten(0, 1).flatten(1))
    function = function_of("radial_basis", backend)
    y = function(x, *flat, one_hot, neighbors, kind=family, shape=FORMS[form], normalize=False)
    testing.assert_close_golden(y, golden, f"out.{kind}", dtype)
    leaves = {"in.x": x, "in.kc": centers, key: shapes}
    leaves = {name: leaf for name, leaf in leaves.items() if f"g.{name}@{kind}" in golden}
    assert len(leaves) >= 2
    gradients = torch.autograd.grad(y, leaves.values(), golden.tensor(f"ct.{kind}", dtype, device))
    for leaf, found in zip(leaves, gradients, strict=True):
        testing.assert_close_golden(found, golden, f"g.{leaf}@{kind}", dtype)


# ---- what it computes, by hand ---------------------------------------------------------------------------------------


def matrix(shape, row, dims):
    """The matrix that a row of shapes stands for."""
    if shape == "isotropic":
        return row * torch.eye(dims, dtype=row.dtype)
    if shape == "diagonal":
        return torch.diag(row)
    if shape == "symmetric":
        upper = torch.zeros(dims, dims, dtype=row.dtype)
        upper[tuple(torch.triu_indices(dims, dims))] = row
        return upper + upper.triu(1).mT
    return row.reshape(dims, dims)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_forms_of_shapes(dims, shape):
    x, centers = rand(5, dims), rand(4, dims, seed=1)
    shapes = rand(4, shape_width(shape, dims), seed=2, low=0.1)
    for kind in ("qd", "nlin"):
        found = radial_basis(x, centers, shapes, torch.eye(4).double(), kind=kind, shape=shape, normalize=False)
        for p in range(5):
            for k in range(4):
                o = x[p] - centers[k]
                t = matrix(shape, shapes[k], dims) @ o
                q = t @ t if shape == "projected" else o @ t
                expected = 1 + q if kind == "qd" else math.prod(max(0.0, 1 - abs(float(v))) for v in t)
                assert float(found[p, k]) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.parametrize("kind", PROFILES)
def test_kinds_are_functions_of_the_quadratic_form(kind):
    q = torch.linspace(0.1, 3, 9, dtype=torch.float64)
    by_hand = {
        "ivq": 1 / (1 + q), "ivmq": 1 / (1 + q).sqrt(), "ivd": 1 / q.sqrt(), "ivc": 1 / q**1.5, "gauss": (-q / 2).exp(),
        "sgauss2": (-q * q / 4).exp(), "nsgauss2": (-q).exp(), "markov": (-q.sqrt()).exp(),
        "expsin": (-q.sqrt().sin()).exp(), "qd": 1 + q, "mqd": (1 + q).sqrt(), "phs1": q.sqrt(), "phs3": q * q.sqrt(),
        "vep": 1 - q,
    }  # fmt: skip
    arguments = (
        q.sqrt().unsqueeze(-1),
        torch.zeros(1, 1).double(),
        torch.ones(1, 1).double(),
        torch.ones(1, 1).double(),
    )
    found = radial_basis(*arguments, kind=kind, shape="full", normalize=False).squeeze(-1)
    torch.testing.assert_close(found, by_hand[kind], rtol=1e-8, atol=0)


@pytest.mark.parametrize("per_point", [None, 1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_normalised_waves_of_weights(normalize, per_point):
    x, centers, shapes, features = rand(2, 3, 2), rand(6, 2, seed=1), positive(6, 2), rand(6, 5, seed=2)
    neighbors = None if per_point is None else rand(2, 3, 6, seed=3).argsort(-1)[..., :per_point]
    frequencies, phase = torch.tensor([0.5, 2.0, 40.0]).double(), rand(3, seed=4)
    found = radial_basis(
        x, centers, shapes, features, neighbors, kind="gauss", normalize=normalize, eps=1e-3, keep=2,
        frequencies=frequencies, phase=phase,
    )  # fmt: skip
    assert found.shape == (2, 3, 5)
    for i in range(2):
        for j in range(3):
            chosen = range(6) if neighbors is None else neighbors[i, j].tolist()
            o = [x[i, j] - centers[k] for k in chosen]
            phi = torch.stack([(-v @ shapes[k].reshape(2, 2) @ v / 2).exp() for v, k in zip(o, chosen, strict=True)])
            u = phi / (phi.sum() + 1e-3) if normalize else phi
            psi = [torch.cat([v.expand(2), torch.sin(frequencies * v + phase)]) for v in u]
            expected = sum(p * features[k] for p, k in zip(psi, chosen, strict=True))
            torch.testing.assert_close(found[i, j], expected, **CLOSE)


@pytest.mark.parametrize("waves", [False, True])
def test_a_detached_normaliser_is_a_constant_to_derivatives(waves):
    x, centers, shapes = (t.requires_grad_() for t in (rand(7, 3), rand(5, 3, seed=1), positive(5, 3)))
    features, options = rand(5, 4, seed=2), {"kind": "ivq"}
    frequencies = torch.tensor([1.0, 2.0, 3.0, 4.0]).double() if waves else None
    y = radial_basis(x, centers, shapes, features, **options, frequencies=frequencies)
    phi = radial_basis(x, centers, shapes, torch.eye(5).double(), **options, normalize=False)
    u = (phi / (phi.sum(-1, keepdim=True).detach() + 1e-8)).unsqueeze(-1)
    expected = ((torch.sin(u * frequencies) if waves else u) * features).sum(-2)
    torch.testing.assert_close(y, expected, **CLOSE)
    leaves = (x, centers, shapes)
    first = [torch.autograd.grad(v.square().sum(), leaves, create_graph=True) for v in (y, expected)]
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) for grads in first]
    for found, wanted in (first, second):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    true = radial_basis(x, centers, shapes, features, **options, frequencies=frequencies, detach_normalizer=False)
    assert not torch.allclose(torch.autograd.grad(true.square().sum(), x)[0], first[0][0])


# ---- where the formula is singular -----------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_at_a_centre_values_are_finite_and_singular_derivatives_zero(kind, dtype, backend):
    like = {"dtype": dtype, "device": device_of(backend)}
    centers = torch.tensor([[0.5, 0.25], [-0.5, 1.0]], **like).requires_grad_()
    x, shapes = centers[:1].detach().clone().requires_grad_(), positive(2, 2).to(**like).requires_grad_()
    function = function_of("radial_basis", backend)
    y = function(x, centers, shapes, torch.eye(2, **like), kind=kind, normalize=False)
    at_centre = {"ivd": 1e10, "ivc": 1e30, "phs1": 0.0, "phs3": 0.0}
    assert y[0, 0].item() == pytest.approx(at_centre.get(kind, 1.0), rel=1e-6)
    first = torch.autograd.grad(y[0, 0], (x, centers, shapes), create_graph=True, materialize_grads=True)
    if kind != "cos":  # which has no singularity there
        assert not any(g.any() for g in first)
    total = sum(g.sum() for g in first)
    if total.requires_grad:
        second = torch.autograd.grad(total, (x, centers, shapes), materialize_grads=True)
        assert all(g.isfinite().all() for g in second)


@on_every_backend
def test_a_hat_is_flat_where_it_peaks_and_ends(backend):
    like = {"dtype": torch.float64, "device": device_of(backend)}
    x, one = torch.tensor([[0.0], [0.5], [1.0], [2.0]], **like).requires_grad_(), torch.ones(1, 1, **like)
    y = function_of("radial_basis", backend)(x, 0 * one, one, one, kind="nlin", normalize=False)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.flatten().tolist() == [1, 0.5, 0, 0] and slope.flatten().tolist() == [0, -1, 0, 0]


@on_every_backend
def test_cosine_at_the_origin_is_finite(backend):
    device = device_of(backend)
    x = torch.zeros(1, 3, device=device, requires_grad=True)
    centers = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0]], device=device, requires_grad=True)
    constants = torch.ones(2, 1, device=device), torch.eye(2, device=device)
    y = function_of("radial_basis", backend)(x, centers, *constants, kind="cos", shape="isotropic", normalize=False)
    gradients = torch.autograd.grad(y.sum(), (x, centers))
    assert not y.any() and all(g.isfinite().all() for g in gradients)


@on_every_backend
def test_matrices_that_are_not_positive_follow_the_formula(backend):
    like, function = {"dtype": torch.float64, "device": device_of(backend)}, function_of("radial_basis", backend)
    x, center, shapes, feature = (torch.full((1, 1), v, **like) for v in (2.0, 0.0, -1.0, 1.0))
    for kind, expected in (("ivq", -1 / 3), ("vep", 5.0), ("gauss", math.e**2)):
        y = function(x, center, shapes, feature, kind=kind, normalize=False)
        assert float(y) == pytest.approx(expected)
    for kind in ("ivmq", "markov"):
        assert function(x, center, shapes, feature, kind=kind).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_points_that_are_not_finite_give_nan_and_add_nothing(kind):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[nan, 0.1], [0.3, inf], [-inf, nan], [0.2, 0.3]], requires_grad=True)
    parameters = [rand(3, 2, seed=1).float(), positive(3, 2).float(), rand(3, 4, seed=2).float()]
    parameters = [p.requires_grad_() for p in parameters]
    frequencies = torch.tensor([1.0, 2.0, 3.0, 4.0])
    y = radial_basis(x, *parameters, torch.tensor([[0, 1]] * 4), kind=kind, frequencies=frequencies)
    assert y[:3].isnan().all() and y[3].isfinite().all()
    for cotangent in (1.0, 0.0, nan):
        ct = torch.full_like(y[:3], cotangent)
        dx, *touched = torch.autograd.grad(y[:3], (x, *parameters), ct, retain_graph=True, materialize_grads=True)
        assert dx[:3].isnan().all() and not dx[3].any() and not any(t.any() for t in touched)


# ---- types, orders, sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once_at_the_end(dtype):
    x, parameters = rand(9, 2).float(), [t.to(dtype) for t in (rand(6, 2, seed=1), positive(6, 2), rand(6, 5, seed=2))]
    frequencies = torch.logspace(0, 12, 5, 2.0)  # phases of thousands of radians stay float32
    exact = radial_basis(x, *(p.float() for p in parameters), frequencies=frequencies)
    assert exact.dtype == torch.float32
    assert torch.equal(radial_basis(x, *parameters, frequencies=frequencies), exact.to(dtype))


@pytest.mark.parametrize("name", ["x", "centers", "shapes", "features"])
def test_one_float64_tensor_makes_the_computation_float64(name):
    exact = {"x": rand(9, 2), "centers": rand(6, 2, seed=1), "shapes": positive(6, 2), "features": rand(6, 5, seed=2)}
    arguments = {key: t.float() for key, t in exact.items()}
    arguments[name] = arguments[name].double()
    found = radial_basis(**arguments)
    wanted = radial_basis(**{key: t.double() for key, t in arguments.items()})
    assert found.dtype == arguments["features"].dtype and torch.equal(found, wanted.to(found.dtype))


def test_third_derivatives_exist():
    x = rand(5, 2).requires_grad_()
    value = radial_basis(x, rand(6, 2, seed=1), positive(6, 2), rand(6, 3, seed=2), detach_normalizer=False).sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = gradient.sum()
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_any_leading_axes_and_both_kinds_of_integers(leading, dtype):
    x, neighbors = rand(*leading, 3), torch.zeros(*leading, 2, dtype=dtype)
    y = radial_basis(x, rand(4, 3), positive(4, 3), rand(4, 6), neighbors)
    assert y.shape == (*leading, 6)
