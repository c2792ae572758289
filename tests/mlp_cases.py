# SPDX-License-Identifier: MIT
"""Calls beside the registry's: MLPs of many points and wide layers, and the hash grid with an MLP behind it."""

from __future__ import annotations

from typing import Any

import torch

from camkernels import GridGeometry, testing

# By name: what differs from n=50 points (or leading axes), 2 hidden layers of 20 channels, 3 outputs, and what follows.
SIZES: dict[str, dict[str, Any]] = {
    "several-tiles": {"leading": (300,)},
    "shared-by-all": {"leading": (300,), "modulation": ((1,), True)},
    "shared-by-rays": {"leading": (3, 100), "modulation": ((3, 1), True)},
    "shared-by-short-rays": {"leading": (60, 5), "modulation": ((60, 1), False)},
    "several-chunks": {"features": 70, "width": 130, "skips": (0, 1), "output_layer": False},
    "widest": {"features": 130, "width": 256, "modulation": ((2, 1), True), "leading": (2, 70), "bias": False},
    "deep": {"hidden": 7, "skips": (3,), "modulation": ((50,), False)},
    "no-points": {"leading": (0,), "modulation": ((1,), True)},
}
# Of the grid: 4 levels of 2 features in 2 dimensions.
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


class _Draw:
    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int):
        self.generator, self.dtype, self.device = torch.Generator().manual_seed(seed), dtype, device
        self.point_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def __call__(self, *shape: int, low: float = -1.0, high: float = 1.0, points: bool = False) -> torch.Tensor:
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return drawn.to(self.point_dtype if points else self.dtype).to(self.device)


def _network(draw: _Draw, features: int, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
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


def make_mlp(options: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int, points: str) -> tuple:
    draw = _Draw(dtype, device, seed)
    features = options.get("features", 3)
    x = draw(*options.get("leading", (50,)), features, points=True)
    inputs, rest = _network(draw, features, options)
    return {"x": x} | inputs, rest


def make_fused(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int, points: str
) -> tuple:
    draw = _Draw(dtype, device, seed)
    dims, levels, features = (options.get(name, default) for name, default in GRID_SIZE.items())
    geometry = GridGeometry.build(
        dims, levels, features, 9, base_resolution=4, finest_resolution=30, outside=options.get("outside", "clamp")
    )
    leading = options.get("leading", (50,))
    x = draw(*leading, dims, low=-0.1, high=1.1, points=True)
    if options.get("broken"):
        x[7, 0] = torch.nan
    inputs, rest = _network(draw, levels * features, options)
    max_level = options.get("max_level")
    max_level = draw(*leading, low=0.0, points=True) if max_level == "per_point" else max_level
    rest |= {"geometry": geometry, "max_level": max_level, "interpolation": options.get("interpolation", "linear")}
    return {"x": x, "table": draw(geometry.n_entries, features)} | inputs, rest


GRID_SIZE = {"dims": 2, "levels": 4, "features": 2}
MLPS = [testing.Case("modulated_mlp", name, make_mlp, options) for name, options in SIZES.items()]
FUSED = [testing.Case("hash_grid_mlp", name, make_fused, options) for name, options in GRIDS.items()]


def agree(
    case: testing.Case, function: Any, definition: Any, *, dtype: torch.dtype, device: Any = "cpu", order: int = 1
):
    """testing.check. Through features of 16 bits, whose gradient two ops round, coordinates get theirs less exactly."""
    call = case.make(dtype, device)
    found = [testing.evaluate(f, call, order=order) for f in (function, definition)]
    if case.op == "hash_grid_mlp" and dtype.itemsize == 2:
        found = [{name.replace("grad.x", "grad.as_a_parameter"): t for name, t in results.items()} for results in found]
    testing.compare(case, call, *found)
