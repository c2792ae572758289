# SPDX-License-Identifier: MIT
"""Encodings of coordinates by sines, with the constructors, attributes and buffers of the public CAM code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .._backends import define
from .._layers import KeepsFrequencies


class SinusoidalEncoder(nn.Module):
    """[x, sin(2^k x), sin(2^k x + pi/2)], k from min_deg to max_deg - 1 and for each k all axes of x; no factor pi.

    x [..., x_dim] -> [..., latent_dim]; without x itself if use_identity is False, and x alone if there is no k.

    Source: Mildenhall et al., "NeRF", 2020, as maincold2/CAM computes it.

    >>> SinusoidalEncoder(3, 0, 10)(torch.rand(5, 3)).shape
    torch.Size([5, 63])
    """

    def __init__(self, x_dim: int, min_deg: int, max_deg: int, use_identity: bool = True):
        super().__init__()
        self.x_dim, self.min_deg, self.max_deg, self.use_identity = x_dim, min_deg, max_deg, use_identity
        self.register_buffer("scales", torch.tensor([2**k for k in range(min_deg, max_deg)]))

    @property
    def latent_dim(self) -> int:
        return (int(self.use_identity) + 2 * (self.max_deg - self.min_deg)) * self.x_dim

    def forward(self, x: Tensor) -> Tensor:
        """x [..., x_dim] -> [..., latent_dim]."""
        if self.max_deg == self.min_deg:
            return x
        phase = (x.unsqueeze(-2) * self.scales.unsqueeze(-1)).flatten(-2)
        waves = torch.sin(torch.cat([phase, phase + 0.5 * math.pi], -1))
        return torch.cat([x, waves], -1) if self.use_identity else waves


class RandFourierFeature(KeepsFrequencies):
    """scale / sqrt(num_frequencies) * [sin(p), cos(p)],  p = sigma x B; scale -1 stands for no factor.

    x [..., in_features] -> [..., 2 num_frequencies]. The entries of B, the buffer `proj`, are drawn once from N(0, 1)
    times 2 pi / range, range being the length of the interval that coordinates come from. Phases are in float32 at
    least, also under autocast and in a layer that was converted to 16 bits.

    Source: Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions", 2020, as maincold2/CAM
    computes it.

    >>> RandFourierFeature(2, num_frequencies=8, scale=-1)(torch.rand(5, 2)).shape
    torch.Size([5, 16])
    """

    _frequency_buffer = "proj"

    def __init__(
        self, in_features: int, num_frequencies: int = 256, sigma: float = 10, scale: float = 80, range: float = 1.0
    ):
        super().__init__()
        self.in_features, self.num_frequencies, self.out_features = in_features, num_frequencies, 2 * num_frequencies
        self.sigma, self.scale, self.range = sigma, scale, range
        self.register_buffer("proj", torch.empty(in_features, num_frequencies))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the frequencies anew."""
        nn.init.normal_(self.proj).mul_(2 * math.pi / self.range)

    def forward(self, coords: Tensor) -> Tensor:
        """coords [..., in_features] -> [..., out_features]."""
        dtype = torch.promote_types(coords.dtype, self.proj.dtype)
        phase = define(torch.matmul, coords.to(dtype), self.proj.to(dtype) * self.sigma)
        waves = torch.cat([phase.sin(), phase.cos()], -1)
        if coords.dtype in (torch.float16, torch.bfloat16):
            waves = waves.to(coords.dtype)
        return waves if self.scale == -1 else waves * (self.scale / math.sqrt(self.num_frequencies))
