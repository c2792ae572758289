# SPDX-License-Identifier: MIT
"""A video as a network of one variable, the time: FFNeRV's generator with CAM's temporal modulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import CoordinateModulation, Modulate, coordinate_modulation
from .._checks import check_size
from .field import Field, linear_views
from .quantization import FULL, quantize_tanh

HEAD_BITS = 8  # at least, in the layers that give pictures
GROUPS = 8  # of a compact convolution


def _convolve(x: Tensor, layer: nn.Conv2d, bits: int) -> Tensor:
    weight, bias = (quantize_tanh(p, bits) for p in (layer.weight, layer.bias))
    return F.conv2d(x, weight, bias, padding=layer.padding, groups=layer.groups)


class _Block(nn.Module):
    """Convolution, pixels shuffled to `stride` times the size, temporal modulation per channel, activation."""

    def __init__(self, before: int, after: int, stride: int, nodes: int, bits: int, activation: str, compact: bool,
                 backend: str | None):  # fmt: skip
        super().__init__()
        self.stride, self.bits = stride, bits
        inner = after * stride * stride
        split = compact and stride != 5  # where the picture is smallest the public code spares nothing
        self.conv = nn.Conv2d(before, inner, 3, padding=1, groups=GROUPS if split else 1)
        self.mix = nn.Conv2d(inner, inner, 1) if split else None
        self.modulation = CoordinateModulation(1, nodes, channels=after, backend=backend)
        self.modulate = Modulate("frame", activation=activation, backend=backend)

    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        h = _convolve(x, self.conv, self.bits)
        h = h if self.mix is None else _convolve(h, self.mix, self.bits)
        grids = quantize_tanh(self.modulation.grids, self.bits)
        found = coordinate_modulation(coords, grids, backend=self.modulation.backend)
        gamma, beta = found[:, 0, :, :, None, None].unbind(1)
        return self.modulate(F.pixel_shuffle(h, self.stride), gamma, beta)

    def official_views(self, own: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
        views = linear_views(own, f"{ours}.conv", f"{theirs}.conv.conv1")
        views |= {} if self.mix is None else linear_views(own, f"{ours}.mix", f"{theirs}.conv.conv2")
        grids = own[f"{ours}.modulation.grids"][0]
        return views | {f"{theirs}.norm.mod_grid.{k}": grids[k].T[..., None, None] for k in (0, 1)}


class VideoField(Field):
    """Times [B] in [0, 1] -> (aggregation weights [B, 3 aggregations, h, w], [B, 5, height, width]).

    Frames of channels 0 to 2 of the second are in [0, 1]; the rest belongs to FFNeRV's warping of neighbouring frames.
    Latent grids of `temporal_grids` frames each, `channels` in all, of `size` (h, w), are interpolated in time and pass
    blocks act(gamma_c(t) norm(conv) + beta_c(t)), norm over each frame and channel, gamma and beta of `nodes` times.
    Each block enlarges by its stride; the first has expansion * channels, the next 1/reduction of those before (all of
    them where the stride is 1), at least lower_width. compact: convolutions in 8 groups and one of 1 x 1 after them.
    bits < 32: everything is quantised, the last layers with at least 8 bits. sigmoid: in place of (tanh + 1) / 2.

    The public code reads beyond the last node at t = 1 (and, with rounding, just before); here that node is held.

    Source: Lee et al., "FFNeRV: Flow-Guided Frame-Wise Neural Representations for Videos", 2022; Lee et al.,
    "Coordinate-Aware Modulation for Neural Fields", ICLR 2024; the class Generator of CAM_ffnerv/model.py.

    >>> field = VideoField((2, 3), 8, (2, 1, 2), temporal_grids=(4, 6), nodes=5, lower_width=4)
    >>> [y.shape for y in field(torch.rand(2))]
    [torch.Size([2, 12, 4, 6]), torch.Size([2, 5, 8, 12])]
    """

    learning_rate = 5e-4

    def __init__(
        self,
        size: tuple[int, int] = (9, 16),
        channels: int = 156,
        strides: Sequence[int] = (5, 2, 2, 2, 2),
        temporal_grids: Sequence[int] = (64, 128, 256, 512),
        nodes: int = 60,
        *,
        expansion: float = 1.0,
        reduction: int = 2,
        lower_width: int = 96,
        aggregations: int = 4,
        activation: str = "gelu",
        compact: bool = False,
        sigmoid: bool = False,
        bits: int = FULL,
        backend: str | None = None,
    ):
        super().__init__()
        if len(strides) < 3:
            raise ValueError(f"VideoField: strides must be at least 3, for two heads, got {len(strides)}")
        check_size("VideoField", "number of temporal_grids", len(temporal_grids))
        if channels % len(temporal_grids):
            raise ValueError(
                f"VideoField: channels must be a multiple of the number of temporal_grids, {len(temporal_grids)}, got "
                f"{channels}"
            )
        self.config = {
            "size": tuple(size), "channels": channels, "strides": tuple(strides),
            "temporal_grids": tuple(temporal_grids), "nodes": nodes, "expansion": expansion, "reduction": reduction,
            "lower_width": lower_width, "aggregations": aggregations, "activation": activation, "compact": compact,
            "sigmoid": sigmoid, "bits": bits,
        }  # fmt: skip
        share = channels // len(temporal_grids)
        self.latent = nn.ParameterList(nn.init.xavier_uniform_(torch.empty(t, share, *size)) for t in temporal_grids)
        widths = [channels, int(channels * expansion)]
        for stride in strides[1:]:
            widths.append(max(widths[-1] // (1 if stride == 1 else reduction), lower_width))
        self.blocks = nn.ModuleList(
            _Block(widths[i], widths[i + 1], stride, nodes, bits, activation, compact, backend)
            for i, stride in enumerate(strides)
        )
        self.aggregation_head = nn.Conv2d(widths[-3], 3 * aggregations, 1)
        self.head = nn.Conv2d(widths[-1], 5, 1)
        self.bits, self.head_bits = bits, max(bits, HEAD_BITS)
        self.squash = torch.sigmoid if sigmoid else _half_tanh

    def forward(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """times [B] -> (aggregation weights, frames with two more channels)."""
        h = torch.cat([_frame_at(times, quantize_tanh(grid, self.bits)) for grid in self.latent], 1)
        coords = (2 * times - 1).unsqueeze(-1)
        for i, block in enumerate(self.blocks):
            h = block(h, coords)
            if i == len(self.blocks) - 3:
                weights = _convolve(h, self.aggregation_head, self.head_bits)
        frames = _convolve(h, self.head, self.head_bits)
        return weights, torch.cat([self.squash(frames[:, :3]), frames[:, 3:]], 1)

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        last = len(self.blocks) - 1
        views = {f"video_grid.{i}": own[f"latent.{i}"] for i in range(len(self.latent))}
        for i, block in enumerate(self.blocks):
            views |= block.official_views(own, f"blocks.{i}", f"layers.{i}")
        views |= linear_views(own, "aggregation_head", f"head_layers.{last - 2}")
        return views | linear_views(own, "head", f"head_layers.{last}")


def _half_tanh(x: Tensor) -> Tensor:
    return (torch.tanh(x) + 1) * 0.5


def _frame_at(times: Tensor, grid: Tensor) -> Tensor:
    """Frames [B, C, h, w] of a latent grid [T, C, h, w], whose frame i is that of the time i / T; the last is held."""
    position = times * len(grid)
    left = torch.floor(position.detach() + 1e-6).long().clamp(0, len(grid) - 1)
    share = (position - left).reshape(-1, 1, 1, 1)
    return (1 - share) * grid[left] + share * grid[(left + 1).clamp(max=len(grid) - 1)]
