# SPDX-License-Identifier: MIT
"""Exact nearest centres; kernels placed where the data are, by weighted k-means and the shapes of its clusters, or on a
regular grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import _ops
from ._backends import Call, can_run
from ._checks import (
    check_choice,
    check_finite,
    check_floating,
    check_number,
    check_same_device,
    check_shape,
    check_size,
)
from ._kernel_shapes import kernel_shapes, matrix_rows, width_bounds
from ._modulation import compute_dtype
from ._neighbor_cells import build
from ._neighbor_fallbacks import search_all, search_tree, tree
from ._radial_basis import MOST_DIMS, SHAPES, can_look_at, has_values
from ._regular_grid import grid_centers, grid_neighbors

__all__ = [
    "NeighborIndex",
    "grid_centers",
    "grid_neighbors",
    "kernel_shapes",
    "nearest",
    "second_moments",
    "weighted_kmeans",
    "width_bounds",
]

# ---- operators -------------------------------------------------------------------------------------------------------
# nearest: x [m, d] in float32 or float64; points of the same dtype, rows, starts, cuts and slabs: Cells of n centres ->
# rows int32 [m, k], squared distances float64 [m, k].
# nearest_among: a search as a graph or a transform holds it, x [..., d], centers [n, d] -> what `nearest` returns.


def _nearest_meta(
    x: Tensor, points: Tensor, rows: Tensor, starts: Tensor, cuts: Tensor, slabs: list[int], k: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k, dtype=torch.int32), x.new_empty(len(x), k, dtype=torch.float64)


_NEAREST = _ops.declare(
    "nearest(Tensor x, Tensor points, Tensor rows, Tensor starts, Tensor cuts, int[] slabs, int k) -> (Tensor, Tensor)",
    _nearest_meta,
)


def _search_meta(x: Tensor, centers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    size = (*x.shape[:-1], k)
    return x.new_empty(size, dtype=torch.int32), x.new_empty(size, dtype=compute_dtype(x, centers))


_NEAREST_AMONG = _ops.declare(
    "nearest_among(Tensor x, Tensor centers, int k) -> (Tensor, Tensor)", _search_meta, tags=_ops.WAITS
)


def _search_among(x: Tensor, centers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _remember(centers).search(x, k)


def _search_batched(info: Any, in_dims: tuple, x: Tensor, centers: Tensor, k: int) -> tuple[Any, Any]:
    if in_dims[1] is not None:
        raise RuntimeError("nearest: torch.vmap over centers is not supported, only over x; loop over them")
    return _NEAREST_AMONG(x.movedim(in_dims[0], 0), centers, k), (0, 0)


_ops.library.impl("nearest_among", _search_among, "CompositeExplicitAutograd")
torch.library.register_vmap(f"{_ops.NAMESPACE}::nearest_among", _search_batched, lib=_ops.library)

_POINTS_AT_ONCE = 1 << 22  # bounds the memory of a search


# ---- nearest centres -------------------------------------------------------------------------------------------------


def home_of(device: torch.device) -> torch.device:
    """Where searches among centres on a device run: there, if it is a GPU for which there are kernels, else the CPU."""
    there = device.type == "cuda" and can_run("cuda", Call("nearest", "cuda", device.index)) is None
    return device if there else torch.device("cpu")


def search_method(device_type: str = "cpu") -> str:
    """How the nearest centres are found in this installation: "cells", or on the CPU also "cKDTree" or "exhaustive"."""
    if device_type != "cpu" or _ops.has_kernel("nearest", "cpu"):
        return "cells"
    return "cKDTree" if find_spec("scipy") else "exhaustive"


class NeighborIndex:
    """Centres [n, d], d from 1 to 4, made ready for searches: `index.search(x, k)`, or `nearest(..., index=index)`.

    Holds a copy of the centres as they are now, on their device if that is a GPU for which there are kernels, else on
    the CPU; there all searches run. On the CPU they use kernels, or SciPy's cKDTree, or, where both are missing, all
    distances. `python -m camkernels info` tells which of all that is so.

    Raises ValueError for shapes, no centres and coordinates that are not finite, TypeError for dtypes.

    >>> index = NeighborIndex(torch.rand(100, 2))
    >>> index.search(torch.rand(5, 2), 4)[0].shape
    torch.Size([5, 4])
    """

    def __init__(self, centers: Tensor):
        op = "NeighborIndex"
        _check_centers(op, centers)
        check_finite(op, "centers", centers)
        self.device = home_of(centers.device)
        self.centers = self._coordinates(centers).clone()
        self.method = search_method(self.device.type)
        self._prepared: dict[torch.dtype, Any] = {}

    def __len__(self) -> int:
        return len(self.centers)

    def holds(self, centers: Tensor) -> bool:
        """Whether it was built from these centers, value by value, and is where searches among them run."""
        if self.device != home_of(centers.device):
            return False
        given = self._coordinates(centers)  # of equal values in another dtype distances would be, too
        return given.dtype == self.centers.dtype and torch.equal(self.centers, given)

    def __repr__(self) -> str:
        return f"NeighborIndex(centers={list(self.centers.shape)}, method={self.method!r}, device={str(self.device)!r})"

    @torch.compiler.disable
    def search(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """x [..., d] -> (int32 [..., k], squared distances [..., k]) on the device of x, as `nearest` gives them."""
        _check_search(x, self.centers, k)
        dims = self.centers.shape[1]
        if self.device.type == "cpu" or can_look_at(x):
            check_finite("nearest", "x", x)
        points = self._coordinates(x)
        dtype = torch.promote_types(points.dtype, self.centers.dtype)
        points = points.to(dtype).reshape(-1, dims).contiguous()
        parts = [self._search(part, k) for part in points.split(_POINTS_AT_ONCE)]
        rows, squares = (torch.cat(found).reshape(*x.shape[:-1], k) for found in zip(*parts, strict=True))
        return rows.to(x.device), squares.to(x.device, dtype)

    def _coordinates(self, t: Tensor) -> Tensor:
        """In float64 or float32, where searches run."""
        return t.detach().to(self.device, t.dtype if t.dtype == torch.float64 else torch.float32)

    def _search(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.method == "cells":
            return _NEAREST(x, *self._made(x.dtype, build), k)
        x, centers = x.double(), self.centers.double()
        if self.method == "cKDTree":
            return search_tree(self._made(x.dtype, tree), centers, x, k)
        return search_all(centers, x, k)

    def _made(self, dtype: torch.dtype, make: Callable[[Tensor], Any]) -> Any:
        """What is built once for coordinates of a dtype."""
        if dtype not in self._prepared:
            self._prepared[dtype] = make(self.centers.to(dtype))
        return self._prepared[dtype]


_remembered: list[NeighborIndex] = []  # of the last centers that graphs have searched among
_MOST_REMEMBERED = 4


def _remember(centers: Tensor) -> NeighborIndex:
    """An index of these centers, from before if they are among the last that were asked for."""
    index = next((i for i in _remembered if i.holds(centers)), None) or NeighborIndex(centers)
    _remembered[:] = [index, *(i for i in _remembered if i is not index)][:_MOST_REMEMBERED]
    return index


def nearest(
    x: Tensor,
    centers: Tensor,
    k: int,
    *,
    index: NeighborIndex | None = None,
    return_squared_distances: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The k centres nearest to each point: int32 [..., k], the nearest first, equally near ones by their rows.

    x [..., d], centers [n, d], d from 1 to 4, k from 1 to n. Distances are those of the offsets in float64, for all
    dtypes. index: a `NeighborIndex` of the same centers, which saves building one; it is compared with them by value,
    which waits for a GPU, whereas `index.search(x, k)` does not wait. return_squared_distances: (neighbours, squared
    distances [..., k] in float32, or float64 if x or centers are). Nothing is differentiable. Where it runs:
    `NeighborIndex`. A graph of torch.compile or torch.export holds the search, torch.vmap goes over x; index must be
    None there, and those of the last four centers are remembered.

    Raises ValueError for shapes, k, mixed devices, an index of other centers and coordinates that are not finite,
    TypeError for dtypes. On a GPU x is not looked at, unless CAMKERNELS_CHECK=1, because the host would wait for the
    device: without, the neighbours of a point that is not finite are -1, and their distances NaN.

    >>> import torch
    >>> nearest(torch.tensor([[0.2], [0.9]]), torch.tensor([[0.0], [1.0], [0.5]]), 2).tolist()
    [[0, 2], [1, 2]]
    """
    op = "nearest"
    check_floating(op, "x", x)
    check_floating(op, "centers", centers)
    check_same_device(op, x=x, centers=centers)
    if not (index is None or isinstance(index, NeighborIndex)):
        raise TypeError(f"{op}: index must be a NeighborIndex or None, got {type(index).__name__}")
    if not (has_values(x) and has_values(centers)):
        if index is not None:
            raise ValueError(
                f"{op}: index must be None inside torch.compile, torch.export and torch.vmap; leave it out"
            )
        _check_centers(op, centers)
        _check_search(x, centers, k)
        found = _NEAREST_AMONG(x.detach(), centers.detach(), k)
    elif index is None:
        found = NeighborIndex(centers).search(x, k)
    elif index.holds(centers):
        found = index.search(x, k)
    else:
        raise ValueError(f"{op}: index must be of these centers, got one of others; build NeighborIndex(centers) anew")
    return found if return_squared_distances else found[0]


