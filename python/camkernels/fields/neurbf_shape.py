# SPDX-License-Identifier: MIT
"""NeuRBF's signed distance: kernels where the surface is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .._checks import check_size
from .neurbf import NeuRBFField

SHARPEST = 1e-9  # added to distances where weights are their inverses
HALF_EXTENT, RESOLUTION = (1.0, 1.0, 1.0), (1024, 1024, 1024)  # of the public code's cube, and its cells there


class NeuRBFSDFField(NeuRBFField):
    """A signed distance as a hash grid, radial kernels and an MLP: x [..., 3] in [0, 1] -> [..., 1], negative inside.

    A `NeuRBFField` with the public code's choices for shapes: kernels are products of hat functions of one width, the
    nearest 8 give 16 features each, the grid has 16 levels of one feature up to finest_resolution, waves are slower.

    Source: Chen et al., "NeuRBF: A Neural Fields Representation with Adaptive Radial Basis Functions", ICCV 2023,
    configs/sdf.py.

    >>> import torch
    >>> NeuRBFSDFField(kernels=500, finest_resolution=128)(torch.rand(100, 3)).shape
    torch.Size([100, 1])
    """

    learning_rate = 2e-3
    grid_factor = feature_factor = 1.0
    final_rate = 0.02  # a tenth in the public code, which does ten times as many steps

    def __init__(
        self,
        kernels: int = 4000,
        neighbors: int = 8,
        features: int = 16,
        n_levels: int = 16,
        n_features_per_level: int = 1,
        log2_hashmap_size: int = 15,
        base_resolution: int = 16,
        finest_resolution: int = 512,
        width: int = 64,
        hidden_layers: int = 2,
        feature_waves: tuple[float, float] = (1.0, 8.0),
        decoder_waves: tuple[float, float] = (30.0, 300.0),
        *,
        backend: str | None = None,
    ):
        check_size("NeuRBFSDFField", "kernels", kernels)
        options = {
            "kernels": kernels, "neighbors": min(neighbors, kernels), "features": features,
            "feature_waves": tuple(feature_waves), "decoder_waves": tuple(decoder_waves), "n_levels": n_levels,
            "n_features_per_level": n_features_per_level, "log2_hashmap_size": log2_hashmap_size,
            "base_resolution": min(base_resolution, finest_resolution), "finest_resolution": finest_resolution,
            "width": width, "hidden_layers": hidden_layers,
        }  # fmt: skip
        super().__init__(HALF_EXTENT, 1, kind="nlin", shape="isotropic", backend=backend, **options)
        self.config = options

    def adapt(
        self,
        x: Tensor,
        distances: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """Puts the kernels where the surface is: points x [N, 3] in [0, 1] count 1 / (|distance| + 1e-9) each.

        distances [N]; the rest, and the errors: `NeuRBFField.place`.
        """
        self.place(x, 1 / (distances.abs() + SHARPEST), RESOLUTION, generator=generator, progress=progress)
