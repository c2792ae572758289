# SPDX-License-Identifier: MIT
"""Fields of space: coordinates in [0, 1]^3 -> signed distance of a surface."""

from __future__ import annotations

from .hash import HashField


class HashSDFField(HashField):
    """A signed distance as a hash grid and a small perceptron: x [..., 3] in [0, 1] -> [..., 1], negative inside.

    The grid has n_levels resolutions from 16 (or finest_resolution if that is less) to finest_resolution, at most
    2^log2_hashmap_size rows each; the perceptron hidden_layers ReLU layers of `width`. Names of parameters: grid.table,
    mlp.layers.{i}.*. `HashSDFField(**field.config)` has the same.

    Source: Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", 2022.

    >>> import torch
    >>> HashSDFField(finest_resolution=128)(torch.rand(100, 3)).shape
    torch.Size([100, 1])
    """

    learning_rate = 3e-3

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
        options = {
            "n_levels": n_levels, "n_features_per_level": n_features_per_level, "log2_hashmap_size": log2_hashmap_size,
            "finest_resolution": finest_resolution, "width": width, "hidden_layers": hidden_layers,
        }  # fmt: skip
        super().__init__(3, 1, **options, backend=backend)
        self.config = options
