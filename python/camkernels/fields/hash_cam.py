# SPDX-License-Identifier: MIT
"""A hash grid and an MLP that is modulated by coordinate: the package's own default field."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import CoordinateModulation, HashGrid, ModulatedMLP, hash_grid_mlp

BASE_RESOLUTION = 16


class HashCAMField(nn.Module):
    """A hash grid, then an MLP scaled and shifted by coordinate: x [..., dims] in [0, 1] -> [..., channels].

        h <- relu(gamma_i(x) norm(W_i h + b_i) + beta_i(x)),  h = hash_grid(x)

    for hidden_layers of `width`, then a linear layer and output_activation; gamma and beta come from grids of `nodes`
    values along each axis. The grid has n_levels resolutions from 16 (or finest_resolution if that is less) to
    finest_resolution, at most 2^log2_hashmap_size rows each. Names of parameters: grid.table, mlp.layers.{i}.*,
    modulation.grids. `HashCAMField(**field.config)` has the same.

    Source: Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", 2022; Lee et al.,
    "Coordinate-Aware Modulation for Neural Fields", ICLR 2024.

    >>> import torch
    >>> HashCAMField(dims=2, channels=3, finest_resolution=256)(torch.rand(100, 2)).shape
    torch.Size([100, 3])
    """

    ops = ("hash_grid", "coordinate_modulation", "modulated_mlp")
    learning_rate = 1e-2
    grid_factor = 2.0  # times that rate for the hash table and the modulation

    def __init__(
        self,
        dims: int = 2,
        channels: int = 3,
        n_levels: int = 16,
        n_features_per_level: int = 2,
        log2_hashmap_size: int = 19,
        finest_resolution: int = 512,
        width: int = 64,
        hidden_layers: int = 2,
        nodes: int = 32,
        norm: str | None = None,
        output_activation: str | None = None,
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.config = {
            "dims": dims, "channels": channels, "n_levels": n_levels, "n_features_per_level": n_features_per_level,
            "log2_hashmap_size": log2_hashmap_size, "finest_resolution": finest_resolution, "width": width,
            "hidden_layers": hidden_layers, "nodes": nodes, "norm": norm, "output_activation": output_activation,
        }  # fmt: skip
        coarsest = min(BASE_RESOLUTION, finest_resolution)
        self.grid = HashGrid(
            dims, n_levels, n_features_per_level, log2_hashmap_size, coarsest, finest_resolution=finest_resolution,
            backend=backend,
        )  # fmt: skip
        self.mlp = ModulatedMLP(
            self.grid.output_dim, channels, width, hidden_layers, norm=norm, output_activation=output_activation,
            backend=backend,
        )  # fmt: skip
        self.modulation: CoordinateModulation | None = CoordinateModulation(
            hidden_layers, (nodes,) * dims, backend=backend
        )

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer, with their learning rates: lr for the MLP, more for both kinds of grids."""
        grids = [p for name, p in self.named_parameters() if not name.startswith("mlp.")]
        return [{"params": grids, "lr": self.grid_factor * lr}, {"params": list(self.mlp.parameters()), "lr": lr}]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dims] -> [..., channels]."""
        modulation = None if self.modulation is None else self.modulation(2 * x - 1)
        return hash_grid_mlp(
            x, self.grid.table, self.grid.geometry, modulation=modulation, interpolation=self.grid.interpolation,
            **self.mlp.arguments(),
        )  # fmt: skip
