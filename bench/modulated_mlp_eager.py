# SPDX-License-Identifier: MIT
"""The modulated MLP in eager PyTorch with its fastest operations: the baseline.

F.layer_norm without scale and shift normalises a point; gamma * h + beta in two operations is faster on the CPU than
addcmul, whose operands broadcast here; relu works in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("blend",)


def make(options: dict[str, Any], device: str, form: str = "blend") -> Callable[..., Tensor]:
    """function(x [n, in], weights, biases or None, modulation [n, hidden, 2 (, width)] or None) -> [n, out]."""
    norm, activation, omega, skips = (options[name] for name in ("norm", "activation", "omega", "skips"))
    frequencies = options.get("frequencies")

    def activate(h: Tensor, layer: int) -> Tensor:
        name = activation if isinstance(activation, str) else activation[layer]
        if name == "residual_sine":
            return h + torch.sin(h * frequencies)
        return torch.sin(omega * h) if name == "sine" else h.relu_()

    def function(
        x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None, modulation: Tensor | None = None
    ) -> Tensor:
        *hidden, (weight, bias) = zip(weights, repeat(None) if biases is None else biases, strict=False)
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
        return F.linear(h, weight, bias)

    return function
