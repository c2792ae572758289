# SPDX-License-Identifier: MIT
"""The definitions of the modulated MLP family agree with PyTorch's own functions, in every form of their arguments."""

import math

import pytest
import torch
import torch.nn.functional as F

from camkernels import GridGeometry
from camkernels._modulation import ACTIVATIONS
from camkernels.reference import coordinate_modulation, hash_grid, hash_grid_mlp, modulate, modulated_mlp


def rand(*shape, seed=0, low=-1.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_lookup_is_that_of_grid_sample(dims, padding, align_corners):
    grid = rand(1, 6, *(4, 5, 6)[:dims])
    coords = rand(200, dims, low=-1.6, high=1.6)
    coords[:3] = torch.tensor([[1.0], [-1.0], [0.0]])  # where its derivative is one-sided
    coords.requires_grad_()
    shaped = coords.reshape(1, -1, *[1] * (dims - 1), dims)
    expected = F.grid_sample(grid, shaped, padding_mode=padding, align_corners=align_corners).reshape(6, -1).t()
    options = {"padding": padding, "align_corners": align_corners}
    found = coordinate_modulation(coords, grid.reshape(3, 2, *grid.shape[2:]), **options).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    ct = rand(200, 6, seed=1)
    a, b = (torch.autograd.grad(y, coords, ct)[0] for y in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 4])
def test_channels_are_so_many_grids(dims):
    grids, coords = rand(2, 2, 3, *(4, 3, 2, 5)[:dims]), rand(9, dims)
    together = coordinate_modulation(coords, grids)
    assert together.shape == (9, 2, 2, 3)
    for channel in range(3):
        assert torch.equal(together[..., channel], coordinate_modulation(coords, grids[:, :, channel]))


def test_a_plane_product_is_three_lookups():
    grids, coords = rand(2, 2, 3, 4, 5), rand(9, 3, low=-1.3, high=1.3)
    found = coordinate_modulation(coords, grids, combine="plane_product", padding="zeros")
    expected = torch.ones(9, 2, 2, dtype=torch.float64)
    for k, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
        pair = torch.stack([coords[:, a], coords[:, b]], -1)
        expected *= coordinate_modulation(pair, grids[:, :, k], padding="zeros")
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("combine", ["single", "plane_product"])
@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_coordinates_that_are_not_finite(padding, combine):
    nan, inf = float("nan"), float("inf")
    coords = torch.tensor([[nan, 0.1, 0.2], [nan, 5.0, inf], [inf, -inf, 0.3], [0.3, 0.6, 0.9]], requires_grad=True)
    grids = rand(2, 2, *((3, 4, 5) if combine == "plane_product" else (4, 5, 6))).float().requires_grad_()
    y = coordinate_modulation(coords, grids, padding=padding, combine=combine)
    assert y[:2].isnan().all() and y[3].isfinite().all()
    if padding == "zeros":
        assert (y[2] == 0).all()
    else:
        assert torch.equal(y[2], coordinate_modulation(coords[2].clamp(-1, 1), grids, combine=combine))
    for cotangent in (1.0, 0.0, nan):
        dx, touched = torch.autograd.grad(y[:2], (coords, grids), torch.full_like(y[:2], cotangent), retain_graph=True)
        assert dx[:2].isnan().all() and not touched.any()
    dx, touched = torch.autograd.grad(y[2:].sum(), (coords, grids))
    assert dx[2:].isfinite().all() and (dx[2, :2] == 0).all() and touched.isfinite().all() and touched.any()


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_an_infinite_coordinate_on_an_axis_of_one_node_is_a_far_one(padding):
    coords = torch.tensor([[0.3, float("inf")], [-0.2, -float("inf")]], requires_grad=True)
    grids = rand(2, 2, 1, 4).float().requires_grad_()
    y = coordinate_modulation(coords, grids, padding=padding)
    far = coordinate_modulation(coords.detach().clamp(-9, 9), grids, padding=padding)
    assert torch.equal(y, far) and y.isfinite().all()
    assert torch.autograd.grad(y.sum(), coords)[0].isfinite().all()


