# SPDX-License-Identifier: MIT
"""Inputs of modulated_mlp, modulate and coordinate_modulation: small, every option, clear of the kinks of relu."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .._modulation import ACTIVATIONS, COMBINES, NORMS, PADDINGS
from ..reference.modulated_mlp import coordinate_modulation, modulate, modulated_mlp
from .pairwise import pairwise

Made = tuple[dict[str, Tensor], dict[str, Any]]
KINKED = ("relu", "leaky_relu")
# Rounding moves a value before a relu by some 1e-6 (hidden values are float32, whatever the parameters are stored in),
# finite differences by 1e-6 times its derivative. Inputs are drawn anew until no value is nearer to 0 than this: then
# every implementation is on the same side. Exactly 0, what zeros give, is the same for all.
CLEARANCE = 1e-4
EPS = 1e-2  # of norms: a norm of nearly equal values multiplies their rounding by up to 1 / sqrt(eps)
FACE_CLEARANCE = 1e-3  # "safe" coordinates: distance from the nearest node, in cells

MLP_FACTORS: dict[str, tuple[Any, ...]] = {
    "activation": (*ACTIVATIONS, "mixed"),
    "modulation": (None, "scalar", "channel", "shared"),
    "norm": (None, "point"),
    "hidden": (2, 1, 3),
    "width": (8, 3, 17),
    "output": ("linear", "hidden", "none", "sigmoid"),  # hidden: the activation of the hidden layers
    "skips": ("none", "first", "last"),
    "bias": (True, False),
    "omega": ("one", "per_layer"),
    "layout": ("flat", "grid", "strided"),
}
MODULATE_FACTORS: dict[str, tuple[Any, ...]] = {
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "gamma": ("point", "channel", "full", "batch"),
    "beta": ("point", "channel", "full", "batch"),
    "width": (8, 3, 17),
    "layout": ("flat", "strided"),
}
LOOKUP_FACTORS: dict[str, tuple[Any, ...]] = {
    "dims": (2, 1, 3, 4),
    "combine": COMBINES,
    "padding": PADDINGS,
    "align_corners": (True, False),
    "channels": (None, 1, 5),
    "layers": (2, 1),
    "nodes": ("even", "uneven", "thin"),
    "layout": ("flat", "grid", "strided"),
}
SPECIAL_MLP: dict[str, dict[str, Any]] = {
    "siren": {"activation": "sine", "omega": 30.0, "width": 32, "hidden": 3, "siren": True},
    "no-hidden-layer": {"hidden": 0},
    "width-one-normalised": {"width": 1, "norm": "point", "modulation": "scalar", "activation": "tanh"},
    "two-readings-of-the-shape": {"hidden": 2, "width": 2, "modulation": "channel", "activation": "silu"},
}


def _named(factors: dict[str, tuple[Any, ...]], legal: Any = lambda options: True) -> dict[str, dict[str, Any]]:
    """A pairwise cover, by the values of its options."""
    cover = pairwise(factors, legal)
    return {"-".join(f"{key}={value}" for key, value in options.items()): options for options in cover}


@cache
def mlp_options() -> dict[str, dict[str, Any]]:
    def legal(options: dict[str, Any]) -> bool:
        """Whether what the hidden layers have can follow the output layer."""
        if options.get("output") != "hidden":
            return True
        activation, omega = options.get("activation"), options.get("omega")
        return activation not in ("residual_sine", "mixed") and (activation != "sine" or omega != "per_layer")

    first = {name: values[0] for name, values in MLP_FACTORS.items()}
    return _named(MLP_FACTORS, legal) | {name: first | options for name, options in SPECIAL_MLP.items()}


@cache
def modulate_options() -> dict[str, dict[str, Any]]:
    return _named(MODULATE_FACTORS)


@cache
def lookup_options() -> dict[str, dict[str, Any]]:
    def legal(options: dict[str, Any]) -> bool:
        return options.get("combine") != "plane_product" or options.get("dims", 3) == 3

    return _named(LOOKUP_FACTORS, legal)


class _Draw:
    """Random tensors from one generator, in the dtypes of a case."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.point_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def __call__(self, *shape: int, low: float = -1.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return drawn.to(dtype or self.dtype).to(self.device)


