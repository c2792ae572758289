# SPDX-License-Identifier: MIT
"""The search of nearest centres on CUDA, executed by the simulator in tests/sim, is exact and stays on its device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from camkernels import NeighborIndex, _neighbor_cells, nearest, neighbors
from elsewhere import DEVICE, Elsewhere, Moved, moved
from sim import library, toolkit
from simulated import Simulated, production, shifted
from test_neighbors import CLOUDS, expected, lattice, queries, rand

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))

MOST_IN_SHARED = 64  # neighbours of which the kernel keeps lists in shared memory


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    """`nearest` on the simulated kernel."""
    simulated = production()
    monkeypatch.setattr(neighbors, "_NEAREST", simulated.search)
    monkeypatch.setattr(neighbors, "search_method", lambda device_type: "cells")
    yield simulated


def search(x: torch.Tensor, centers: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator alone: what it does past every check of Python."""
    return neighbors._NEAREST(x, *_neighbor_cells.build(centers), k)


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3, 4])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_neighbors_are_exact(sim: Simulated, cloud: str, dims: int, dtype: torch.dtype) -> None:
    centers = CLOUDS[cloud](dims).to(dtype)
    x = queries(centers).to(dtype)
    index = NeighborIndex(centers)
    sim.library.counters()
    counts = {min(k, len(centers)) for k in (1, 4, MOST_IN_SHARED, MOST_IN_SHARED + 1, len(centers))}
    for k in counts:
        rows, squares = nearest(x, centers, k, index=index, return_squared_distances=True)
        assert rows.dtype == torch.int32 and squares.dtype == dtype
        wanted = expected(x, centers, k)
        assert torch.equal(rows.long(), wanted[0]) and torch.equal(squares, wanted[1].to(dtype))
    assert sim.library.counters()["launches"] == len(counts)  # it was the kernel that found them


@pytest.mark.parametrize(("dims", "count", "k"), [(2, 4000, 4), (3, 4000, 8)])
def test_what_a_tree_finds(sim: Simulated, dims: int, count: int, k: int) -> None:
    spatial = pytest.importorskip("scipy.spatial")
    centers, x = rand(count, dims), rand(5000, dims, seed=1, low=-0.1, high=1.1)
    distances, rows = spatial.cKDTree(centers.numpy()).query(x.numpy(), range(1, k + 1))
    found, squares = nearest(x, centers, k, return_squared_distances=True)
    assert torch.equal(found.long(), torch.from_numpy(rows))
    torch.testing.assert_close(squares.sqrt(), torch.from_numpy(distances), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [5, MOST_IN_SHARED + 5])
def test_squares_that_overflow_are_ties(sim: Simulated, k: int) -> None:
    centers = 1e200 * rand(200, 2, low=-1.0)
    sim.check_search(torch.cat([1e200 * rand(20, 2, seed=1), rand(10, 2, seed=2), centers[:10]]), centers, k)


@pytest.mark.parametrize("k", [6, MOST_IN_SHARED + 6])
def test_schedules_and_architectures_change_nothing(sim: Simulated, k: int) -> None:
    centers, x = lattice(3, 7), rand(300, 3, high=7.0)
    wanted = nearest(x, centers, k)
    for schedule in library.SCHEDULES:
        for architecture in (80, 86, 90):
            with sim.library.schedule(schedule), sim.library.architecture(architecture):
                assert torch.equal(nearest(x, centers, k), wanted)


def test_a_thread_waits_for_no_other(sim: Simulated) -> None:
    sim.library.counters()
    nearest(rand(200, 2), rand(100, 2, seed=1), 4)
    counted = sim.library.counters()
    assert (counted["launches"], counted["blocks"], counted["threads"]) == (1, 4, 256)
    assert counted["barriers"] == counted["warp_operations"] == counted["atomics"] == 0


@pytest.mark.parametrize(("dims", "count", "k", "loads", "sectors"), [(2, 20_000, 4, 58, 16), (3, 100_000, 8, 320, 86)])
def test_work_per_point(sim: Simulated, dims: int, count: int, k: int, loads: int, sectors: int) -> None:
    """The numbers of csrc/cuda/README.md."""
    x, cells = rand(2048, dims, seed=1).float(), _neighbor_cells.build(rand(count, dims).float())
    sim.library.counters()
    sim.search(x, *cells, k)
    counted = sim.library.counters()
    assert counted["loads"] / len(x) == pytest.approx(loads, rel=0.02)
    assert counted["sectors_loaded"] / len(x) == pytest.approx(sectors, rel=0.03)


# ---- queries of all kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (0,), (7,), (2, 3), (2, 0)], ids=str)
def test_leading_axes_and_layout(sim: Simulated, leading: tuple[int, ...]) -> None:
    centers, x = rand(2, 40).mT, rand(*leading, 4)[..., ::2]
    rows = nearest(x, centers, 3)
    assert rows.shape == (*leading, 3) and torch.equal(rows.long(), expected(x, centers, 3)[0])


def test_tensors_that_begin_anywhere(sim: Simulated) -> None:
    centers, x = rand(90, 3).float(), rand(50, 3, seed=1).float()
    points, *others, slabs = _neighbor_cells.build(centers)
    found = neighbors._NEAREST(shifted(x), shifted(points), *map(shifted, others), slabs, 5)
    assert torch.equal(found[0].long(), expected(x, centers, 5)[0])


