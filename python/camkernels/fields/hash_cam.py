# SPDX-License-Identifier: MIT
"""A hash grid and an MLP that is modulated by coordinate: the package's own default field."""

from __future__ import annotations

from .. import CoordinateModulation
from .hash import HashField


class HashCAMField(HashField):
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
    grid_factor = 2.0

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
        grid = {
            "n_levels": n_levels, "n_features_per_level": n_features_per_level, "log2_hashmap_size": log2_hashmap_size,
            "finest_resolution": finest_resolution,
        }  # fmt: skip
        mlp = {"width": width, "hidden_layers": hidden_layers, "norm": norm, "output_activation": output_activation}
        super().__init__(dims, channels, **grid, **mlp, backend=backend)
        self.config = {"dims": dims, "channels": channels, "nodes": nodes, **grid, **mlp}
        self.modulation = CoordinateModulation(hidden_layers, (nodes,) * dims, backend=backend)