def _laid_out(points: Tensor, layout: str) -> Tensor:
    """[n, d] as it is, as [2, n // 2, d], or as every second column of a wider tensor."""
    if layout == "grid":
        return points[: len(points) // 2 * 2].unflatten(0, (2, -1))
    return torch.stack([points, -points], -1).flatten(-2)[..., ::2] if layout == "strided" else points


def _clear(make: Callable[[int], Made], kinks: Callable[..., list[Tensor]], seed: int) -> Made:
    """The first of make(seed), make(seed + 1000), ... whose values before a kink keep their distance from it."""
    for attempt in range(200):
        made = make(seed + 1000 * attempt)
        values = torch.cat([v.flatten() for v in kinks(*made)] or [torch.ones(1)]).abs()
        if ((values >= CLEARANCE) | (values == 0)).all():
            return made
    raise RuntimeError("modulated_mlp cases: no inputs clear of the kinks of relu in 200 draws")


# ---- modulated_mlp ---------------------------------------------------------------------------------------------------


def make_mlp(options: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int, points: str) -> Made:
    """(inputs x, weights.i, biases.i, modulation; the rest). x is float64 for float64 weights, else float32."""
    return _clear(lambda s: _mlp(options, _Draw(dtype, device, s), points), values_before_kinks, seed)


def _mlp(options: dict[str, Any], draw: _Draw, points: str) -> Made:
    hidden, width, features = options["hidden"], options["width"], 3
    rest = _mlp_options(options, draw)
    x = draw(4 if points == "safe" else 21, features, dtype=draw.point_dtype)
    if points == "mixed":
        x[1], x[2], x[3] = x[0], 0.0, 4 * x[3]
    inputs = {"x": _laid_out(x, options["layout"])}
    sizes = [width] * hidden + [2] * rest["output_layer"]
    fan_in = features
    for i, out in enumerate(sizes):
        bound = (3 / fan_in) ** 0.5  # so that values keep their size from layer to layer
        if i and "siren" in options:
            bound = (6 / fan_in) ** 0.5 / options["omega"]
        elif options["activation"] == "exponential":
            bound /= 16 if i == hidden and options["output"] == "hidden" else 4  # or rounding would grow like e^e^e
        inputs[f"weights.{i}"] = draw(out, fan_in, low=-bound, high=bound)
        fan_in = out + features * (i in rest["skips"])
    if options["bias"]:
        inputs |= {f"biases.{i}": draw(out, low=-0.5, high=0.5) for i, out in enumerate(sizes)}
    if options["modulation"]:
        leading = {"shared": (1,) * (inputs["x"].ndim - 1)}.get(options["modulation"], inputs["x"].shape[:-1])
        channels = (width,) if options["modulation"] == "channel" else ()
        inputs["modulation"] = draw(*leading, hidden, 2, *channels, low=0.3, high=1.5)
    return inputs, rest


def _mlp_options(options: dict[str, Any], draw: _Draw) -> dict[str, Any]:
    hidden, output = options["hidden"], options["output"]
    activation: Any = options["activation"]
    if activation == "mixed":
        activation = ["sine", "relu", "gelu"][:hidden]
    omega: Any = {"one": 2.0, "per_layer": [3.0, 1.0, 0.5][:hidden]}.get(options["omega"], options["omega"])
    rest = {
        "norm": options["norm"],
        "eps": EPS,
        "activation": activation,
        "omega": omega,
        "output_layer": output != "none",
    }
    rest["output_activation"] = {"sigmoid": "sigmoid", "hidden": activation}.get(output)
    rest["skips"] = {"none": (), "first": (0,), "last": (hidden - 1,)}[options["skips"]]
    if activation == "residual_sine":
        rest["frequencies"] = torch.logspace(0, 2, options["width"], 2.0, dtype=draw.point_dtype, device=draw.device)
    return rest


def values_before_kinks(inputs: dict[str, Tensor], rest: dict[str, Any]) -> list[Tensor]:
    """Of a modulated_mlp, what its relus take, in float64."""
    weights, biases = (
        [t.double() for name, t in inputs.items() if name.startswith(kind)] for kind in ("weights", "biases")
    )
    hidden = len(weights) - rest["output_layer"]
    names = rest["activation"] if isinstance(rest["activation"], list) else [rest["activation"]] * hidden
    omegas = rest["omega"] if isinstance(rest["omega"], list) else [rest["omega"]] * hidden
    found = []
    for i in (i for i, name in enumerate(names) if name in KINKED):
        modulation = inputs.get("modulation")
        if modulation is not None:
            axis = modulation.ndim - (3 if modulation.shape[-1] != 2 else 2)
            modulation = modulation.double().narrow(axis, 0, i + 1)
        found.append(
            modulated_mlp(
                inputs["x"].double(), weights[: i + 1], biases[: i + 1] or None, modulation, norm=rest["norm"], eps=EPS,
                activation=[*names[:i], None], omega=omegas[: i + 1], output_layer=False,
                skips=[s for s in rest["skips"] if s < i], frequencies=rest.get("frequencies"),
            )
        )  # fmt: skip
    if rest["output_activation"] in KINKED:
        scales = {name: inputs[name].double() for name in ("modulation",) if name in inputs}
        found.append(
            modulated_mlp(inputs["x"].double(), weights, biases or None, **scales, **rest | {"output_activation": None})
        )
    return found


# ---- modulate --------------------------------------------------------------------------------------------------------


def make_modulate(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int, points: str
) -> Made:
    """(inputs h, gamma, beta; the rest), all of one dtype."""

    def kinks(inputs: dict[str, Tensor], rest: dict[str, Any]) -> list[Tensor]:
        double = {name: t.double() for name, t in inputs.items()}
        return [modulate(**double, **rest | {"activation": None})] if rest["activation"] in KINKED else []

    return _clear(lambda s: _modulate(options, _Draw(dtype, device, s), points), kinks, seed)


def _modulate(options: dict[str, Any], draw: _Draw, points: str) -> Made:
    n, c, norm = 2 if points == "safe" else 5, options["width"], options["norm"]
    shape = {"ray": (n, 3, c), "frame": (n, c, 2, 3)}.get(norm, (2 * n, c))
    channel = -3 if norm == "frame" else -1
    lone = [1] * len(shape)
    shapes = {"full": list(shape), "point": list(shape), "channel": lone[channel:], "batch": lone.copy()}
    shapes["point"][channel], shapes["channel"][0], shapes["batch"][0] = 1, c, shape[0]
    h = draw(*shape)
    if points == "mixed":
        h[0] = 0.01 * h[0] + 0.5  # little variance about a mean
    if options["layout"] == "strided":
        h = h.transpose(0, -1).contiguous().transpose(0, -1)
    gamma, beta = (draw(*shapes[options[name]], low=low, high=1.0) for name, low in (("gamma", 0.3), ("beta", -1.0)))
    rest = {"norm": norm, "eps": EPS, "activation": options["activation"], "omega": 3.0}
    if options["activation"] == "residual_sine":
        rest["frequencies"] = torch.logspace(0, 2, c, 2.0, dtype=draw.point_dtype, device=draw.device)
    return {"h": h, "gamma": gamma, "beta": beta}, rest


# ---- coordinate_modulation -------------------------------------------------------------------------------------------


def make_lookup(
    options: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int, points: str
) -> Made:
    """(inputs coords and grids; the rest). coords are float64 for float64 grids, else float32."""
    draw = _Draw(dtype, device, seed)
    rest = {name: options[name] for name in ("padding", "align_corners", "combine")}
    planes = options["combine"] == "plane_product"
    axes = 2 if planes else options["dims"]
    nodes = {"even": [4] * axes, "uneven": [3, 5, 2, 4][:axes], "thin": [4, 1, 3, 2][:axes][::-1]}[options["nodes"]]
    channels = () if options["channels"] is None else (options["channels"],)
    grids = draw(options["layers"], 2, *([3] * planes), *channels, *nodes)
    coords = (
        _safe_coords(draw, grids, rest, options["dims"]) if points == "safe" else _mixed_coords(draw, nodes, options)
    )
    return {"coords": _laid_out(coords, options["layout"]), "grids": grids}, rest


def _safe_coords(draw: _Draw, grids: Tensor, rest: dict[str, Any], dims: int) -> Tensor:
    found = draw(400, dims, low=-1.4, high=1.4, dtype=draw.point_dtype)
    clear = (node_distance(found, grids, rest) > FACE_CLEARANCE).all(-1)
    return found[clear][:6]


def _mixed_coords(draw: _Draw, nodes: list[int], options: dict[str, Any]) -> Tensor:
    """Random, on nodes and ends, outside, not finite."""
    dims = options["dims"]
    inside = draw(16, dims, dtype=draw.point_dtype)
    n = torch.tensor((nodes * dims)[:dims][::-1], device=draw.device)
    index = (draw(8, dims, low=0.0, dtype=torch.float64) * n).floor()
    on_nodes = 2 * index / (n - 1).clamp(min=1) - 1 if options["align_corners"] else (2 * index + 1) / n - 1
    ends = draw(5, dims, dtype=torch.float64).sign()
    outside = draw(8, dims, low=-3.0, high=3.0, dtype=draw.point_dtype)
    broken = draw(5, dims, dtype=draw.point_dtype)
    broken[0, 0], broken[1], broken[2, -1], broken[3, 0], broken[4] = torch.nan, torch.nan, torch.inf, -torch.inf, 1e30
    parts = [inside, on_nodes.to(inside.dtype), ends.to(inside.dtype), outside, broken, inside[:1].expand(4, dims)]
    return torch.cat(parts)


def _positions(coords: Tensor, grids: Tensor, rest: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(positions in cells, cells per unit), [n, axes] each, of every axis that a lookup uses, in float64."""
    planes = rest["combine"] == "plane_product"
    dims = coords.shape[-1]
    u = coords.double().reshape(-1, dims)
    counts = list(grids.shape[-2:] if planes else grids.shape[-dims:])[::-1]
    if planes:  # the first coordinate of a plane addresses the last axis
        u, counts = u[:, [0, 0, 1, 1, 2, 2]], [counts[0], counts[0], counts[1], counts[0], counts[1], counts[1]]
    n = torch.tensor(counts, dtype=torch.float64, device=u.device)
    scale, shift = ((n - 1) / 2, 0.0) if rest["align_corners"] else (n / 2, -0.5)
    return (u + 1) * scale + shift, scale


def node_distance(coords: Tensor, grids: Tensor, rest: dict[str, Any]) -> Tensor:
    """Distance in cells from the nearest node, [n, axes]; NaN where the position is not finite."""
    position, scale = _positions(coords, grids, rest)
    return torch.where(scale > 0, (position - position.round()).abs(), 0.5)  # an axis of one node moves nothing


def near_faces(inputs: dict[str, Tensor], rest: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Points within rounding of a node, where the derivative jumps, and the width of that in cells: [n] each."""
    coords, grids = inputs["coords"], inputs["grids"]
    position, _ = _positions(coords, grids, rest)
    width = 4 * torch.finfo(coords.dtype).eps * position.abs().clamp(min=1)
    return (node_distance(coords, grids, rest) <= width).any(-1), width.amax(-1)


def sides(inputs: dict[str, Tensor], rest: dict[str, Any], quantity: str, at: Tensor, ct: Tensor) -> list[Tensor]:
    """Gradients in the coordinates of the points `at`, as seen from every side of the nodes, in float64."""
    grids, dims = inputs["grids"].double(), inputs["coords"].shape[-1]
    u = inputs["coords"].reshape(-1, dims)[at].double()
    ct = ct.reshape(-1, *ct.shape[inputs["coords"].ndim - 1 :])[at].double()
    step = 8 * torch.finfo(inputs["coords"].dtype).eps * u.abs().clamp(min=1)
    found = []
    for signs in product((-1, 0, 1), repeat=dims):
        moved = (u + step * torch.tensor(signs, device=u.device)).requires_grad_()
        found.append(torch.autograd.grad(coordinate_modulation(moved, grids, **rest), moved, ct)[0])
    return found
