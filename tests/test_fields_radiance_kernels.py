# SPDX-License-Identifier: MIT
"""The radial kernels of TensoRF and K-planes against the same arithmetic written out, and where they are placed; angles
of directions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from camkernels.fields import KPlanesKernels, TensoRFKernels, spherical
from camkernels.fields.neurbf_radiance import volume_weights


def made(kind: str) -> nn.Module:
    """A piece in float64 with parameters that are nowhere 0."""
    piece = TensoRFKernels(40, 6, width=10, features=7) if kind == "tensorf" else KPlanesKernels(40, 6, features=7)
    piece = piece.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in piece.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        spread = torch.randn(40, 3, 3, generator=generator, dtype=torch.float64)
        piece.basis.shapes.copy_((spread @ spread.mT + torch.eye(3)).flatten(1))
    return piece.requires_grad_()


def kernels_written_out(x: Tensor, piece: nn.Module, count: int, normalize: bool) -> Tensor:
    """Inverse quadratics of the nearest `count` centers, weighted features summed; the normaliser is a constant."""
    centers, shapes, features = piece.basis.centers, piece.basis.shapes.unflatten(1, (3, 3)), piece.basis.features
    near = torch.cdist(x, centers).argsort(-1)[:, :count]
    offset = x[:, None] - centers[near]
    weights = 1 / (1 + torch.einsum("pki,pkij,pkj->pk", offset, shapes[near], offset))
    if normalize:
        weights = weights / (weights.detach().sum(-1, keepdim=True) + 1e-8)
    return (weights[..., None] * features[near]).sum(1)


def written_out(kind: str, x: Tensor, grid: Tensor, piece: nn.Module) -> Tensor:
    if kind == "kplanes":
        return torch.sin(torch.cat([grid, kernels_written_out(x, piece, 8, True)], -1) + piece.bias)
    h = torch.cat([grid, kernels_written_out(x, piece, 5, False)], -1) + piece.bias
    z = h @ piece.mix.weight.mT
    lowest, highest = math.log2(0.3), math.log2(10)
    frequencies = torch.exp2(torch.linspace(lowest, highest, 10)).double()
    return z + torch.sin(z * frequencies)


@pytest.mark.parametrize("backend", ["best", "reference"])
@pytest.mark.parametrize("kind", ["tensorf", "kplanes"])
def test_values_and_gradients_are_those_of_the_arithmetic_written_out(kind, backend, monkeypatch):
    monkeypatch.setenv("CAMKERNELS_BACKEND", "" if backend == "best" else backend)
    piece = made(kind)
    generator = torch.Generator().manual_seed(1)
    x = (2 * torch.rand(30, 3, generator=generator, dtype=torch.float64) - 1).requires_grad_()
    grid = torch.randn(30, 6, generator=generator, dtype=torch.float64).requires_grad_()
    y, expected = piece(x, grid), written_out(kind, x, grid, piece)
    assert torch.allclose(y, expected, rtol=1e-11, atol=1e-11)
    cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    wanted = [x, grid, *piece.parameters()]
    for own, theirs in zip(
        torch.autograd.grad(y, wanted, cotangent), torch.autograd.grad(expected, wanted, cotangent), strict=True
    ):
        assert torch.allclose(own, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind, bias, others", [("tensorf", "lcb0", ["basis_mat.weight"]), ("kplanes", "kpb", [])])
def test_parameters_of_the_public_code_are_taken_over(kind, bias, others):
    piece, other = made(kind), made(kind)
    state = {name: view.detach() + 1 for name, view in piece.official_views(piece.state_dict()).items()}
    assert set(state) == {"kc0.weight", "ks0.weight", "lc0.weight", bias, *others}
    other.load_official(state)
    x, grid = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in piece.parameters():
            parameter += 1
    assert torch.equal(piece(x, grid), other(x, grid))


def test_kernels_are_placed_where_the_volume_changes():
    side = 24
    z, y, x = torch.meshgrid(*[torch.linspace(-2, 2, side)] * 3, indexing="ij")
    inside = ((x - 0.5) ** 2 + y**2 + z**2 < 1).float()
    weights = volume_weights(10 * inside, torch.stack([inside, 2 * inside])).flatten()
    points = torch.stack([x, y, z], -1).flatten(0, 2)
    piece = KPlanesKernels(60, 4)
    for _ in range(2):  # the same again
        piece.place(points, weights, [-2] * 3, [2] * 3, [side] * 3, generator=torch.Generator().manual_seed(0))
        before = piece.basis.centers.clone()
    assert torch.equal(before, piece.basis.centers)
    away = (piece.basis.centers - torch.tensor([0.5, 0, 0])).norm(dim=-1)
    assert (away > 0.6).all() and (away < 1).all()
    widths = torch.linalg.eigvalsh(piece.basis.shapes.unflatten(1, (3, 3))).rsqrt()
    assert (widths < 0.4001 * 3**0.5).all() and (widths > 0.999e-3).all()


def test_weights_of_a_volume():
    features = torch.zeros(1, 3, 3, 5)
    features[..., 2:] = 2.0  # scaled to 1; along the last axis a step between 1 and 2
    weights = volume_weights(torch.full((3, 3, 5), 1.0), features)
    expected = (1 - math.exp(-1)) * torch.tensor([0, 0.5, 0.5, 0, 0])
    assert torch.allclose(weights, expected.expand(3, 3, 5))


def test_weights_up_to_a_share_of_their_mean_are_dropped():
    features = torch.tensor([0.0, 1.0, 3.0, 6.0]).expand(1, 3, 3, 4)
    weights = volume_weights(torch.full((3, 3, 4), 1.0), features)  # as 0.5, 1.5, 2.5, 1.5, whose mean is 1.5
    for threshold, dropped in ((0.0, []), (0.3, []), (0.5, [0]), (1.1, [0, 1, 3])):
        expected = weights.clone()
        expected[..., dropped] = 0
        assert torch.equal(volume_weights(torch.full((3, 3, 4), 1.0), features, threshold=threshold), expected)


def test_iterations_of_the_placement_are_chosen_and_seen():
    points, weights, seen = torch.rand(50, 3), torch.ones(50), []
    KPlanesKernels(9, 4).place(
        points, weights, [0] * 3, [1] * 3, [8] * 3, iterations=2,
        progress=lambda steps: (seen.append(i) or i for i in steps),
    )  # fmt: skip
    assert seen == [0, 1]


def test_features_that_are_alike_everywhere_weigh_nothing():
    assert not volume_weights(torch.ones(4, 4, 4), torch.ones(3, 4, 4, 4)).any()


@pytest.mark.parametrize("build", [lambda: TensoRFKernels(9, 4, width=8), lambda: KPlanesKernels(9, 4)])
def test_a_whole_official_state_is_taken_in_part(build):
    field = build()
    names = field.official_views(field.state_dict())
    state = {name: torch.rand_like(view) for name, view in names.items()}
    field.load_official({**state, "density_plane.0": torch.rand(3), "kci0": torch.zeros(1)})
    for name, view in field.official_views(field.state_dict()).items():
        assert torch.equal(view, state[name])
    state.popitem()
    with pytest.raises(ValueError, match=r"load_official: the state lacks"):
        field.load_official(state)


# ---- directions along the axis ---------------------------------------------------------------------------------------


def test_directions_along_the_axis_have_no_gradient_of_angles():
    directions = torch.tensor([[0.0, 0, 1], [0, 0, -1], [0, 0, 0], [1, 0, 0], [0, 2, 0]], requires_grad=True)
    angles = spherical(directions)
    expected = [[0.5, 0.5, 0.5, 0.5, 0.75], [-1, 1, 0, 0, 0]]
    torch.testing.assert_close(angles, torch.tensor(expected))
    angles.sum().backward()
    assert directions.grad.isfinite().all() and not directions.grad[:2].any()
    leaf = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(spherical, leaf)
    vertical = torch.tensor([[0.0, 0, 1], [0, 0, 0]], requires_grad=True)
    (first,) = torch.autograd.grad(spherical(vertical).sum(), vertical, create_graph=True)
    first.square().sum().backward()
    assert vertical.grad.isfinite().all()
    assert torch.func.jvp(spherical, (vertical.detach(),), (torch.ones(2, 3),))[1].isfinite().all()
