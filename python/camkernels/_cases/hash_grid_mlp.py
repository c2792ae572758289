# SPDX-License-Identifier: MIT
"""Inputs of the hash grid with an MLP behind it: sizes that its kernel pads, options of both ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._geometry import GridGeometry
from .modulated_mlp import _Draw

# By name: what differs from n=50 points (or leading axes), 2 hidden layers of 20 channels, 3 outputs, and of a grid of
# 4 levels of 2 features in 2 dimensions.
GRIDS: dict[str, dict[str, Any]] = {
    "plain": {"norm": None},
    "per-channel": {"modulation": ((50,), True), "interpolation": "smoothstep"},
    "padded-features": {"dims": 3, "features": 3, "levels": 5, "skips": (0, 1), "output_layer": False},
    "levels-per-point": {"levels": 3, "features": 1, "max_level": "per_point", "outside": "zero", "skips": (1,)},
    "some-levels": {"dims": 1, "features": 4, "levels": 8, "max_level": 5, "interpolation": "nearest", "bias": False},
    "no-level": {"max_level": 0},
    "many-levels": {"dims": 4, "levels": 16, "outside": "wrap", "modulation": ((1,), False), "leading": (200,)},
    "not-a-number": {"broken": True},
    "no-points": {"leading": (0,), "modulation": ((1,), True)},
}
GRID_SIZE = {"dims": 2, "levels": 4, "features": 2}


def draw_network(draw: _Draw, features: int, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights, biases and modulation, remaining arguments) of an MLP behind that many features."""
    hidden, width = options.get("hidden", 2), options.get("width", 20)
    rest = {"activation": "tanh", "norm": "point", "eps": 1e-2, "skips": (), "output_layer": True}
    rest |= {name: value for name, value in options.items() if name in rest}
    outs, inputs, fan_in = [width] * hidden + [3] * rest["output_layer"], {}, features
    for i, out in enumerate(outs):
        bound = (3 / fan_in) ** 0.5
        inputs[f"weights.{i}"] = draw(out, fan_in, low=-bound, high=bound)
        fan_in = out + features * (i in rest["skips"])
    if options.get("bias", True):
        inputs |= {f"biases.{i}": draw(out) for i, out in enumerate(outs)}
    if "modulation" in options:
        axes, channels = options["modulation"]
        inputs["modulation"] = draw(*axes, hidden, 2, *([width] if channels else []), low=0.3, high=1.5)
    return inputs, rest


def make(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int, points: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(inputs, remaining arguments). There are no other points than mixed ones."""
    draw = _Draw(dtype, device, seed)
    dims, levels, features = (options.get(name, default) for name, default in GRID_SIZE.items())
    geometry = GridGeometry.build(
        dims, levels, features, 9, base_resolution=4, finest_resolution=30, outside=options.get("outside", "clamp")
    )
    leading = options.get("leading", (50,))
    x = draw(*leading, dims, low=-0.1, high=1.1, dtype=draw.point_dtype)
    if options.get("broken"):
        x[7, 0] = torch.nan
    inputs, rest = draw_network(draw, levels * features, options)
    max_level = options.get("max_level")
    max_level = draw(*leading, low=0.0, dtype=draw.point_dtype) if max_level == "per_point" else max_level
    rest |= {"geometry": geometry, "max_level": max_level, "interpolation": options.get("interpolation", "linear")}
    return {"x": x, "table": draw(geometry.n_entries, features)} | inputs, rest
