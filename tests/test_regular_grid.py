# SPDX-License-Identifier: MIT
"""Kernels on a regular grid: the neighbours of a point are the corners of its cell, by which hats interpolate."""

import itertools

import pytest
import torch

from camkernels import RadialBasis, radial_basis
from camkernels.neighbors import grid_centers, grid_neighbors

LOW, HIGH = torch.tensor([-1.0, 0.0, 2.0, -3.0]).double(), torch.tensor([1.0, 0.5, 7.0, -1.0]).double()
RESOLUTION = (4, 2, 5, 3)


def grid(dims, dtype=torch.float64):
    return LOW[:dims].to(dtype), HIGH[:dims].to(dtype), RESOLUTION[:dims]


def points(*shape, dims, beyond=0.0):
    low, high, _ = grid(dims)
    drawn = torch.rand(*shape, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return low + (high - low) * ((1 + 2 * beyond) * drawn - beyond)


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_nodes_are_those_of_the_axes(dims):
    low, high, resolution = grid(dims)
    axes = [torch.linspace(*ends, dtype=torch.float64) for ends in zip(low, high, resolution, strict=True)]
    expected = [node[::-1] for node in itertools.product(*(axis.tolist() for axis in axes[::-1]))]
    centers = grid_centers(low, high, resolution)
    torch.testing.assert_close(centers, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(centers[0], low) and torch.equal(centers[-1], high)


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_a_point_lies_between_its_neighbors(dims):
    low, high, resolution = grid(dims)
    x = points(20, 5, dims=dims)
    neighbors = grid_neighbors(x, low, high, resolution)
    assert neighbors.dtype == torch.int32 and neighbors.shape == (20, 5, 2**dims)
    corners = grid_centers(low, high, resolution)[neighbors]
    first, last = corners[..., 0, :], corners[..., -1, :]
    assert ((first <= x) & (x <= last)).all()
    torch.testing.assert_close(last - first, ((high - low) / (torch.tensor(resolution) - 1)).expand_as(x))
    for i, corner in enumerate(corners.unbind(-2)):  # the first axis fastest
        side = torch.tensor([bool(i >> axis & 1) for axis in range(dims)])
        assert torch.equal(corner, torch.where(side, last, first))


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_hats_as_wide_as_a_cell_interpolate(dims):
    low, high, resolution = grid(dims)
    centers = grid_centers(low, high, resolution)

    def function(x):  # linear along each axis
        return torch.stack([(x + 2).prod(-1), 3 * x.sum(-1) - 1], -1)

    shapes = ((torch.tensor(resolution) - 1) / (high - low)).expand_as(centers)
    x = points(100, dims=dims)
    y = radial_basis(
        x, centers, shapes, function(centers), grid_neighbors(x, low, high, resolution), kind="nlin", shape="diagonal",
        normalize=False,
    )  # fmt: skip
    torch.testing.assert_close(y, function(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_points_beyond_the_border_have_the_cell_that_is_nearest(dtype):
    low, high, resolution = grid(3, dtype)
    x = points(500, dims=3, beyond=1.0).to(dtype)
    clamped = x.clamp(low, high)
    assert (x != clamped).any(-1).sum() > 300
    neighbors = grid_neighbors(x, low, high, resolution)
    assert torch.equal(neighbors, grid_neighbors(clamped, low, high, resolution))
    inf, nan = float("inf"), float("nan")
    odd = torch.tensor([[inf, -inf, inf], [nan, 0.1, nan]], dtype=dtype)
    found = grid_neighbors(odd, low, high, resolution)
    last = torch.stack([high[0], low[1], high[2]]), torch.stack([low[0], low[1], low[2]])
    assert torch.equal(found, grid_neighbors(torch.stack(last), low, high, resolution))


def test_a_layer_takes_them():
    low, high, resolution = grid(2, torch.float32)
    layer = RadialBasis(8, 2, 3, neighbors=4)
    layer.centers.data.copy_(grid_centers(low, high, resolution))
    x = points(9, dims=2).float()
    y = layer(x, grid_neighbors(x, low, high, resolution))
    assert y.shape == (9, 3) and y.isfinite().all()
    assert layer(torch.full((1, 2), float("nan")), grid_neighbors(x[:1], low, high, resolution)).isnan().all()


def test_graphs_and_transforms_find_them():
    low, high, resolution = grid(3)
    x = points(9, dims=3)
    wanted = grid_neighbors(x, low, high, resolution)
    compiled = torch.compile(grid_neighbors, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, low, high, resolution), wanted)
    assert torch.equal(torch.vmap(lambda point: grid_neighbors(point, low, high, resolution))(x), wanted)


@pytest.mark.parametrize(
    ("error", "message", "low", "high", "resolution", "x"),
    [
        (ValueError, r"resolution must be from 2 on for 1 to 4 axes, below 2\^31", [0.0], [1.0], (1,), [[0.5]]),
        (ValueError, "resolution must be from 2 on", [0.0] * 5, [1.0] * 5, (2,) * 5, [[0.5] * 5]),
        (ValueError, "resolution must be from 2 on", [0.0] * 2, [1.0] * 2, (2**16, 2**15), [[0.5] * 2]),
        (ValueError, r"low must have shape \[2\], got \[1\]; resolution has 2 axes", [0.0], [1.0], (2, 2), [[0.5] * 2]),
        (ValueError, "low must be below high, both finite", [1.0], [1.0], (2,), [[0.5]]),
        (ValueError, r"x must have shape \[..., 2\]", [0.0] * 2, [1.0] * 2, (2, 2), [[0.5]]),
        (TypeError, "x must be float32", [0.0], [1.0], (2,), [[1]]),
        (TypeError, "low must be float32", [0], [1.0], (2,), [[0.5]]),
    ],
)
def test_errors_say_what_is_wrong(error, message, low, high, resolution, x):
    with pytest.raises(error, match=f"^grid_neighbors: {message}"):
        grid_neighbors(torch.tensor(x), torch.tensor(low), torch.tensor(high), resolution)
