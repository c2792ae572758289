# SPDX-License-Identifier: MIT
"""Eager PyTorch for the ops around the modulated MLP, by its fastest operations: the baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from . import hash_grid_eager, modulated_mlp_eager

FORMS = ("blend",)


def _coordinate_modulation(options: dict[str, Any], device: str, form: str = "blend") -> Callable[..., Tensor]:
    """function(coords [n, 2], grids [layers, 2, h, w]) -> [n, layers, 2]."""
    return modulated_mlp_eager.read_grids


def _modulate(options: dict[str, Any], device: str, form: str = "blend") -> Callable[..., Tensor]:
    """function(h, gamma, beta [n, width]) -> [n, width], with the norm over a point, and relu."""

    def function(h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return (gamma * F.layer_norm(h, h.shape[-1:]) + beta).relu_()

    return function


def _hash_grid_mlp(options: dict[str, Any], device: str, form: str = "blend") -> Callable[..., Tensor]:
    """function(x [n, d], table, weights) -> [n, out]: the eager hash grid, then the eager MLP."""
    grid = hash_grid_eager.make({"geometry": options["geometry"]}, device, form)
    mlp = modulated_mlp_eager.make({name: options[name] for name in ("norm", "activation", "omega", "skips")}, device)

    def function(x: Tensor, table: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return mlp(grid(x, table), weights)

    return function


coordinate_modulation, modulate, hash_grid_mlp = (
    SimpleNamespace(FORMS=FORMS, make=make) for make in (_coordinate_modulation, _modulate, _hash_grid_mlp)
)
