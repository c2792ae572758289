# SPDX-License-Identifier: MIT
"""The modulated MLP in eager PyTorch with its fastest operations: the baseline.

F.layer_norm without scale and shift normalises a point; gamma * h + beta in two operations is faster on the CPU than
addcmul, whose operands broadcast here; relu works in place; one grid_sample reads the grids of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("blend",)


def read_grids(coords: Tensor, grids: Tensor, padding: str = "border", align_corners: bool = True) -> Tensor:
    """coords [n, 2], grids [layers, 2, h, w] -> modulation [n, layers, 2]."""
    maps, at = grids.flatten(0, 1).unsqueeze(0), coords[None, None]
    sampled = F.grid_sample(maps, at, padding_mode=padding, align_corners=align_corners)
    return sampled[0, :, 0].unflatten(0, grids.shape[:2]).movedim(-1, 0)


def make(options: dict[str, Any], device: str, form: str = "blend") -> Callable[..., Tensor]:
    """function(x [n, in], weights, biases or None, modulation [n, hidden, 2 (, width)] or None) -> [n, out].

    Instead of modulation: coords and grids, in which it is.
    """
    norm, activation, omega, skips = (options[name] for name in ("norm", "activation", "omega", "skips"))
    frequencies, output_layer = options.get("frequencies"), options.get("output_layer", True)

    def activate(h: Tensor, layer: int) -> Tensor:
        name = activation if isinstance(activation, str) else activation[layer]
        if name == "residual_sine":
            return h + torch.sin(h * frequencies)
        return torch.sin(omega * h) if name == "sine" else h.relu_()

    def function(
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None = None,
        modulation: Tensor | None = None,
        coords: Tensor | None = None,
        grids: Tensor | None = None,
    ) -> Tensor:
        hidden = list(zip(weights, repeat(None) if biases is None else biases, strict=False))
        last = hidden.pop() if output_layer else None
        if grids is not None:
            modulation = read_grids(coords, grids)
        if modulation is not None and modulation.ndim == 3:
            modulation = modulation.unsqueeze(-1)
        h = x
        for i, (w, b) in enumerate(hidden):
            h = F.linear(h, w, b)
            if norm == "point":
                h = F.layer_norm(h, h.shape[-1:])
            if modulation is not None:
                h = modulation[:, i, 0] * h + modulation[:, i, 1]
            h = activate(h, i)
            if i in skips:
                h = torch.cat([h, x], -1)
        return h if last is None else F.linear(h, *last)

    return function
