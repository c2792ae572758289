# SPDX-License-Identifier: MIT
"""Pictures from random Fourier features: the network of CAM's image experiment, with and without its modulation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .. import CoordinateModulation, ModulatedMLP
from .encodings import RandFourierFeature
from .field import Field, linear_views


class FourierImageField(Field):
    """A picture as an MLP on random Fourier features: x [..., 2] in [0, 1] -> [..., channels] in (0, 1).

    num_frequencies frequencies of deviation `sigma` cycles per unit, hidden_layers ReLU layers of `width`, normalised
    over the values of a point if norm="point", a linear layer and a sigmoid.

    Source: Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions", 2020; the class FFN of
    maincold2/CAM, CAM_image.py.

    >>> import torch
    >>> FourierImageField()(torch.rand(5, 2)).shape
    torch.Size([5, 3])
    """

    ops: tuple[str, ...] = ("modulated_mlp",)
    grid_factor = 10.0

    def __init__(
        self,
        channels: int = 3,
        width: int = 256,
        hidden_layers: int = 3,
        num_frequencies: int = 256,
        sigma: float = 10.0,
        norm: str | None = None,
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.config = {
            "channels": channels, "width": width, "hidden_layers": hidden_layers, "num_frequencies": num_frequencies,
            "sigma": sigma, "norm": norm,
        }  # fmt: skip
        self.modulation: CoordinateModulation | None = None
        self.encoder = RandFourierFeature(2, num_frequencies, sigma, scale=-1)
        self.mlp = ModulatedMLP(
            self.encoder.out_features, channels, width, hidden_layers, norm=norm, output_activation="sigmoid",
            backend=backend,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 2] -> [..., channels]."""
        return self.mlp(self.encoder(x), None if self.modulation is None else self.modulation(2 * x - 1))

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.config["hidden_layers"]
        views = {"pos_enc.proj": own["encoder.proj"]} | linear_views(own, f"mlp.layers.{hidden}", "FC_final.linear")
        for i in range(hidden):
            views |= linear_views(own, f"mlp.layers.{i}", f"FC_{i}.linear")
            if self.modulation is not None:
                views[f"FC_{i}.affine"] = own["modulation.grids"][i, None]
        return views


class CAMImageField(FourierImageField):
    """The same with a scale and a shift for each point and hidden layer, read from a grid of nodes x nodes:

        h <- relu(gamma_i(x) norm(W_i h + b_i) + beta_i(x))

    The public code's x is (row, column), so the second axis of its grids goes down the picture; ours is (x, y).

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024; the class CAM of CAM_image.py.

    >>> import torch
    >>> CAMImageField(channels=1)(torch.rand(5, 2)).shape
    torch.Size([5, 1])
    """

    ops = ("coordinate_modulation", "modulated_mlp")

    def __init__(
        self,
        channels: int = 3,
        width: int = 256,
        hidden_layers: int = 3,
        num_frequencies: int = 256,
        sigma: float = 10.0,
        norm: str | None = "point",
        nodes: int = 32,
        *,
        backend: str | None = None,
    ):
        super().__init__(channels, width, hidden_layers, num_frequencies, sigma, norm, backend=backend)
        self.config["nodes"] = nodes
        self.modulation = CoordinateModulation(hidden_layers, (nodes, nodes), backend=backend)
