# SPDX-License-Identifier: MIT
"""mip-NeRF's network with layers that are modulated by the direction of the ray.

The public code's mip-NeRF 360 has no field here: as released it cannot be imported and, mended, modulates no layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import Modulate, coordinate_modulation
from .._backends import BACKENDS
from .._checks import check_choice, check_shape
from .field import Field
from .quantization import FULL, quantize_range
from .radiance import skips_of


def spherical(directions: Tensor) -> Tensor:
    """Directions [B, 3] -> [2, B]: azimuth in [0, 1], atan2(y, x) / 2 pi + 1/2, and elevation in [-1, 1],
    -2/pi atan2(z, hypot(x, y)), which is positive for rays that look down. Gradients are 0 along the z axis, where the
    angles have none."""
    vertical = (directions[..., :2] == 0).all(-1)
    other = torch.where(vertical.unsqueeze(-1), directions.new_tensor([1.0, 0.0, 0.0]), directions)
    return torch.where(vertical, _angles(directions.detach()), _angles(other))


def _angles(directions: Tensor) -> Tensor:
    x, y, z = directions.unbind(-1)
    azimuth = torch.atan2(y, x) / math.pi / 2 + 0.5
    return torch.stack([azimuth, torch.atan2(z, torch.sqrt(x * x + y * y)) * (-2 / math.pi)])


class RayModulation(Field):
    """y = act(gamma n + beta), n = h normalised over the samples and channels of a ray; gamma, beta of its direction.

    h [B, S, C] with B rays of S samples, sph [2, B] as `spherical` gives it -> [B, S, C]. gamma and beta are grids of
    `res` nodes for azimuth in [0, 1] and elevation in [0, 1]: rays that look up have the first node's, and azimuth does
    not wrap around. All samples of a ray depend on each other. bits: of quantised grids, 32 for none.

    `load_official` takes the parameters of the flax layer, {"gamma": ..., "beta": ...}.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024; the class `affine` of
    CAM_mipnerf/internal/models.py, whose line `def __call__(self, x, coord):` is missing there.

    >>> RayModulation()(torch.randn(4, 6, 8), spherical(torch.randn(4, 3))).shape
    torch.Size([4, 6, 8])
    """

    def __init__(
        self,
        res: tuple[int, int] = (10, 3),
        eps: float = 1e-6,
        bits: int = FULL,
        activation: str | None = None,
        *,
        backend: str | None = None,
    ):
        super().__init__()
        check_choice("RayModulation", "backend", backend, (None, *BACKENDS))
        self.config = {"res": tuple(res), "eps": eps, "bits": bits, "activation": activation}
        self.bits, self.backend = bits, backend
        self.gamma, self.beta = nn.Parameter(torch.ones(*res)), nn.Parameter(torch.zeros(*res))
        self.modulate = Modulate("ray", eps, activation, backend=backend)

    def forward(self, h: Tensor, sph: Tensor) -> Tensor:
        """h [B, S, C], sph [2, B] -> [B, S, C]."""
        check_shape("RayModulation", "sph", sph, [2, h.shape[0]], "one column per ray of h, see spherical()")
        grids = torch.stack([quantize_range(p, self.bits) for p in (self.gamma, self.beta)])
        coords = 2 * sph.flip(0).T - 1  # elevation runs along the last axis of the grids
        found = coordinate_modulation(coords, grids.unsqueeze(0), backend=self.backend)
        gamma, beta = found[:, 0, :, None, None].unbind(1)
        return self.modulate(h, gamma, beta)

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: own[name] for name in ("gamma", "beta")}


class MipNeRFField(Field):
    """Features of the samples of rays -> raw colour and density, before mip-NeRF's activations.

    x [B, S, in_features], directions [B, 3], condition [B, condition_features] -> (rgb [B, S, 3], density [B, S, 1]).
    The trunk has net_depth layers relu(ray modulation(W h + b)) of net_width, x again behind every skip_layer-th; then
    density, a bottleneck, one ReLU layer of net_width_condition on it and the condition, and rgb. bits: of quantised
    weights and grids, not biases; 32 for none.

    `load_official` takes the flax parameters of MLP, nested or with names joined by dots.

    Source: as `RayModulation`, the class MLP.

    >>> field = MipNeRFField(in_features=9, condition_features=5, net_width=16)
    >>> rgb, density = field(torch.rand(4, 6, 9), torch.randn(4, 3), torch.rand(4, 5))
    >>> rgb.shape, density.shape
    (torch.Size([4, 6, 3]), torch.Size([4, 6, 1]))
    """

    learning_rate = 5e-4

    def __init__(
        self,
        in_features: int = 96,
        condition_features: int = 27,
        net_depth: int = 8,
        net_width: int = 256,
        skip_layer: int = 4,
        net_width_condition: int = 128,
        res: tuple[int, int] = (10, 3),
        bits: int = FULL,
        *,
        backend: str | None = None,
    ):
        super().__init__()
        self.config = {
            "in_features": in_features, "condition_features": condition_features, "net_depth": net_depth,
            "net_width": net_width, "skip_layer": skip_layer, "net_width_condition": net_width_condition,
            "res": tuple(res), "bits": bits,
        }  # fmt: skip
        self.bits, self.skips = bits, skips_of(net_depth, skip_layer)
        widths = [in_features] + [net_width + in_features * (i in self.skips) for i in range(net_depth)]
        self.trunk = nn.ModuleList(nn.Linear(width, net_width) for width in widths[:-1])
        self.modulation = nn.ModuleList(
            RayModulation(res, bits=bits, activation="relu", backend=backend) for _ in range(net_depth)
        )
        self.density, self.bottleneck = nn.Linear(widths[-1], 1), nn.Linear(widths[-1], net_width)
        self.view = nn.Linear(net_width + condition_features, net_width_condition)
        self.rgb = nn.Linear(net_width_condition, 3)
        for layer in (*self.trunk, self.density, self.bottleneck, self.view, self.rgb):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, directions: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """(rgb [B, S, 3], density [B, S, 1])."""
        sph, h = spherical(directions), x
        for i, (layer, modulation) in enumerate(zip(self.trunk, self.modulation, strict=True)):
            h = modulation(self._linear(layer, h), sph)
            h = torch.cat([h, x], -1) if i in self.skips else h
        views = condition.unsqueeze(1).expand(-1, h.shape[1], -1)
        view = F.relu(self._linear(self.view, torch.cat([self._linear(self.bottleneck, h), views], -1)))
        return self._linear(self.rgb, view), self._linear(self.density, h)

    def _linear(self, layer: nn.Linear, h: Tensor) -> Tensor:
        return F.linear(h, quantize_range(layer.weight, self.bits), layer.bias)

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        depth = self.config["net_depth"]
        ours = [f"trunk.{i}" for i in range(depth)] + ["density", "bottleneck", "view", "rgb"]
        views = {}
        for i, name in enumerate(ours):
            views |= {f"Dense_Q_{i}.kernel": own[f"{name}.weight"].T, f"Dense_Q_{i}.bias": own[f"{name}.bias"]}
        for i in range(depth):
            views |= {f"affine_{i}.{name}": own[f"modulation.{i}.{name}"] for name in ("gamma", "beta")}
        return views
