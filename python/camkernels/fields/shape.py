# SPDX-License-Identifier: MIT
"""Fields of space: coordinates in [0, 1]^3 -> signed distance of a surface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import HashGrid, ModulatedMLP, hash_grid_mlp

BASE_RESOLUTION = 16


class HashSDFField(nn.Module):
    """A signed distance as a hash grid and a small perceptron: x [..., 3] in [0, 1] -> [..., 1], negative inside.

    The grid has n_levels resolutions from 16 (or finest_resolution if that is less) to finest_resolution, at most
    2^log2_hashmap_size rows each; the perceptron hidden_layers ReLU layers of `width`. Names of parameters: grid.table,
    mlp.layers.{i}.*. `HashSDFField(**field.config)` has the same.

    Source: Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", 2022.

    >>> import torch
    >>> HashSDFField(finest_resolution=128)(torch.rand(100, 3)).shape
    torch.Size([100, 1])
    """

    ops = ("hash_grid", "modulated_mlp")
    learning_rate = 3e-3
    modulation = None

    def __init__(
        self,
        n_levels: int = 16,
        n_features_per_level: int = 2,
        log2_hashmap_size: int = 15,
        finest_resolution: int = 512,
        width: int = 64,
        hidden_layers: int = 2,
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.config = {
            "n_levels": n_levels, "n_features_per_level": n_features_per_level, "log2_hashmap_size": log2_hashmap_size,
            "finest_resolution": finest_resolution, "width": width, "hidden_layers": hidden_layers,
        }  # fmt: skip
        coarsest = min(BASE_RESOLUTION, finest_resolution)
        self.grid = HashGrid(
            3, n_levels, n_features_per_level, log2_hashmap_size, coarsest, finest_resolution=finest_resolution,
            backend=backend,
        )  # fmt: skip
        self.mlp = ModulatedMLP(self.grid.output_dim, 1, width, hidden_layers, backend=backend)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer, all with one learning rate."""
        return [{"params": list(self.parameters()), "lr": lr}]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 3] -> [..., 1]."""
        return hash_grid_mlp(
            x, self.grid.table, self.grid.geometry, interpolation=self.grid.interpolation, **self.mlp.arguments()
        )
