# SPDX-License-Identifier: MIT
"""NeuRBF's field for a picture: its kernels stand at the edges."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import GridGeometry
from .._checks import check_shape, check_size
from .hash import BASE_RESOLUTION
from .image import pixel_centres
from .neurbf import NeuRBFField, affordable_kernels, hash_grid_parameters, mlp_parameters

PIXELS_PER_UNIT = 64
FEATURES = 32  # of a kernel
GRID_SHARE = 0.85  # of the parameters beside the decoder's, at most, where a picture's field is given their number


def affordable_grid(
    parameters: int, side: int, n_levels: int, features: int, log2_hashmap_size: int
) -> tuple[int, int]:
    """(finest resolution, log2_hashmap_size) of NeuRBF's grid over a picture, which has at most so many numbers.

    A grid without collisions is smoother than one with them, and as fine as there is room for, up to half the picture's
    longer `side`. Where that is from a third to half of the side, collisions cost less than the missing resolution:
    three quarters of the side, and the largest table, up to 2^log2_hashmap_size, that there is room for.

    >>> affordable_grid(80_000, 1024, n_levels=8, features=2, log2_hashmap_size=24)
    (135, 24)
    >>> affordable_grid(480_000, 1024, n_levels=8, features=2, log2_hashmap_size=24)
    (768, 16)
    """

    def size(finest: int, log2_size: int) -> int:
        geometry = GridGeometry.build(
            2, n_levels, features, log2_size, min(BASE_RESOLUTION, finest), finest_resolution=finest,
            convention="torch-ngp", align_corners=True,
        )  # fmt: skip
        return geometry.n_entries * features

    def most_of(choices: range, size: Callable[[int], int]) -> int:
        return choices[max(0, bisect.bisect_right(choices, parameters, key=size) - 1)]

    half = max(2, side // 2)
    finest = most_of(range(2, half + 1), lambda finest: size(finest, log2_hashmap_size))
    if finest == half or 3 * finest < side:
        return finest, log2_hashmap_size
    finest = 3 * side // 4
    return finest, most_of(range(1, log2_hashmap_size + 1), lambda log2_size: size(finest, log2_size))


def edge_strength(picture: Tensor) -> Tensor:
    """[height, width, channels] -> [height, width]: the length of the Sobel gradient over both axes and all channels.

    Pixels beyond the border are those on it.

    >>> edge_strength(torch.arange(4.0).expand(3, 4).unsqueeze(-1))[1].tolist()
    [0.5, 1.0, 1.0, 0.5]
    """
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=picture.device) / 8
    sobel = torch.stack([across, across.T]).unsqueeze(1).to(picture.dtype)
    padded = nn.functional.pad(picture.movedim(-1, 0).unsqueeze(1), (1, 1, 1, 1), mode="replicate")
    return nn.functional.conv2d(padded, sobel).square().sum((0, 1)).sqrt()


def _kernels(
    parameters: int | None, least: int, half_extent: Sequence[float], channels: int, options: Mapping[str, Any]
) -> int:
    """How many kernels a picture's field has: what the parameters have room for, or else what a hash grid's have."""
    if parameters is None:
        names = ("log2_hashmap_size", "base_resolution", "finest_resolution", "width", "hidden_layers")
        budget = hash_grid_parameters(2, channels, **{name: options[name] for name in names})
        return max(affordable_kernels(budget, half_extent, channels, **options), least)
    kernels = affordable_kernels(parameters, half_extent, channels, stored=True, **options)
    if kernels < 1:
        raise ValueError(
            f"NeuRBFImageField: {parameters} parameters have no room for a kernel beside the grid and the decoder; ask "
            "for more of them, or for fewer levels or less width"
        )
    return kernels


class NeuRBFImageField(NeuRBFField):
    """A picture by NeuRBF: x [..., 2] in [0, 1] -> [..., channels], about in [0, 1], not clamped.

    size: (width, height) in pixels, 1/64 of a unit each. parameters: how many numbers the field may hold. None for
    finest_resolution: half the longer side, or, where parameters are given, what `affordable_grid` finds for 0.85 of
    those beside the decoder's. None for kernels: as many as the parameters have room for, or, where those are None, as
    a hash grid of 16 levels and an MLP have parameters for (`affordable_kernels`). `adapt` puts them at the edges of
    the picture. Raises ValueError where the parameters have no room for a kernel, and for both at once.
    `NeuRBFImageField(**field.config)` has the same parameters.

    Source: Chen et al., "NeuRBF: A Neural Fields Representation with Adaptive Radial Basis Functions", ICCV 2023,
    configs/img.py.

    >>> import torch
    >>> field = NeuRBFImageField(size=(64, 48))
    >>> field.adapt(torch.rand(48, 64, 3))
    >>> field(torch.rand(5, 2)).shape
    torch.Size([5, 3])
    """

    # The public code, which does many more steps, has rates of 1e-2 for the decoder and 5e-3 for the others.
    learning_rate = 5e-3
    grid_factor = 4.0
    feature_factor = 1.0

    def __init__(
        self,
        channels: int = 3,
        size: Sequence[int] = (512, 512),
        kernels: int | None = None,
        neighbors: int = 4,
        n_levels: int = 2,
        n_features_per_level: int = 2,
        log2_hashmap_size: int = 24,
        finest_resolution: int | None = None,
        width: int = 64,
        hidden_layers: int = 2,
        feature_waves: tuple[float, float] = (2.0**-3, 2.0**12),
        parameters: int | None = None,
        decoder_waves: tuple[float, float] = (10.0, 100.0),
        *,
        backend: str | None = None,
    ):
        for name, count in (("channels", channels), ("width of size", size[0]), ("height of size", size[1])):
            check_size("NeuRBFImageField", name, count)
        if kernels is not None and parameters is not None:
            raise ValueError("NeuRBFImageField: kernels and parameters were both given; leave one of them out")
        finest = max(2, max(size) // 2) if finest_resolution is None else finest_resolution
        if parameters is not None and finest_resolution is None:
            decoder = mlp_parameters(n_levels * n_features_per_level + FEATURES, channels, width, hidden_layers)
            finest, log2_hashmap_size = affordable_grid(
                int(GRID_SHARE * (parameters - decoder)), max(size), n_levels, n_features_per_level, log2_hashmap_size
            )
        base = min(BASE_RESOLUTION, finest)
        half_extent = [side / 2 / PIXELS_PER_UNIT for side in size]
        options = {
            "n_levels": n_levels, "n_features_per_level": n_features_per_level, "width": width,
            "log2_hashmap_size": log2_hashmap_size, "base_resolution": base, "finest_resolution": finest,
            "hidden_layers": hidden_layers, "features": FEATURES, "feature_waves": tuple(feature_waves),
            "decoder_waves": tuple(decoder_waves),
        }  # fmt: skip
        if kernels is None:
            kernels = min(_kernels(parameters, neighbors, half_extent, channels, options), size[0] * size[1])
        neighbors = min(neighbors, kernels)
        super().__init__(half_extent, channels, kernels, neighbors=neighbors, backend=backend, **options)
        self.config = {
            "channels": channels, "size": list(size), "kernels": kernels, "neighbors": neighbors,
            "n_levels": n_levels, "n_features_per_level": n_features_per_level,
            "log2_hashmap_size": log2_hashmap_size, "finest_resolution": finest, "width": width,
            "hidden_layers": hidden_layers, "feature_waves": list(feature_waves), "decoder_waves": list(decoder_waves),
        }  # fmt: skip

    def adapt(
        self,
        picture: Tensor,
        *,
        generator: torch.Generator | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """Puts the kernels where the picture [height, width, channels] changes, by its `edge_strength`.

        Where fewer pixels than there are kernels have any, all pixels get the mean in addition. generator, progress:
        `place`. Raises ValueError for a picture of another size, or of fewer pixels than there are kernels.
        """
        width, height = self.config["size"]
        check_shape("NeuRBFImageField", "picture", picture, [height, width, "channels"], "the field has this size")
        weights = edge_strength(picture).flatten()
        if int((weights > 0).sum()) < len(self.basis.centers):
            weights = weights + (weights.mean() if weights.any() else 1)
        x = pixel_centres(torch.arange(width * height, device=picture.device), width, height)
        self.place(x, weights, (width, height), generator=generator, progress=progress)
