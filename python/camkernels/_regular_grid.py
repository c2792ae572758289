# SPDX-License-Identifier: MIT
"""Radial kernels at the nodes of a regular grid, whose neighbours need no search; public in `camkernels.neighbors`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import check_floating, check_same_device, check_shape, check_sizes
from ._modulation import compute_dtype
from ._radial_basis import MOST_DIMS, can_look_at


def grid_centers(low: Tensor, high: Tensor, resolution: Sequence[int]) -> Tensor:
    """The nodes [n, d] of a grid from low [d] to high [d], `resolution` [d] of them along the axes, the first fastest.

    The first and the last of an axis are on the border. d from 1 to 4, resolutions from 2 on. A `RadialBasis` with
    these centers needs no search: `layer(x, grid_neighbors(x, low, high, resolution))`.

    Raises ValueError for shapes, values and mixed devices, TypeError for dtypes.

    >>> import torch
    >>> grid_centers(torch.zeros(2), torch.tensor([2.0, 1.0]), (3, 2)).tolist()
    [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    """
    axes = _axes("grid_centers", low, high, resolution)
    dtype, low, high = low.dtype, *(t.to(compute_dtype(low, high)) for t in (low, high))
    rows = torch.arange(math.prod(count for _, count in axes), device=low.device)
    shares = [(rows // stride % count).to(low) / (count - 1) for stride, count in axes]
    return torch.lerp(low, high, torch.stack(shares, -1)).to(dtype)


def grid_neighbors(x: Tensor, low: Tensor, high: Tensor, resolution: Sequence[int]) -> Tensor:
    """The corners of the cell that each point is in: x [..., d] -> int32 [..., 2^d], neighbors for `radial_basis`.

    They are rows of `grid_centers` of the same low, high and resolution, the first axis fastest. A point beyond the
    border has the cell that is nearest along each axis; a coordinate that is not a number counts as that of `low`.
    Nothing is differentiable, and nothing waits for a GPU, unless CAMKERNELS_CHECK=1.

    Raises ValueError for shapes, values and mixed devices, TypeError for dtypes.

    Source: the kernels on a regular grid of Chen et al., "NeuRBF", ICCV 2023.

    >>> import torch
    >>> x, low, high = torch.tensor([[1.5, 0.5], [-9.0, 0.5]]), torch.zeros(2), torch.tensor([2.0, 1.0])
    >>> grid_neighbors(x, low, high, (3, 2)).tolist()
    [[1, 2, 4, 5], [0, 1, 3, 4]]
    """
    op = "grid_neighbors"
    axes = _axes(op, low, high, resolution)
    check_floating(op, "x", x)
    check_same_device(op, x=x, low=low)
    check_shape(op, "x", x, ["...", len(low)], f"the grid has {len(low)} axes")
    x, low, high = (t.detach().to(compute_dtype(x, low, high)) for t in (x, low, high))
    position = ((x - low) / (high - low)).nan_to_num(0.0)
    corners = [0]
    for axis, (stride, count) in enumerate(axes):
        cell = (position[..., axis] * (count - 1)).floor().clamp(0, count - 2).int()
        corners = [row + stride * (cell + side) for side in (0, 1) for row in corners]
    return torch.stack(corners, -1)


def _axes(op: str, low: Tensor, high: Tensor, resolution: Sequence[int]) -> list[tuple[int, int]]:
    """(distance of neighbouring rows, number of nodes) of each axis; ValueError or TypeError unless it is a grid."""
    counts = check_sizes(op, "resolution", resolution)
    if not 1 <= len(counts) <= MOST_DIMS or min(counts) < 2 or math.prod(counts) >= 2**31:
        raise ValueError(
            f"{op}: resolution must be from 2 on for 1 to {MOST_DIMS} axes, below 2^31 nodes in all, got {counts}"
        )
    for name, bound in (("low", low), ("high", high)):
        check_floating(op, name, bound)
        check_shape(op, name, bound, [len(counts)], f"resolution has {len(counts)} axes")
    check_same_device(op, low=low, high=high)
    if can_look_at(low) and not ((low < high) & low.isfinite() & high.isfinite()).all():
        raise ValueError(f"{op}: low must be below high, both finite, got {low.tolist()} and {high.tolist()}")
    return [(math.prod(counts[:axis]), count) for axis, count in enumerate(counts)]
