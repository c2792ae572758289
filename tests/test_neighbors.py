# SPDX-License-Identifier: MIT
"""Nearest centres are exact for every cloud, by every method, with ties by row and for any number of threads."""

import copy
import pickle

import pytest
import torch

import camkernels
from camkernels import NeighborIndex, _info, _neighbor_cells, _ops, nearest, neighbors

needs_kernels = pytest.mark.skipif(_ops.cpu_isa is None, reason="no CPU library")
METHODS = [pytest.param("cells", marks=needs_kernels), "cKDTree", "exhaustive"]


def rand(*shape, seed=0, low=0.0, high=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low


def lattice(dims, each):
    axes = torch.meshgrid(*[torch.arange(each, dtype=torch.float64)] * dims, indexing="ij")
    return torch.stack(axes, -1).flatten(0, -2)[torch.randperm(each**dims, generator=torch.Generator().manual_seed(1))]


def cluster(n, dims, seed=2):
    return 1e-6 * rand(n, dims, seed=seed)


CLOUDS = {
    "uniform": lambda dims: rand(500, dims),
    "one": lambda dims: rand(1, dims),
    "lattice": lambda dims: lattice(dims, {1: 300, 2: 18, 3: 7, 4: 4}[dims]),
    "duplicates": lambda dims: rand(20, dims).repeat(12, 1),
    "all alike": lambda dims: torch.full((60, dims), 0.25, dtype=torch.float64),
    "clusters": lambda dims: torch.cat([cluster(150, dims), 1 + cluster(150, dims, seed=3), rand(50, dims)]),
    "line": lambda dims: torch.linspace(0, 1, 300, dtype=torch.float64).unsqueeze(-1).expand(-1, dims),
    "axis": lambda dims: torch.cat([rand(300, 1), torch.zeros(300, dims - 1, dtype=torch.float64)], -1),
    "outlier": lambda dims: torch.cat([rand(300, dims), torch.full((1, dims), 1e6, dtype=torch.float64)]),
    "huge and tiny": lambda dims: torch.cat([1e30 * rand(100, dims, low=-1.0), 1e-30 * rand(100, dims)]),
}


def queries(centers):
    low, high = centers.amin(0), centers.amax(0)
    inside = low + (high - low) * rand(60, centers.shape[1], seed=5)
    middles = (centers[:40] + centers[-40:].flip(0)[: len(centers[:40])]) / 2
    return torch.cat([inside, centers[:40], middles, low - 100 * (1 + high - low) * rand(10, centers.shape[1], seed=6)])


def expected(x, centers, k):
    """By the definition: all distances in float64, sorted by distance, then by row."""
    squares = torch.zeros(*x.shape[:-1], len(centers), dtype=torch.float64)
    for i in range(x.shape[-1]):
        squares = squares + (centers.double()[:, i] - x.double()[..., i : i + 1]) ** 2
    found = squares.sort(dim=-1, stable=True)
    return found.indices[..., :k], found.values[..., :k]


def use(monkeypatch, method):
    if method == "cKDTree":
        pytest.importorskip("scipy")
    monkeypatch.setattr(neighbors, "search_method", lambda device_type: method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_neighbors_are_exact(monkeypatch, method, cloud, dims, dtype):
    use(monkeypatch, method)
    centers = CLOUDS[cloud](dims).to(dtype)
    x = queries(centers).to(dtype)
    index = NeighborIndex(centers)
    assert index.method == method
    for k in {1, min(4, len(centers)), min(33, len(centers)), len(centers)}:
        rows, squares = nearest(x, centers, k, index=index, return_squared_distances=True)
        assert rows.dtype == torch.int32 and squares.dtype == dtype
        wanted = expected(x, centers, k)
        assert torch.equal(rows.long(), wanted[0]) and torch.equal(squares, wanted[1].to(dtype))


def draw(seed):
    """Points, centers, some of them alike, and k: of any sizes, anywhere or on a lattice, as the points are then."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def one_of(*choices):
        return choices[int(len(choices) * uniform())]

    dims, count, points = one_of(1, 2, 3, 4), int(2 ** (11 * uniform())), one_of(1, 30, 200)
    size, dtype = uniform(dims) * one_of(1e-6, 1.0, 1e6), one_of(torch.float64, torch.float32, torch.bfloat16)
    centers, x = uniform(count, dims), 2 * uniform(points, dims) - 0.5
    if one_of(False, True):
        centers, x = (centers * 4).round(), (x * 8).round() / 2
    alike = uniform(count) < one_of(0.0, 0.1, 0.9)
    centers[alike] = centers[(uniform(int(alike.sum())) * count).long()]
    return (x * size).to(dtype), (centers * size).to(dtype), min(count, one_of(1, 2, 5, 40))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(30))
def test_neighbors_of_random_draws_are_exact(monkeypatch, method, seed):
    use(monkeypatch, method)
    x, centers, k = draw(seed)
    rows, squares = nearest(x, centers, k, return_squared_distances=True)
    wanted = expected(x, centers, k)
    assert torch.equal(rows.long(), wanted[0]) and torch.equal(squares, wanted[1].to(squares.dtype))


def test_centers_that_span_more_than_the_largest_number():
    """All squares are infinite but those of a center itself: ties go by row."""
    centers = 1.7e308 * torch.linspace(-1, 1, 300, dtype=torch.float64).unsqueeze(-1)
    rows, squares = nearest(centers, centers, 2, return_squared_distances=True)
    others = torch.where(torch.arange(300) == 0, 1, 0)
    assert torch.equal(rows.long(), torch.stack([torch.arange(300), others], 1))
    assert (squares[:, 0] == 0).all() and squares[:, 1].isinf().all()


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("dims", "count", "k"), [(2, 20_000, 4), (3, 100_000, 8)])
def test_a_million_points_as_a_tree_finds_them(dims, count, k):
    spatial = pytest.importorskip("scipy.spatial")
    centers, x = rand(count, dims), rand(1_000_000, dims, seed=1, low=-0.1, high=1.1)
    rows = spatial.cKDTree(centers.numpy()).query(x.numpy(), range(1, k + 1), workers=2)[1]
    assert torch.equal(nearest(x, centers, k).long(), torch.from_numpy(rows))


@needs_kernels
def test_the_number_of_threads_changes_nothing():
    centers, x = CLOUDS["lattice"](3), rand(5000, 3, high=7.0)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(nearest(x, centers, 6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_kernels
def test_the_operator_is_well_declared():
    arguments = (rand(7, 2, seed=1), *_neighbor_cells.build(rand(50, 2)), 3)
    torch.library.opcheck(neighbors._NEAREST, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_kernels
def test_many_points_go_in_parts(monkeypatch):
    centers, x = rand(50, 2), rand(1000, 2, seed=1)
    whole = nearest(x, centers, 3)
    monkeypatch.setattr(neighbors, "_POINTS_AT_ONCE", 64)
    assert torch.equal(nearest(x, centers, 3), whole)


@pytest.mark.parametrize("leading", [(), (0,), (7,), (2, 3), (2, 0)], ids=str)
def test_leading_axes_and_layout(leading):
    centers, x = rand(2, 40).mT, rand(*leading, 4)[..., ::2]
    rows, squares = nearest(x, centers, 3, return_squared_distances=True)
    assert rows.shape == squares.shape == (*leading, 3)
    assert torch.equal(rows.long(), expected(x, centers, 3)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_narrow_coordinates_are_read_as_they_are(dtype):
    centers, x = rand(200, 2).to(dtype).requires_grad_(), rand(50, 2, seed=1).to(dtype)
    rows, squares = nearest(x, centers, 4, return_squared_distances=True)
    wanted = expected(x, centers.detach(), 4)
    assert torch.equal(rows.long(), wanted[0]) and torch.equal(squares, wanted[1].float())


def test_an_index_is_of_the_centers_it_was_built_from():
    centers, x = rand(30, 2), rand(5, 2, seed=1)
    index = NeighborIndex(centers)
    wanted = nearest(x, centers, 2)
    for twin in (index, copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert torch.equal(nearest(x, centers, 2, index=twin), wanted) and len(twin) == 30
    centers += 1
    with pytest.raises(ValueError, match=r"^nearest: index must be of these centers.*anew$"):
        nearest(x, centers, 2, index=index)


NAN = torch.tensor([[0.0, float("nan")]])


@pytest.mark.parametrize(
    ("error", "message", "x", "centers", "k"),
    [
        (ValueError, "nearest: k must be at most the number of centers, 3, got 4", rand(2, 2), rand(3, 2), 4),
        (ValueError, "nearest: k must be at least 1", rand(2, 2), rand(3, 2), 0),
        (TypeError, "nearest: k must be an int", rand(2, 2), rand(3, 2), 1.0),
        (ValueError, "nearest: x must be finite, got 1 points", NAN, rand(3, 2), 1),
        (ValueError, "NeighborIndex: centers must be finite", rand(2, 2), NAN, 1),
        (ValueError, "NeighborIndex: centers must have shape", rand(2, 2), rand(0, 2), 1),
        (ValueError, "NeighborIndex: centers must have shape", rand(2, 5), rand(3, 5), 1),
        (ValueError, r"nearest: x must have shape \[..., 2\]", rand(2, 3), rand(3, 2), 1),
        (TypeError, "nearest: x must be float32", torch.zeros(2, 2, dtype=torch.int64), rand(3, 2), 1),
        (TypeError, "nearest: centers must be float32", rand(2, 2), torch.zeros(3, 2, dtype=torch.int32), 1),
        (TypeError, "nearest: x must be a torch.Tensor", [[0.0]], rand(3, 1), 1),
        (ValueError, "nearest: all tensors must be on one device", rand(2, 2), torch.zeros(3, 2, device="meta"), 1),
    ],
)
def test_errors_say_what_is_wrong(error, message, x, centers, k):
    with pytest.raises(error, match=f"^{message}"):
        nearest(x, centers, k)


def test_squares_that_overflow_are_equal_by_every_method():
    x, centers = 1e300 * (rand(9, 2) - 0.5), 1e300 * (rand(40, 2, seed=1) - 0.5)
    index = NeighborIndex(centers)
    wanted = neighbors.search_all(centers, x, 5)
    for method in ("cells", "cKDTree", "exhaustive") if _ops.cpu_isa else ("cKDTree", "exhaustive"):
        index.method, index._prepared = method, {}
        assert torch.equal(index.search(x, 5)[0], wanted[0]), method


# ---- under traces and transforms -------------------------------------------------------------------------------------


def three_nearest(x, centers):
    return nearest(x, centers, 3, return_squared_distances=True)


def test_a_graph_holds_the_search():
    x, centers = rand(40, 2).float(), rand(60, 2, seed=1)
    compiled = torch.compile(three_nearest, fullgraph=True, backend="aot_eager", dynamic=True)
    for points in (x, x[:7], x.reshape(4, 10, 2)):
        for found, wanted in zip(compiled(points, centers), three_nearest(points, centers), strict=True):
            assert torch.equal(found, wanted) and found.dtype == wanted.dtype
    centers.add_(rand(60, 2, seed=5))
    assert torch.equal(compiled(x, centers)[0], three_nearest(x, centers)[0]), "the old index is not taken"


def test_what_a_graph_searched_among_last_is_remembered(monkeypatch):
    monkeypatch.setattr(neighbors, "_remembered", [])
    clouds = [rand(30, 2, seed=seed) for seed in range(neighbors._MOST_REMEMBERED + 1)]
    first = neighbors._remember(clouds[0])
    assert neighbors._remember(clouds[0].clone()) is first, "equal centers, one index"
    for cloud in clouds[1:]:
        neighbors._remember(cloud)
    assert len(neighbors._remembered) == neighbors._MOST_REMEMBERED and first not in neighbors._remembered


def test_transforms_search_for_their_points():
    x, centers = rand(5, 8, 2), rand(60, 2, seed=1)
    wanted = nearest(x, centers, 3)
    assert torch.equal(torch.vmap(nearest, in_dims=(0, None, None))(x, centers, 3), wanted)
    moved = torch.vmap(nearest, in_dims=(1, None, None), out_dims=1)(x, centers, 3)
    assert torch.equal(moved, wanted)
    seen = []
    torch.func.grad(lambda t: seen.append(nearest(t, centers, 3)) or t.sum())(x)
    assert torch.equal(seen[0], wanted)
    with pytest.raises(RuntimeError, match=r"^nearest: torch.vmap over centers is not supported.*loop over them"):
        torch.vmap(nearest, in_dims=(None, 0, None))(x[0], rand(3, 9, 2), 3)


def test_tensors_without_values_have_neighbors_without():
    rows, squares = three_nearest(rand(2, 5, 3).half().to("meta"), rand(9, 3).to("meta"))
    assert rows.is_meta and rows.shape == squares.shape == (2, 5, 3)
    assert (rows.dtype, squares.dtype) == (torch.int32, torch.float64)
    with pytest.raises(ValueError, match=r"^nearest: k must be at most the number of centers, 2, got 3"):
        three_nearest(rand(5, 3).to("meta"), rand(2, 3).to("meta"))


@pytest.mark.parametrize("first", [torch.float32, torch.float64], ids=str)
def test_the_dtype_of_distances_does_not_depend_on_earlier_searches(first):
    x, centers = rand(9, 2).float(), rand(30, 2, seed=1).float()
    compiled = torch.compile(three_nearest, fullgraph=True, backend="aot_eager")
    for dtype in (first, torch.float32, torch.float64):
        for search in (compiled, lambda x, c: three_nearest(x, c.clone())):
            assert search(x, centers.to(dtype))[1].dtype == dtype
    with pytest.raises(ValueError, match=r"^nearest: index must be of these centers"):
        nearest(x, centers.double(), 3, index=NeighborIndex(centers))


def test_the_operator_of_graphs():
    torch.library.opcheck(_ops.operators.nearest_among.default, (rand(2, 5, 2), rand(30, 2, seed=1), 3))


def test_an_index_has_no_place_in_a_transform():
    x, centers = rand(5, 2), rand(30, 2, seed=1)
    index = NeighborIndex(centers)
    with pytest.raises(ValueError, match=r"^nearest: index must be None inside torch\.compile"):
        torch.vmap(lambda point: nearest(point, centers, 2, index=index))(x)


def test_an_index_is_one():
    with pytest.raises(TypeError, match=r"^nearest: index must be a NeighborIndex or None, got int"):
        nearest(rand(2, 2), rand(3, 2), 1, index=3)


# ---- methods ---------------------------------------------------------------------------------------------------------


def test_a_method_is_always_found(monkeypatch, capsys):
    from camkernels.__main__ import main

    assert main(["info"]) == 0
    told = capsys.readouterr().out
    assert f"nearest centres: by {neighbors.search_method()} on the CPU\n  of CUDA tensors: " in told
    monkeypatch.setattr(_ops, "has_kernel", lambda name, device: False)
    monkeypatch.setattr(neighbors, "find_spec", lambda name: None)
    assert neighbors.search_method() == "exhaustive"
    monkeypatch.setattr(neighbors, "find_spec", lambda name: name)
    assert neighbors.search_method() == "cKDTree"


@pytest.mark.parametrize(("reason", "home"), [(None, "cuda:1"), ("no kernels", "cpu")])
def test_searches_run_where_the_centers_are_if_that_has_kernels(monkeypatch, reason, home):
    monkeypatch.setattr(neighbors, "can_run", lambda backend, call: reason)
    assert neighbors.home_of(torch.device("cuda", 1)) == torch.device(home)
    assert neighbors.home_of(torch.device("cpu")) == neighbors.home_of(torch.device("xpu")) == torch.device("cpu")
    assert f"of CUDA tensors: {'by cells' if reason is None else 'copied to the CPU: no'}" in "\n".join(
        _info._nearest_lines({"cpu": "cells", "cuda": reason})
    )


def test_neighbors_serve_the_radial_basis():
    x, centers = rand(20, 2), rand(40, 2, seed=1)
    features, shapes = rand(40, 3, seed=2), torch.full((40, 1), 1e4, dtype=torch.float64)
    options = {"kind": "gauss", "shape": "isotropic", "normalize": False}
    near = camkernels.radial_basis(x, centers, shapes, features, nearest(x, centers, 8), **options)
    torch.testing.assert_close(near, camkernels.radial_basis(x, centers, shapes, features, **options))
