# SPDX-License-Identifier: MIT
"""Fields of the plane: coordinates in [0, 1]^2 -> channels of a picture."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_size
from .field import half_cosine
from .hash import HashField


def pixel_centres(index: Tensor, width: int, height: int) -> Tensor:
    """Pixel numbers [N], row by row from the top left -> coordinates (x, y) [N, 2] in (0, 1)."""
    x = index.double() + 0.5
    y = (x / width).floor_()  # the row
    x.sub_(y, alpha=width).div_(width)
    y.add_(0.5).div_(height)
    return torch.view_as_real(torch.complex(x.float(), y.float()))  # less than a third of the time of torch.stack


class HashImageField(HashField):
    """A picture as a hash grid and a small perceptron: x [..., 2] in [0, 1] -> [..., channels], about in [0, 1].

    The grid has `n_levels` resolutions from 16 (or `finest_resolution` if that is less) to `finest_resolution`, at most
    2^log2_hashmap_size rows each; the perceptron `hidden_layers` ReLU layers of `width`. Names of parameters:
    grid.table, mlp.layers.{i}.*. The arguments are kept in `config`: `HashImageField(**field.config)` has the same.

    Source: Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", 2022.

    >>> import torch
    >>> field = HashImageField(channels=3, finest_resolution=256)
    >>> field(torch.rand(100, 2)).shape
    torch.Size([100, 3])
    """

    grid_factor = 2.0  # +0.3 to +1 dB after 500 to 1000 steps on two photographs

    def __init__(
        self,
        channels: int = 3,
        n_levels: int = 16,
        n_features_per_level: int = 2,
        log2_hashmap_size: int = 19,
        finest_resolution: int = 512,
        width: int = 64,
        hidden_layers: int = 1,
        *,
        backend: str | None = None,
    ):
        check_size("HashImageField", "channels", channels)
        options = {
            "n_levels": n_levels, "n_features_per_level": n_features_per_level, "log2_hashmap_size": log2_hashmap_size,
            "finest_resolution": finest_resolution, "width": width, "hidden_layers": hidden_layers,
        }  # fmt: skip
        super().__init__(2, channels, **options, backend=backend)
        self.config = {"channels": channels, **options}

    def decay(self, done: float) -> float:
        """Factor of the learning rates when a share of the run is done."""
        return half_cosine(done)
