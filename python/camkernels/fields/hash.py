# SPDX-License-Identifier: MIT
"""What fields of a hash grid and an MLP share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import CoordinateModulation, HashGrid, ModulatedMLP, hash_grid_mlp

BASE_RESOLUTION = 16


class HashField(nn.Module):
    """A hash grid, then an MLP, as one operation: x [..., dims] in [0, 1] -> [..., channels].

    The grid has n_levels resolutions from 16 (or finest_resolution if that is less) to finest_resolution, at most
    2^log2_hashmap_size rows each; the MLP hidden_layers of `width` and the options of `ModulatedMLP`. A subclass sets
    `modulation` where coordinates scale and shift them, and `config`, its own arguments.
    """

    ops: tuple[str, ...] = ("hash_grid", "modulated_mlp")
    learning_rate = 1e-2
    grid_factor = 1.0  # times that rate for the hash table and the modulation
    config: dict[str, Any]

    def __init__(
        self,
        dims: int,
        channels: int,
        *,
        n_levels: int,
        n_features_per_level: int,
        log2_hashmap_size: int,
        finest_resolution: int,
        width: int,
        hidden_layers: int,
        backend: str | None,
        **options: Any,
    ):
        super().__init__()
        coarsest = min(BASE_RESOLUTION, finest_resolution)
        self.grid = HashGrid(
            dims, n_levels, n_features_per_level, log2_hashmap_size, coarsest, finest_resolution=finest_resolution,
            backend=backend,
        )  # fmt: skip
        self.mlp = ModulatedMLP(self.grid.output_dim, channels, width, hidden_layers, backend=backend, **options)
        self.modulation: CoordinateModulation | None = None

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer, with their learning rates: lr for the MLP, grid_factor times that for grids."""
        grids = [p for name, p in self.named_parameters() if not name.startswith("mlp.")]
        return [{"params": grids, "lr": self.grid_factor * lr}, {"params": list(self.mlp.parameters()), "lr": lr}]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dims] -> [..., channels]."""
        modulation = None if self.modulation is None else self.modulation(2 * x - 1)
        return hash_grid_mlp(
            x, self.grid.table, self.grid.geometry, modulation=modulation, interpolation=self.grid.interpolation,
            **self.mlp.arguments(),
        )  # fmt: skip
