# SPDX-License-Identifier: MIT
"""Inputs of radial_basis: small, every option, clear of the centres' singularities and of the kinks of nlin."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._radial_basis import KINDS, SHAPES, shape_width
from ..reference.radial_basis import kernel_arguments, radial_basis
from .modulated_mlp import Made, _Draw, _laid_out, _named

COUNT = 5  # kernels
FACTORS: dict[str, tuple[Any, ...]] = {
    "kind": KINDS,
    "shape": SHAPES,
    "dims": (2, 3, 1, 4),
    "neighbors": (3, None, 1),
    "normalize": ("detached", "true", "none"),
    "waves": ("none", "all", "kept", "phase"),
    "features": (5, 16, 1),
    "layout": ("flat", "grid", "strided"),
}
# Near its centre a kernel may grow without bound, and rounding with it, as the cosine's derivatives do near the origin;
# finite differences need some room at a kink.
CENTRE_CLEARANCE, ORIGIN_CLEARANCE, KINK_CLEARANCE = 0.1, 0.4, 2e-3
NORMALIZER_CLEARANCE = 0.1  # what is left, at least, of weights of both signs in their sum, or rounding grows with it
SINGULAR = ("ivd", "ivc")  # no number for what a point at their centre gives


@cache
def case_options() -> dict[str, dict[str, Any]]:
    return _named(FACTORS)


def make(options: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int, points: str) -> Made:
    """(inputs x, centers, shapes, features, phase; the rest). x is float64 for float64 parameters, else float32."""
    draw = _Draw(dtype, device, seed)
    centers = _centers(draw, options["dims"])
    shapes = _shapes(draw, options)
    x = _clear_points(draw, options, centers, shapes, 6 if points == "safe" else 14)
    if points == "mixed":
        x = torch.cat([x, _special_points(options, centers.to(x.dtype), x)])
    x = _laid_out(x, options["layout"])
    features = options["features"]
    inputs = {"x": x, "centers": centers, "shapes": shapes, "features": draw(COUNT, features)}
    rest = {name: options[name] for name in ("kind", "shape")}
    rest |= {"normalize": options["normalize"] != "none", "detach_normalizer": options["normalize"] != "true"}
    if options["neighbors"] is not None:
        order = draw(*x.shape[:-1], COUNT, dtype=torch.float64).argsort(-1)
        rest["neighbors"] = order[..., : options["neighbors"]].int()
    if options["waves"] != "none":
        rest["keep"] = min(2, features) if options["waves"] == "kept" else 0
        rest["frequencies"] = _frequencies(inputs, rest, features - rest["keep"], draw)
    if options["waves"] == "phase":
        inputs["phase"] = draw(features, low=-3.0, high=3.0)
    return inputs, rest


def _centers(draw: _Draw, dims: int) -> Tensor:
    """[COUNT, dims], no two near each other."""
    if dims == 1:
        return draw(COUNT, 1, low=-0.1, high=0.1) + 0.8 * torch.arange(1, COUNT + 1).unsqueeze(-1).to(draw.dtype)
    while True:
        found = draw(COUNT, dims, low=0.4, high=2.4)
        if torch.pdist(found.double()).min() > 0.6:
            return found


def _shapes(draw: _Draw, options: dict[str, Any]) -> Tensor:
    """[COUNT, width]: near the unit matrix, so positive; slightly asymmetric where the form allows that."""
    dims, shape = options["dims"], options["shape"]
    scale = 0.3 if options["kind"] == "nlin" else 1.0  # wide hats, or most would be 0
    if shape in ("isotropic", "diagonal"):
        return draw(COUNT, shape_width(shape, dims), low=0.8 * scale, high=1.2 * scale)
    matrices = scale * (torch.eye(dims) + 0.2 * draw(COUNT, dims, dims, dtype=torch.float64))
    if shape == "symmetric":
        row, column = torch.triu_indices(dims, dims)
        return matrices[:, row, column].to(draw.dtype)
    return matrices.flatten(1).to(draw.dtype)


def _clear_points(draw: _Draw, options: dict[str, Any], centers: Tensor, shapes: Tensor, n: int) -> Tensor:
    low, high = (f(centers.double()) for f in (torch.amin, torch.amax))
    x = draw(60 * n, options["dims"], low=float(low) - 0.7, high=float(high) + 0.7, dtype=draw.point_dtype)
    x = x[is_clear(x, centers, shapes, options["kind"], options["shape"]).all(-1)]
    x = x[_has_normalizers(x, centers, shapes, options)]
    return x[torch.linspace(0, len(x) - 1, n).long()]


def is_clear(x: Tensor, centers: Tensor, shapes: Tensor, kind: str, shape: str) -> Tensor:
    """Whether points [p, d] keep their distance from what is singular of each kernel: [p, n]."""
    o = x.double().unsqueeze(-2) - centers.double()
    t, q = kernel_arguments(kind, shape, shapes.double(), o)
    clear = q > CENTRE_CLEARANCE
    if kind == "cos":
        clear &= x.double().norm(dim=-1, keepdim=True) > ORIGIN_CLEARANCE
    if kind == "nlin":
        clear &= ((t.abs() > KINK_CLEARANCE) & ((t.abs() - 1).abs() > KINK_CLEARANCE)).all(-1)
    return clear


def _has_normalizers(x: Tensor, centers: Tensor, shapes: Tensor, options: dict[str, Any]) -> Tensor:
    """Whether the weights of points [p, d] do not cancel, whichever kernels are their neighbours: [p]."""
    phi = _weights(x, centers, shapes, kind=options["kind"], shape=options["shape"], normalize=False)
    chosen = phi[:, torch.combinations(torch.arange(COUNT), options["neighbors"] or COUNT)]
    return (chosen.sum(-1).abs() >= NORMALIZER_CLEARANCE * chosen.abs().sum(-1)).all(-1)


def _weights(x: Tensor, centers: Tensor, shapes: Tensor, **options: Any) -> Tensor:
    """[..., n], in float64."""
    tensors = (t.double() for t in (x, centers, shapes))
    return radial_basis(*tensors, torch.eye(COUNT, device=x.device).double(), **options)


def _special_points(options: dict[str, Any], centers: Tensor, x: Tensor) -> Tensor:
    """At a centre, far away, not finite, again and again."""
    broken = x[:4].clone()
    broken[0, 0], broken[1], broken[2, -1], broken[3, 0] = torch.nan, torch.nan, torch.inf, -torch.inf
    centre = centers[: options["kind"] not in SINGULAR]
    return torch.cat([broken, centre, x[:1].expand(3, -1)])


def _frequencies(inputs: dict[str, Tensor], rest: dict[str, Any], waves: int, draw: _Draw) -> Tensor:
    """Constants [waves] for phases up to some radians, at which rounding of u is not yet seen."""
    options = {name: option for name, option in rest.items() if name != "keep"}
    u = _weights(*(inputs[name] for name in ("x", "centers", "shapes")), **options)
    largest = u[u.isfinite()].abs().max().clamp(min=1)
    return (torch.logspace(-1, 3, waves, 2.0, dtype=torch.float64) / largest.cpu()).to(draw.point_dtype).to(u.device)
