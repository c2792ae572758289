# SPDX-License-Identifier: MIT
"""On a GPU: nearest centres are exact, and found without the CPU. As for test_cuda.py, REHEARSAL=1 shows elsewhere that
the tests themselves are right; what needs no GPU is tested in test_cuda_simulated_neighbors.py."""

from __future__ import annotations

import pytest
import torch

from camkernels import NeighborIndex, RadialBasis, nearest, neighbors
from test_cuda import DEVICE, NO_GPU, REHEARSAL
from test_neighbors import CLOUDS, expected, queries, rand

pytestmark = [pytest.mark.cuda, *([] if REHEARSAL else [NO_GPU])]


@pytest.fixture(autouse=True)
def needs_kernels() -> None:
    if neighbors.home_of(torch.device(DEVICE, 0 if DEVICE == "cuda" else None)).type != DEVICE:
        pytest.skip(f"no kernels of nearest on {DEVICE}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_neighbors_are_exact(cloud: str, dims: int, dtype: torch.dtype) -> None:
    centers = CLOUDS[cloud](dims).to(dtype)
    x = queries(centers).to(dtype)
    index = NeighborIndex(centers.to(DEVICE))
    assert index.device.type == DEVICE
    for k in {min(k, len(centers)) for k in (1, 4, 64, 65, len(centers))}:
        rows, squares = index.search(x.to(DEVICE), k)
        wanted = expected(x, centers, k)
        assert rows.device.type == squares.device.type == DEVICE
        assert torch.equal(rows.long().cpu(), wanted[0]) and torch.equal(squares.cpu(), wanted[1].to(dtype))


@pytest.mark.parametrize(("dims", "count", "k"), [(2, 20_000, 4), (3, 100_000, 8)])
def test_many_points_as_the_cpu_finds_them(dims: int, count: int, k: int) -> None:
    centers, x = rand(count, dims).float(), rand(300_000, dims, seed=1, low=-0.1, high=1.1).float()
    found = nearest(x.to(DEVICE), centers.to(DEVICE), k, return_squared_distances=True)
    wanted = nearest(x, centers, k, return_squared_distances=True)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


def test_a_seed_places_kernels_with_the_same_bits_again() -> None:
    points, weights = rand(200_000, 2).to(DEVICE), rand(200_000, seed=1).to(DEVICE)
    found = []
    for _ in range(3):  # with thousands of points to a sum
        generator = torch.Generator(DEVICE).manual_seed(0)
        centers = neighbors.weighted_kmeans(points, weights, 20, iterations=3, generator=generator)
        found.append(torch.cat([centers, neighbors.second_moments(points, weights, centers)], -1))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@NO_GPU
@pytest.mark.parametrize("k", [3, 70])
def test_points_that_are_not_finite_have_no_neighbors(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, centers = rand(50, 2).to(DEVICE), rand(90, 2, seed=1).to(DEVICE)
    x[7, 1] = torch.nan
    rows, squares = nearest(x, centers, k, return_squared_distances=True)
    assert rows[7].eq(-1).all() and squares[7].isnan().all() and rows[8:].ge(0).all()
    monkeypatch.setenv("CAMKERNELS_CHECK", "1")
    with pytest.raises(ValueError, match="nearest: x must be finite, got 1 points"):
        nearest(x, centers, k)


@NO_GPU
def test_a_layer_that_moves_searches_where_it_is() -> None:
    torch.manual_seed(0)
    layer = RadialBasis(50, 2, 3, neighbors=4)
    with torch.no_grad():
        layer.centers.uniform_()
        layer.shapes.uniform_()
    x = rand(20, 2).float()
    before = layer(x)
    torch.testing.assert_close(layer.to(DEVICE)(x.to(DEVICE)).cpu(), before)
    assert layer._index.device.type == DEVICE
