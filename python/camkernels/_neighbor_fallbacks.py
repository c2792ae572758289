# SPDX-License-Identifier: MIT
"""Nearest centres on the CPU without kernels: (rows int32 [m, k], squared distances [m, k]) of centers [n, d] and
x [m, d], both float64, equally near ones by their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DISTANCES_AT_ONCE = 1 << 22


def _squares(offsets: Tensor) -> Tensor:
    """Squared lengths, each product and each sum rounded on its own, in the order of the axes."""
    squares = offsets * offsets
    total = squares[..., 0]
    for i in range(1, offsets.shape[-1]):
        total = total + squares[..., i]
    return total


def search_all(centers: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By all distances."""
    rows, squares = [], []
    for part in x.split(max(1, _DISTANCES_AT_ONCE // len(centers))):
        found = _squares(centers - part.unsqueeze(1)).sort(dim=-1, stable=True)
        squares.append(found.values[:, :k])
        rows.append(found.indices[:, :k].int())
    return torch.cat(rows), torch.cat(squares)


def tree(centers: Tensor) -> Any:
    """SciPy's tree of the centres."""
    from scipy.spatial import cKDTree

    return cKDTree(centers.numpy())


def search_tree(built: Any, centers: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The tree breaks ties as it likes: points whose last neighbour may have an equal are asked for more."""
    rows = torch.empty(len(x), k, dtype=torch.int32)
    squares = torch.empty(len(x), k, dtype=torch.float64)
    left, width = torch.arange(len(x)), min(k + 1, len(centers))
    while len(left):
        distances, near = built.query(x[left].numpy(), range(1, width + 1), workers=torch.get_num_threads())
        if (near == len(centers)).any():  # squares overflow, and the tree calls what is infinitely far missing
            return search_all(centers, x, k)
        near = torch.from_numpy(near).long().sort(-1).values
        found = _squares(centers[near] - x[left].unsqueeze(1)).sort(dim=-1, stable=True)
        rows[left] = near.gather(1, found.indices[:, :k]).int()
        squares[left] = found.values[:, :k]
        if width == len(centers):
            break
        unsure = torch.from_numpy(distances[:, -1] <= distances[:, k - 1] * (1 + 1e-12))
        left, width = left[unsure], min(2 * width, len(centers))
    return rows, squares
