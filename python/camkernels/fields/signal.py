# SPDX-License-Identifier: MIT
"""Functions of one variable: x in [0, 1] -> values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .. import CoordinateModulation, ModulatedMLP
from .encodings import SinusoidalEncoder
from .field import Field, linear_views

DEGREES = (0, 16)


class SignalField(Field):
    """A signal as an MLP whose hidden layers are scaled and shifted along x: x [..., 1] in [0, 1] -> [..., out].

    h <- gamma_i(x) (W_i h + b_i) + beta_i(x), gamma and beta interpolated between `nodes` values, 0 beyond the ends;
    hidden_layers of `width`, then a linear layer. encoded: h begins with sines of 16 octaves beside x. The public code
    has no activation, also where it has no modulation: those two models are linear maps of what they are given.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024, the classes CAM, CAM_PE, PE and
    NoEnc of CAM_1D/network.py.

    >>> import torch
    >>> SignalField(encoded=True)(torch.rand(5, 1)).shape
    torch.Size([5, 1])
    """

    def __init__(
        self,
        modulated: bool = True,
        encoded: bool = False,
        width: int = 64,
        hidden_layers: int = 4,
        nodes: int = 64,
        out_features: int = 1,
        activation: str | None = None,
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.config = {
            "modulated": modulated, "encoded": encoded, "width": width, "hidden_layers": hidden_layers, "nodes": nodes,
            "out_features": out_features, "activation": activation,
        }  # fmt: skip
        self.encoder = SinusoidalEncoder(1, *DEGREES) if encoded else None
        inputs = self.encoder.latent_dim if encoded else 1
        self.mlp = ModulatedMLP(inputs, out_features, width, hidden_layers, activation=activation, backend=backend)
        self.modulation = (
            CoordinateModulation(hidden_layers, nodes, padding="zeros", backend=backend) if modulated else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 1] -> [..., out_features]."""
        features = x if self.encoder is None else self.encoder(x)
        return self.mlp(features, None if self.modulation is None else self.modulation(2 * x - 1))

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.config["hidden_layers"]
        views = linear_views(own, f"mlp.layers.{hidden}", "net_last")
        for i in range(hidden):
            views |= linear_views(own, f"mlp.layers.{i}", f"net.{i}")
            if self.modulation is not None:
                views[f"affine.{i}"] = own["modulation.grids"][i, None, :, :, None]
        return views | ({} if self.encoder is None else {"time_encoder.scales": own["encoder.scales"]})