def test_second_derivatives_beside_a_node_are_not_rounded_away():
    grids, direction = rand(2, 2, 4, 4), rand(2)
    found = []
    for dtype in (torch.float32, torch.float64):
        u = torch.tensor([-1 / 3, 0.2], dtype=torch.float32).to(dtype).requires_grad_()  # 6e-8 cells beside a node
        y = coordinate_modulation(u, grids.to(dtype))
        (slope,) = torch.autograd.grad(y.sum(), u, create_graph=True)
        found.append(torch.autograd.grad((slope * direction.to(dtype)).sum(), u)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "shape", "peer"),
    [
        ("point", (4, 5, 6), lambda h: F.layer_norm(h, (6,), eps=1e-3)),
        ("ray", (4, 5, 6), lambda h: F.layer_norm(h, (5, 6), eps=1e-3)),
        ("frame", (2, 3, 4, 5), lambda h: F.group_norm(h, 3, eps=1e-3)),
    ],
)
def test_norms_are_those_of_pytorch(norm, shape, peer):
    h, gamma, beta = rand(*shape), rand(*shape, seed=1), rand(*shape, seed=2)
    found = modulate(h, gamma, beta, norm=norm, eps=1e-3, activation=None)
    torch.testing.assert_close(found, gamma * peer(h) + beta, rtol=1e-13, atol=1e-13)


PEERS = {
    None: lambda z: z,
    "relu": torch.nn.ReLU(),
    "leaky_relu": torch.nn.LeakyReLU(),
    "gelu": torch.nn.GELU(),
    "silu": torch.nn.SiLU(),
    "softplus": torch.nn.Softplus(),
    "sigmoid": torch.nn.Sigmoid(),
    "tanh": torch.nn.Tanh(),
    "exponential": lambda z: math.e**z,
    "squareplus": lambda z: (z + torch.hypot(z, torch.tensor(2.0))) / 2,
    "sine": lambda z: torch.sin(3 * z),
    "residual_sine": lambda z: z + torch.sin(z * torch.arange(1.0, 7.0)),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_mean_what_pytorch_means(activation):
    h, gamma, beta = rand(40, 6, low=-5.0, high=5.0), rand(6, seed=1), rand(40, 1, seed=2)
    found = modulate(h, gamma, beta, activation=activation, omega=3.0, frequencies=torch.arange(1.0, 7.0))
    torch.testing.assert_close(found, PEERS[activation](gamma * h + beta), rtol=1e-13, atol=1e-13)


def test_frequencies_of_frames_belong_to_channels():
    h, one, zero = rand(2, 3, 4, 5), torch.ones(()), torch.zeros(())
    m = torch.tensor([1.0, 2.0, 5.0])
    options = {"activation": "residual_sine", "frequencies": m}
    found = modulate(h, one, zero, norm="frame", **options)
    last = modulate(modulate(h, one, zero, norm="frame", activation=None).movedim(1, -1), one, zero, **options)
    assert torch.equal(found, last.movedim(-1, 1))


def test_layers_by_hand():
    x, gamma, beta = rand(7, 3), rand(7, 2, seed=1), rand(7, 2, seed=2)
    weights = [rand(5, 3, seed=3), rand(4, 8, seed=4), rand(2, 4, seed=5)]
    biases = [rand(len(w), seed=6 + i) for i, w in enumerate(weights)]
    found = modulated_mlp(
        x, weights, biases, torch.stack([gamma, beta], -1), norm="point", eps=1e-3, skips=[0],
        activation=["sine", "tanh"], omega=[3.0, 9.0], output_activation="sigmoid",
    )  # fmt: skip
    h = F.layer_norm(x @ weights[0].t() + biases[0], (5,), eps=1e-3)
    h = torch.cat([torch.sin(3 * (gamma[:, :1] * h + beta[:, :1])), x], -1)
    h = F.layer_norm(h @ weights[1].t() + biases[1], (4,), eps=1e-3)
    h = torch.tanh(gamma[:, 1:] * h + beta[:, 1:])
    expected = torch.sigmoid(h @ weights[2].t() + biases[2])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("leading", "shape", "per_channel"),
    [
        ((6,), (2, 2), False),
        ((6,), (6, 2, 2), False),
        ((6,), (1, 2, 2), False),
        ((6,), (2, 2, 2), True),  # of 2 hidden layers and width 2; as scalars they would be 2 points
        ((2,), (2, 2, 2), False),  # both readings fit: the one that has an axis for the points
        ((2,), (2, 2, 2, 2), True),
        ((), (2, 2), False),
        ((), (2, 2, 2), True),
        ((3, 4), (4, 2, 2), False),
        ((3, 4), (3, 1, 2, 2), False),
        ((3, 4), (3, 1, 2, 2, 2), True),
    ],
)
def test_forms_of_modulation(leading, shape, per_channel):
    x, weights, modulation = (
        rand(*leading, 3),
        [rand(2, 3), rand(2, 2, seed=1), rand(1, 2, seed=2)],
        rand(*shape, seed=3),
    )
    full, h = modulation if per_channel else modulation.unsqueeze(-1), x
    for i in range(2):
        h = F.relu(full[..., i, 0, :] * (h @ weights[i].t()) + full[..., i, 1, :])
    torch.testing.assert_close(modulated_mlp(x, weights, None, modulation), h @ weights[2].t(), rtol=1e-13, atol=1e-13)


