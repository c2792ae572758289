# SPDX-License-Identifier: MIT
"""The radial basis in eager PyTorch, as NeuRBF's public code computes it, operation by operation: the baseline.

The rows of the neighbours are gathered from the tables of centers, shapes and features as torch.nn.Embedding does it;
the kernel function, the detached sum, one sine for each neighbour and feature, a product and a sum follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("blend",)


def _weights(kind: str, shape: str, offsets: Tensor, shapes: Tensor) -> Tensor:
    """offsets [n, K, d], shapes [n, K, s] -> [n, K]."""
    if kind == "nlin":
        return (1 - (offsets * shapes).abs()).clamp(0, 1).prod(-1)
    if shape == "full":
        dims = offsets.shape[-1]
        row, column = offsets.unsqueeze(-2), offsets.unsqueeze(-1)
        squares = (row @ shapes.unflatten(-1, (dims, dims)) @ column).flatten(-3)
    else:
        squares = (offsets.square() * shapes).sum(-1)
    return 1 / (1 + squares)


def make(options: dict[str, Any], device: str, form: str = "blend") -> Callable[..., Tensor]:
    """function(x [n, d], centers, shapes, features, neighbors [n, K]) -> [n, F], of kind ivq or nlin."""
    kind, shape, frequencies = options["kind"], options["shape"], options["frequencies"].to(device)

    def function(x: Tensor, centers: Tensor, shapes: Tensor, features: Tensor, neighbors: Tensor) -> Tensor:
        offsets = x.unsqueeze(1) - F.embedding(neighbors, centers)
        phi = _weights(kind, shape, offsets, F.embedding(neighbors, shapes))
        u = phi / (phi.detach().sum(-1, keepdim=True) + 1e-8)
        rows = F.embedding(neighbors, features)
        return (rows * torch.sin(u.unsqueeze(-1) * frequencies)).sum(1)

    return function