@pytest.mark.parametrize("k", [3, MOST_IN_SHARED + 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_points_that_are_not_finite_have_no_neighbors(sim: Simulated, bad: float, k: int) -> None:
    centers, x = rand(90, 2), rand(40, 2, seed=1)
    wanted = search(x, centers, k)
    x[7, 1], x[30, 0] = bad, bad
    rows, squares = search(x, centers, k)
    broken = ~x.isfinite().all(-1)
    assert rows[broken].eq(-1).all() and squares[broken].isnan().all()
    assert torch.equal(rows[~broken], wanted[0][~broken]) and torch.equal(squares[~broken], wanted[1][~broken])


def test_what_does_not_fit_is_refused(sim: Simulated) -> None:
    x, cells = rand(5, 2), _neighbor_cells.build(rand(50, 2, seed=1))
    bad = {
        "x and centers must have one d": (rand(5, 3), *cells, 3),
        "x and centers must be float32, or float64": (x.float(), *cells, 3),
        "k must be from 1 to the number of centers": (x, *cells, 51),
        "slabs must have one number for each axis": (x, *cells[:4], [4], 3),
        "slabs out of range": (x, *cells[:4], [2**20, 2**20], 3),
        "dtype or size of rows": (x, cells.points, cells.rows[1:], *cells[2:], 3),
        "dtype or size of starts": (x, *cells[:2], cells.starts[1:], *cells[3:], 3),
        "dtype or size of cuts": (x, *cells[:3], cells.cuts.float(), cells.slabs, 3),
        "x must be contiguous": (rand(2, 5).mT, *cells, 3),
        "points must be contiguous": (x, cells.points.mT.contiguous().mT, *cells[1:], 3),
    }
    for sentence, arguments in bad.items():
        with pytest.raises(RuntimeError, match=f"^nearest: {sentence}"):
            neighbors._NEAREST(*arguments)


# ---- nothing leaves the device ---------------------------------------------------------------------------------------


@pytest.fixture
def home(sim: Simulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device that `Elsewhere` plays has kernels: the simulated one."""
    monkeypatch.setattr(neighbors, "home_of", lambda device: device)
    monkeypatch.setattr(neighbors, "has_values", lambda tensor: True)  # also those on "meta"


@pytest.mark.parametrize("dims", [1, 2, 3, 4])
def test_a_search_stays_where_the_centers_are(home: None, dims: int) -> None:
    """A copy to the CPU, or an operator there, would be an error of `Elsewhere`."""
    centers, x = rand(300, dims), rand(20, dims, seed=1).float()
    with Elsewhere() as first:
        index = NeighborIndex(moved(centers))
        found = [index.search(moved(x), k) for k in (4, 80)]
    with Elsewhere() as later:
        index.search(moved(x), 4)
    assert index.device == DEVICE and index.method == "cells"
    for (rows, squares), k in zip(found, (4, 80), strict=True):
        assert isinstance(rows, Moved) and isinstance(squares, Moved)
        wanted = expected(x, centers, k)
        assert torch.equal(rows.there.long(), wanted[0]) and torch.equal(squares.there, wanted[1])
    assert first.reads == 2 + dims  # whether centers are finite, how far they spread, how many cuts each axis has
    assert later.reads == 0 and later.names.count("camkernels_sim.nearest.default") == 1


def test_the_function_stays_there_too(home: None) -> None:
    centers, x = rand(90, 2), rand(20, 2, seed=1)
    with Elsewhere() as calls:
        index = NeighborIndex(moved(centers))
        before = calls.reads
        rows = nearest(moved(x), moved(centers), 3, index=index)
    assert torch.equal(rows.there.long(), expected(x, centers, 3)[0])
    assert calls.reads == before + 1 + 3  # whether the index is of these centers; building its cells


def test_an_index_on_the_cpu_is_not_of_centers_elsewhere(home: None) -> None:
    centers = rand(30, 2)
    index = NeighborIndex(centers)
    with Elsewhere() as calls, pytest.raises(ValueError, match="index must be of these centers"):
        nearest(moved(rand(5, 2)), moved(centers), 2, index=index)
    assert calls.reads == 0


def test_values_elsewhere_are_looked_at_on_demand(home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = rand(5, 2)
    x[3] = torch.nan
    with Elsewhere():
        index = NeighborIndex(moved(rand(30, 2, seed=1)))
        rows, squares = index.search(moved(x), 2)
        assert rows.there[3].eq(-1).all() and squares.there[3].isnan().all() and rows.there[:3].ge(0).all()
        monkeypatch.setattr(neighbors, "can_look_at", lambda tensor: True)
        with pytest.raises(ValueError, match="nearest: x must be finite, got 1 points"):
            index.search(moved(x), 2)


def test_a_copy_to_the_cpu_is_seen() -> None:
    """As it is where the device of the centers has no kernels."""
    with Elsewhere(), pytest.raises(AssertionError, match=r"_to_copy.* mixes devices"):
        NeighborIndex(moved(rand(30, 2)))
    x = moved(rand(5, 2))
    with Elsewhere() as calls:
        assert float(x.sum()) > 0 and calls.reads == 1
        for wrong in (lambda: x.cpu(), lambda: x + torch.ones(5, 2), lambda: torch.zeros(5, 2).copy_(x)):
            with pytest.raises(AssertionError, match="mixes devices"):
                wrong()