# ---- types and orders ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once_at_the_end(dtype):
    x, modulation = rand(9, 3).float(), rand(9, 2, 2, seed=9).to(dtype)
    weights = [rand(*shape, seed=i).to(dtype) for i, shape in enumerate([(16, 3), (16, 16), (2, 16)])]
    options = {"norm": "point", "activation": "silu"}
    exact = modulated_mlp(x, [w.float() for w in weights], None, modulation.float(), **options)
    assert exact.dtype == torch.float32
    assert torch.equal(modulated_mlp(x, weights, None, modulation, **options), exact.to(dtype))
    h, gamma, beta = (t.to(dtype) for t in (rand(9, 5), rand(9, 1, seed=1), rand(5, seed=2)))
    exact = modulate(h.float(), gamma.float(), beta.float(), **options)
    assert torch.equal(modulate(h, gamma, beta, **options), exact.to(dtype))
    coords, grids = rand(9, 2).float(), rand(2, 2, 4, 5).to(dtype)
    assert torch.equal(coordinate_modulation(coords, grids), coordinate_modulation(coords, grids.float()).to(dtype))


def test_one_float64_tensor_makes_the_computation_float64():
    x, modulation, weights = rand(9, 3), rand(9, 1, 2), [rand(8, 3), rand(1, 8)]
    for change in ("x", "modulation"):
        arguments = {"x": x.float(), "modulation": modulation.float()}
        arguments[change] = arguments[change].double()
        found = modulated_mlp(weights=[w.float() for w in weights], **arguments)
        exact = modulated_mlp(
            arguments["x"].double(), [w.float().double() for w in weights], None, arguments["modulation"]
        )
        assert found.dtype == torch.float32 and torch.equal(found, exact.float())


def test_third_derivatives_exist():
    x, grids = rand(5, 2).requires_grad_(), rand(2, 2, 4, 4, seed=1)
    weights = [rand(6, 2, seed=2), rand(6, 6, seed=3), rand(1, 6, seed=4)]
    value = modulated_mlp(x, weights, None, coordinate_modulation(x, grids), norm="point", activation="sine").sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = gradient.sum()
    assert gradient.abs().min() > 0


def test_hash_grid_mlp_is_the_two_ops():
    geometry = GridGeometry.build(2, 3, 2, 6, base_resolution=4, per_level_scale=1.5)
    x, table, modulation = rand(9, 2, low=0.0), rand(geometry.n_entries, 2, seed=1), rand(9, 1, 2, seed=2)
    weights, options = [rand(8, 6, seed=3), rand(1, 8, seed=4)], {"norm": "point", "activation": "tanh"}
    found = hash_grid_mlp(
        x, table, geometry, weights, None, modulation, interpolation="smoothstep", max_level=2, **options
    )
    features = hash_grid(x, table, geometry, interpolation="smoothstep", max_level=2)
    assert torch.equal(found, modulated_mlp(features, weights, None, modulation, **options))