def _check_centers(op: str, centers: Tensor) -> None:
    check_floating(op, "centers", centers)
    if centers.ndim != 2 or not 1 <= centers.shape[1] <= MOST_DIMS or len(centers) == 0:
        raise ValueError(
            f"{op}: centers must have shape [n, d] with n > 0 and d from 1 to {MOST_DIMS}, got {list(centers.shape)}"
        )


def _check_search(x: Tensor, centers: Tensor, k: int) -> None:
    op, (count, dims) = "nearest", centers.shape
    check_floating(op, "x", x)
    check_shape(op, "x", x, ["...", dims], f"the centers have {dims} coordinates")
    check_size(op, "k", k)
    if k > count:
        raise ValueError(f"{op}: k must be at most the number of centers, {count}, got {k}; use min(k, {count})")


# ---- kernels where the data are --------------------------------------------------------------------------------------


def weighted_kmeans(
    points: Tensor,
    weights: Tensor,
    count: int,
    *,
    start: Tensor | None = None,
    iterations: int = 10,
    generator: torch.Generator | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Tensor:
    """The centres [count, d] of clusters of points [N, d] with weights [N], by Lloyd's iterations.

    The result has the points' dtype. An iteration moves each centre to the weighted mean, in float64, of the points
    nearest to it; one without points stays. Points without weight do not count. start: rows of points [count], or
    centres [count, d]; None draws rows without replacement, with probabilities in proportion to the weights, from the
    generator. Sums have one order, so that a start, or a seed, gives the same bits again on a device. progress wraps
    the iterations of a long run: tqdm.tqdm.

    Raises ValueError for shapes, negative weights and fewer points with weight than count, TypeError for dtypes.

    Source: initialisation of Chen et al., "NeuRBF", ICCV 2023.

    >>> import torch
    >>> points = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    >>> weighted_kmeans(points, torch.tensor([3.0, 1.0, 1.0, 1.0]), 2, start=torch.tensor([0, 3])).tolist()
    [[0.25], [11.0]]
    """
    op = "weighted_kmeans"
    check_size(op, "count", count)
    check_size(op, "iterations", iterations, least=0)
    _check_weights(op, points, weights)
    weights = _summable(weights)
    used = weights > 0
    if int(used.sum()) < count:
        raise ValueError(
            f"{op}: count must be at most the number of points with weight, {int(used.sum())}, got {count}"
        )
    if start is None:  # exponential clocks of these rates: the first to ring are such a draw
        device = weights.device if generator is None else generator.device
        clocks = torch.empty(len(weights), dtype=torch.float64, device=device).exponential_(generator=generator)
        start = (weights / clocks.to(weights.device)).topk(count).indices
    _check_start(op, start, count, points)
    centers = (points[start.long()] if start.ndim == 1 else start).double()
    points, masses = points[used], weights[used].unsqueeze(-1)
    moments = masses * points.double()
    for _ in progress(range(iterations)):
        nearest_center = nearest(points, centers.to(points.dtype), 1)[:, 0].long()
        centers = _means(moments, masses, nearest_center, centers)
    return centers.to(points.dtype)


def second_moments(
    points: Tensor, weights: Tensor, centers: Tensor, *, shape: str = "full", alpha: float = 0.5
) -> Tensor:
    """Weighted means of the squared offsets o of the points [N, d] nearest to each of the centers [n, d].

    [n, s] in the form of `shape`: |o|^2 ("isotropic"), o_i^2 ("diagonal"), the matrix o_i o_j ("full" and "projected",
    row by row; "symmetric", its upper triangle), each divided by alpha; 1e-10 on the diagonal for a centre without
    points. In the points' dtype, computed in float64. weights [N].

    Raises ValueError for shapes, values and mixed devices, TypeError for dtypes.

    >>> import torch
    >>> points = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    >>> second_moments(points, torch.ones(2), torch.zeros(1, 2), alpha=1.0).tolist()
    [[1.0, 0.0, 0.0, 0.0]]
    """
    op = "second_moments"
    check_choice(op, "shape", shape, SHAPES)
    check_number(op, "alpha", alpha)
    if alpha <= 0:
        raise ValueError(f"{op}: alpha must be above 0, got {alpha}")
    _check_weights(op, points, weights)
    weights = _summable(weights)
    used = weights > 0
    points, masses = points[used], weights[used].unsqueeze(-1)
    rows = nearest(points, centers, 1)[:, 0].long()
    o = points.double() - centers.double()[rows]
    dims = centers.shape[1]
    if shape == "isotropic":
        squares, least = (o * o).sum(-1, keepdim=True), o.new_ones(1)
    elif shape == "diagonal":
        squares, least = o * o, o.new_ones(dims)
    else:
        squares = matrix_rows(o.unsqueeze(-1) * o.unsqueeze(-2), shape)
        least = matrix_rows(torch.eye(dims, dtype=o.dtype, device=o.device), shape)
    empty = (1e-10 * alpha * least).expand(len(centers), -1)
    return (_means(masses * squares, masses, rows, empty) / alpha).to(points.dtype)


def _check_start(op: str, start: Tensor, count: int, points: Tensor) -> None:
    """ValueError or TypeError unless these are rows [count] of the points, or centres [count, d]."""
    if not isinstance(start, Tensor):
        raise TypeError(f"{op}: start must be a torch.Tensor or None, got {type(start).__name__}")
    if start.ndim != 1:
        check_shape(op, "start", start, [count, points.shape[1]], "or rows [count]")
        check_floating(op, "start", start)
        if can_look_at(start):
            check_finite(op, "start", start)
        return
    check_shape(op, "start", start, [count], "or centres [count, d]")
    if start.is_floating_point() or start.is_complex() or start.dtype == torch.bool:
        raise TypeError(f"{op}: start [count] must be rows of the points, integers, got {start.dtype}")
    if can_look_at(start) and not ((start >= 0) & (start < len(points))).all():
        raise ValueError(
            f"{op}: start must name rows from 0 to {len(points) - 1}, got {int(start.min())} to {int(start.max())}"
        )


def _check_weights(op: str, points: Tensor, weights: Tensor) -> None:
    check_floating(op, "points", points)
    check_floating(op, "weights", weights)
    check_same_device(op, points=points, weights=weights)
    check_shape(op, "points", points, ["N", "d"], "one row for each point")
    if not 1 <= points.shape[1] <= MOST_DIMS:
        raise ValueError(f"{op}: points must have from 1 to {MOST_DIMS} coordinates, got {list(points.shape)}")
    check_shape(op, "weights", weights, [len(points)], "one weight for each point")
    if can_look_at(weights) and not ((weights >= 0) & weights.isfinite()).all():
        raise ValueError(f"{op}: weights must be finite and not negative; clamp them")
    if can_look_at(points):
        check_finite(op, "points", points)


def _summable(weights: Tensor) -> Tensor:
    """In float64; those so large that sums would overflow all times one power of 2, which leaves means as they are."""
    weights = weights.double()
    return torch.where((weights > 2.0**500).any(), weights * 2.0**-524, weights)


def _means(weighted: Tensor, masses: Tensor, rows: Tensor, otherwise: Tensor) -> Tensor:
    """Of each row, the sum of what is weighted [N, *] over that of masses [N, 1]; otherwise [n, *] where none is."""
    total, mass = torch.zeros_like(otherwise), masses.new_zeros(len(otherwise), 1)
    for sums, parts in ((total, weighted), (mass, masses)):
        sums.index_put_((rows,), parts, accumulate=True)  # in one order in float64, also on CUDA, unlike index_add_
    return torch.where(mass > 0, total / mass, otherwise)
