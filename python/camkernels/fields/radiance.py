# SPDX-License-Identifier: MIT
"""Radiance fields of points: NerfAcc's static and dynamic networks, modulated by position or by time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .. import CoordinateModulation, ModulatedMLP
from .._checks import check_choice
from .encodings import SinusoidalEncoder
from .field import Field, linear_views

HALF_EXTENT = 1.5  # positions are in [-1.5, 1.5]
RESOLUTIONS = {"position": (512, 512), "time": (5,)}


def xavier_(mlp: ModulatedMLP) -> ModulatedMLP:
    """Draws the weights anew as the radiance codes do: U(-a, a), a = sqrt(6 / (in + out)); biases 0."""
    for layer in mlp.layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return mlp


def skips_of(depth: int, skip_layer: int | None) -> range:
    """Layers, counted from 0, behind which the input is concatenated again: every skip_layer-th but not the first."""
    return range(skip_layer, depth, skip_layer) if skip_layer else range(0)


class RadianceField(Field):
    """Position and direction -> colour and density, hidden layers scaled and shifted by position or by time.

    x [..., 3] in [-1.5, 1.5], direction [..., 3], time [..., 1] in [0, 1] (for modulated_by="time") -> rgb [..., 3] in
    (0, 1), sigma [..., 1] >= 0. The trunk: net_depth ReLU layers of net_width on the sines of x, x's sines again behind
    every skip_layer-th; no norm. Then sigma, and from a linear bottleneck and the sines of the direction one layer of
    net_width_condition and rgb. modulated_by: "position", products of three planes of `resolution`, through which no
    gradient reaches x; "time", a line of `resolution` nodes; None. Both are 0 beyond the ends.

    The planes of the public code's shift begin at 0 and, their product having no gradient there, stay: beta_init=
    "zeros" does the same, "auto" draws them.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024; the class VanillaNeRFRadianceField
    of CAM_nerfacc/examples/radiance_fields/mlp.py.

    >>> field = RadianceField(resolution=(32, 32), net_width=64)
    >>> rgb, sigma = field(torch.rand(5, 3), torch.rand(5, 3))
    >>> rgb.shape, sigma.shape
    (torch.Size([5, 3]), torch.Size([5, 1]))
    """

    learning_rate, grid_factor = 5e-4, 10.0

    def __init__(
        self,
        net_depth: int = 8,
        net_width: int = 256,
        skip_layer: int = 4,
        net_width_condition: int = 128,
        modulated_by: str | None = "position",
        resolution: tuple[int, ...] | None = None,
        beta_init: str = "auto",
        *,
        backend: str | None = None,
    ):
        super().__init__()
        check_choice("RadianceField", "modulated_by", modulated_by, (None, *RESOLUTIONS))
        self.config = {
            "net_depth": net_depth, "net_width": net_width, "skip_layer": skip_layer,
            "net_width_condition": net_width_condition, "modulated_by": modulated_by, "resolution": resolution,
            "beta_init": beta_init,
        }  # fmt: skip
        self.modulated_by = modulated_by
        self.encoder, self.view_encoder = SinusoidalEncoder(3, 0, 10), SinusoidalEncoder(3, 0, 4)
        place, skips = {"backend": backend}, skips_of(net_depth, skip_layer)
        inputs, hidden = self.encoder.latent_dim, net_depth
        self.trunk = xavier_(
            ModulatedMLP(inputs, net_width, net_width, hidden, skips=skips, output_layer=False, **place)
        )
        outputs = net_width + inputs * (hidden - 1 in skips)
        self.density = xavier_(ModulatedMLP(outputs, 1, hidden_layers=0, output_activation="relu", **place))
        self.bottleneck = xavier_(ModulatedMLP(outputs, net_width, hidden_layers=0, **place))
        views = net_width + self.view_encoder.latent_dim
        self.colour = xavier_(ModulatedMLP(views, 3, net_width_condition, 1, output_activation="sigmoid", **place))
        self.modulation = None
        if modulated_by is not None:
            self.modulation = CoordinateModulation(
                hidden, resolution or RESOLUTIONS[modulated_by], padding="zeros", beta_init=beta_init, **place,
                combine="plane_product" if modulated_by == "position" else "single",
            )  # fmt: skip

    def forward(self, x: Tensor, direction: Tensor, time: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(rgb [..., 3], sigma [..., 1])."""
        h = self._hidden(x, time)
        features = torch.cat([self.bottleneck(h), self.view_encoder(direction.expand_as(x))], -1)
        return self.colour(features), self.density(h)

    def query_density(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """sigma [..., 1] alone."""
        return self.density(self._hidden(x, time))

    def _hidden(self, x: Tensor, time: Tensor | None) -> Tensor:
        modulation = None
        if self.modulated_by == "position":
            modulation = self.modulation(x.detach() / HALF_EXTENT)
        elif self.modulated_by == "time":
            if time is None:
                raise ValueError(
                    "RadianceField: time must be a tensor [..., 1] in [0, 1] for modulated_by='time', got None"
                )
            modulation = self.modulation(2 * time - 1)
        return self.trunk(self.encoder(x), modulation)

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        heads = {
            "density.layers.0": "mlp.sigma_layer.output_layer",
            "bottleneck.layers.0": "mlp.bottleneck_layer.output_layer",
            "colour.layers.0": "mlp.rgb_layer.hidden_layers.0",
            "colour.layers.1": "mlp.rgb_layer.output_layer",
        }
        views = {"posi_encoder.scales": own["encoder.scales"], "view_encoder.scales": own["view_encoder.scales"]}
        for ours, theirs in heads.items():
            views |= linear_views(own, ours, theirs)
        for i in range(self.config["net_depth"]):
            views |= linear_views(own, f"trunk.layers.{i}", f"mlp.base.hidden_layers.{i}")
            if self.modulation is not None:
                grid = own["modulation.grids"][i]
                planes = grid.flatten(0, 1).unsqueeze(1)  # [6, 1, h, w]: gamma's, then beta's
                views[f"mlp.base.affines.{i}"] = planes if self.modulated_by == "position" else grid[None, ..., None]
        return views


class DynamicRadianceField(Field):
    """A scene that moves: x + warp(x, t) is looked up in a RadianceField that is modulated by time.

    Arguments as there; the warp is an MLP of 4 ReLU layers of 64 on the sines of x and t, not modulated.

    Source: as there, the class TNeRFRadianceField.

    >>> field = DynamicRadianceField(net_width=32)
    >>> rgb, sigma = field(torch.rand(5, 3), torch.rand(5, 1), torch.rand(5, 3))
    >>> rgb.shape, sigma.shape
    (torch.Size([5, 3]), torch.Size([5, 1]))
    """

    learning_rate = 5e-4

    def __init__(
        self,
        net_depth: int = 8,
        net_width: int = 256,
        skip_layer: int = 4,
        net_width_condition: int = 128,
        nodes: int = 5,
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.config = {
            "net_depth": net_depth, "net_width": net_width, "skip_layer": skip_layer,
            "net_width_condition": net_width_condition, "nodes": nodes,
        }  # fmt: skip
        self.encoder, self.time_encoder = SinusoidalEncoder(3, 0, 4), SinusoidalEncoder(1, 0, 4)
        inputs = self.encoder.latent_dim + self.time_encoder.latent_dim
        self.warp = xavier_(ModulatedMLP(inputs, 3, width=64, hidden_layers=4, skips=skips_of(4, 2), backend=backend))
        nn.init.uniform_(self.warp.layers[-1].weight, 0, 1e-4)  # at first nothing moves
        self.radiance = RadianceField(
            net_depth, net_width, skip_layer, net_width_condition, "time", (nodes,), backend=backend
        )

    def forward(self, x: Tensor, time: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., 3], time [..., 1] in [0, 1], direction [..., 3] -> (rgb [..., 3], sigma [..., 1])."""
        return self.radiance(self.warped(x, time), direction, time)

    def query_density(self, x: Tensor, time: Tensor) -> Tensor:
        """sigma [..., 1] alone."""
        return self.radiance.query_density(self.warped(x, time), time)

    def warped(self, x: Tensor, time: Tensor) -> Tensor:
        """Where the point at x at that time lies in the scene at rest: [..., 3]."""
        return x + self.warp(torch.cat([self.encoder(x), self.time_encoder(time)], -1))

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prefix = "radiance."
        inner = {name.removeprefix(prefix): t for name, t in own.items() if name.startswith(prefix)}
        views = {f"nerf.{name}": view for name, view in self.radiance.official_views(inner).items()}
        views |= {
            "posi_encoder.scales": own["encoder.scales"],
            "time_encoder.scales": own["time_encoder.scales"],
        }
        for i in range(4):
            views |= linear_views(own, f"warp.layers.{i}", f"warp.hidden_layers.{i}")
        return views | linear_views(own, "warp.layers.4", "warp.output_layer")
