# SPDX-License-Identifier: MIT
"""The definition of the modulated MLP, its modulation, and where that comes from, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._geometry import GridGeometry
from .._modulation import (
    PLANES,
    Activation,
    Omega,
    check_list,
    check_lookup,
    check_mlp,
    check_modulate,
    compute_dtype,
    is_per_channel,
    plan_layers,
)
from .hash_grid import FAR, hash_grid

# f(z, omega, frequencies); names without a further meaning are PyTorch's
ACTIVATIONS: dict[str | None, Callable[[Tensor, float, Tensor | None], Tensor]] = {
    None: lambda z, omega, m: z,
    "relu": lambda z, omega, m: F.relu(z),
    "leaky_relu": lambda z, omega, m: F.leaky_relu(z),
    "gelu": lambda z, omega, m: F.gelu(z),
    "silu": lambda z, omega, m: F.silu(z),
    "softplus": lambda z, omega, m: F.softplus(z),
    "sigmoid": lambda z, omega, m: torch.sigmoid(z),
    "tanh": lambda z, omega, m: torch.tanh(z),
    "exponential": lambda z, omega, m: torch.exp(z),
    "squareplus": lambda z, omega, m: (z + (z * z + 4).sqrt()) / 2,
    "sine": lambda z, omega, m: torch.sin(omega * z),
    "residual_sine": lambda z, omega, m: z + torch.sin(m * z),
}
NORM_AXES = {"point": (-1,), "ray": (-2, -1), "frame": (-2, -1)}


def modulate(
    h: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    norm: str | None = None,
    eps: float = 1e-5,
    activation: str | None = "relu",
    omega: float = 1.0,
    frequencies: Tensor | None = None,
) -> Tensor:
    """y = act(gamma * n + beta),  n = (h - m) / sqrt(v + eps),  m and v the mean and biased variance of h

    over the last axis ("point"), the last two together ("ray", h [..., S, C]), or H and W of each sample and channel
    ("frame", h [N, C, H, W]); n = h for norm None. gamma and beta broadcast to h, as in PyTorch; the result has h's
    shape and dtype. Computed in float64 if a tensor is float64, else in float32.

    activation: relu, leaky_relu (slope 0.01), gelu (erf), silu, softplus, sigmoid, tanh as in PyTorch; exponential e^z;
    squareplus (z + sqrt(z^2 + 4)) / 2; sine sin(omega z); residual_sine z + sin(frequencies * z) with constant
    frequencies, one per channel (the last axis of h, C of a frame); None.

    Raises ValueError for shapes and values, TypeError for dtypes.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024; Perez et al., "FiLM", 2018.

    >>> import camkernels
    >>> h, gamma, beta = torch.randn(5, 8), torch.rand(5, 1), torch.zeros(8)
    >>> camkernels.reference.modulate(h, gamma, beta, norm="point").shape
    torch.Size([5, 8])
    """
    check_modulate("modulate", h, gamma, beta, norm, eps, activation, omega, frequencies)
    dtype = compute_dtype(h, gamma, beta)
    if frequencies is not None:
        frequencies = frequencies.to(dtype).reshape(-1, 1, 1) if norm == "frame" else frequencies.to(dtype)
    scaled = gamma.to(dtype) * _normalize(h.to(dtype), norm, eps) + beta.to(dtype)
    return ACTIVATIONS[activation](scaled, omega, frequencies).to(h.dtype)


def _normalize(h: Tensor, norm: str | None, eps: float) -> Tensor:
    if norm is None:
        return h
    axes = NORM_AXES[norm]
    centred = h - h.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt()


def coordinate_modulation(
    coords: Tensor, grids: Tensor, *, padding: str = "border", align_corners: bool = True, combine: str = "single"
) -> Tensor:
    """y = sum over the 2^d nodes c around coords of weight_c * grids[..., c]: gamma and beta for every layer.

    coords [..., d] in [-1, 1], addressed exactly as by torch.nn.functional.grid_sample: slot 0 is the LAST axis of the
    grid, and the position on an axis of n nodes is (x + 1) (n - 1) / 2, or ((x + 1) n - 1) / 2 without align_corners;
    the weights are linear. grids [layers, 2, *nodes] -> [..., layers, 2]; grids [layers, 2, C, *nodes] ->
    [..., layers, 2, C]; index 0 of the 2 is gamma, 1 is beta. The result has the grids' dtype.

    combine="plane_product": d = 3, grids [layers, 2, 3, (C,) h, w]; the product of the lookups in planes xy, xz, yz.
    padding "border": a position beyond the outer nodes is moved onto them, with derivative 0 there; "zeros": nodes
    beyond count as 0. A point with a NaN coordinate gives NaN and adds nothing to the gradient of the grids.

    Raises ValueError for shapes and values, TypeError for dtypes.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024.

    >>> import camkernels
    >>> coords, grids = torch.rand(5, 2) * 2 - 1, torch.rand(3, 2, 32, 32)
    >>> camkernels.reference.coordinate_modulation(coords, grids).shape
    torch.Size([5, 3, 2])
    """
    check_lookup("coordinate_modulation", coords, grids, padding, align_corners, combine)
    dtype = compute_dtype(coords, grids)
    u, nodes = coords.to(dtype), grids.to(dtype)
    broken = u.isnan().any(-1)
    if combine == "single":
        y = _lookup(u, nodes, broken, padding, align_corners)
    else:
        xy, xz, yz = (
            _lookup(u[..., list(axes)], nodes[:, :, k], broken, padding, align_corners) for k, axes in enumerate(PLANES)
        )
        y = xy * xz * yz
    return y.to(grids.dtype)


def _lookup(u: Tensor, grids: Tensor, broken: Tensor, padding: str, align_corners: bool) -> Tensor:
    """Linear interpolation of grids [..., *nodes] at u [..., d]; NaN, and nothing read, where broken [...] is True."""
    dims = u.shape[-1]
    counts = list(grids.shape[-dims:])[::-1]
    strides = [1]
    for count in counts[:-1]:
        strides.append(strides[-1] * count)
    n = torch.tensor(counts, dtype=torch.float64, device=u.device)
    scale, shift = ((n - 1) / 2, 0.0) if align_corners else (n / 2, -0.5)
    lost = broken.unsqueeze(-1)
    u = torch.where(u.isinf() & ~lost, u.sign() * FAR, u)  # infinity times the scale 0 of one node would be NaN
    pos = ((u + 1).double() * scale + shift).to(u.dtype)  # through float64: a fused multiply-add for float32
    if padding == "border":
        inside = ((pos > 0) & (pos < n - 1)) | lost
        pos = torch.where(inside, pos, torch.minimum(pos.detach().clamp(min=0), (n - 1).to(pos.dtype)))
        visible = torch.ones_like(broken)
    else:
        visible = ((pos >= -1) & (pos < n)).all(-1) | broken
        pos = torch.where(visible.unsqueeze(-1), pos, 0.0)
    p = pos.detach().floor()
    f = pos - p
    cell = torch.where(lost, 0.0, p).long()

    rows = grids.flatten(-dims).movedim(-1, 0)  # [nodes, layers, 2, (C)]
    extra = (1,) * (rows.ndim - 1)
    y = torch.zeros((), dtype=u.dtype, device=u.device)
    for corner in product(*[(0, 1)] * len(counts)):
        upper = torch.tensor(corner, device=u.device)
        node = cell + upper
        there = visible & ((node >= 0) & (node < n)).all(-1)
        index = (torch.where(there.unsqueeze(-1), node, 0) * torch.tensor(strides, device=u.device)).sum(-1)
        # not .prod(): its second derivative divides by the factors, which near a node are small
        weight = math.prod(torch.where(upper.bool(), f, 1 - f).unbind(-1))
        nothing = torch.where(broken, torch.nan, 0.0).to(u.dtype)  # stands for nodes that must not be touched
        read = (there & ~broken).reshape(*there.shape, *extra)
        picked = rows[index.unsqueeze(0)].squeeze(0)  # torch.vmap cannot index by a number
        value = torch.where(read, picked, nothing.reshape(*there.shape, *extra))
        y = y + weight.reshape(*there.shape, *extra) * value
    return y


def modulated_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    modulation: Tensor | None = None,
    *,
    norm: str | None = None,
    eps: float = 1e-5,
    activation: Activation = "relu",
    output_activation: str | None = None,
    output_layer: bool = True,
    skips: Sequence[int] = (),
    omega: Omega = 1.0,
    frequencies: Tensor | None = None,
) -> Tensor:
    """h <- act_i(gamma_i * norm(W_i h + b_i) + beta_i), for every hidden layer i, from h = x

    then h <- concat(h, x) if i is in skips. With output_layer the last weight is a plain linear layer followed by
    output_activation; without, every weight is a hidden layer.

    x [..., in], weights [out, in] each, biases [out] each or None -> [..., out] in the weights' dtype. modulation
    [..., hidden, 2], or [..., hidden, 2, width] per channel, holds (gamma, beta); its leading axes broadcast to x's;
    None is gamma 1, beta 0. activation and omega: one, or a list of one per hidden layer. norm: None or "point";
    activations and the rest as in `modulate`. A sine as output_activation takes omega, which is then
    one number. Hidden values are float64 if a tensor is float64, else float32.

    Raises ValueError for shapes and values, TypeError for dtypes.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024; Sitzmann et al., "Implicit Neural
    Representations with Periodic Activation Functions", 2020 (sine); Perez et al., "FiLM", 2018 (per channel).

    >>> import camkernels
    >>> weights = [torch.randn(16, 3), torch.randn(16, 16), torch.randn(1, 16)]
    >>> camkernels.reference.modulated_mlp(torch.rand(5, 3), weights, modulation=torch.rand(5, 2, 2)).shape
    torch.Size([5, 1])
    """
    op = "modulated_mlp"
    check_list(op, "weights", weights)
    plan = plan_layers(
        op,
        len(weights),
        norm=norm,
        eps=eps,
        activation=activation,
        output_activation=output_activation,
        output_layer=output_layer,
        skips=skips,
        omega=omega,
        frequencies=frequencies,
    )
    check_mlp(op, x, weights, biases, modulation, plan)
    dtype = compute_dtype(x, modulation, *weights)
    W = [w.to(dtype) for w in weights]
    b = [None] * len(W) if biases is None else [v.to(dtype) for v in biases]
    scales = _scales_and_shifts(modulation, x, [w.shape[0] for w in W[: plan.hidden]], dtype)
    first = h = x.to(dtype)
    for i, (gamma, beta) in enumerate(scales):
        act = {"activation": plan.activations[i], "omega": plan.omegas[i], "frequencies": frequencies}
        h = modulate(F.linear(h, W[i], b[i]), gamma, beta, norm=norm, eps=eps, **act)
        h = torch.cat([h, first], -1) if i in plan.skips else h
    if plan.output_layer:
        h = ACTIVATIONS[output_activation](F.linear(h, W[-1], b[-1]), plan.output_omega, None)
    return h.to(weights[0].dtype)


def _scales_and_shifts(
    modulation: Tensor | None, x: Tensor, widths: list[int], dtype: torch.dtype
) -> list[tuple[Tensor, Tensor]]:
    """(gamma, beta) of each hidden layer, that broadcast to its values."""
    if modulation is None:
        return [(torch.ones((), dtype=dtype, device=x.device), torch.zeros((), dtype=dtype, device=x.device))] * len(
            widths
        )
    if not is_per_channel("modulated_mlp", modulation, x.shape[:-1], widths):
        modulation = modulation.unsqueeze(-1)
    return [layer.unbind(-2) for layer in modulation.to(dtype).unbind(-3)]


def hash_grid_mlp(
    x: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    modulation: Tensor | None = None,
    *,
    interpolation: str = "linear",
    max_level: int | float | Tensor | None = None,
    **options: Any,
) -> Tensor:
    """y = modulated_mlp(hash_grid(x, table, geometry), weights, biases, modulation), with the options of both
    but return_jacobian.

    x [..., D] in [0, 1] -> [..., out] in the weights' dtype; between the two the features are in the table's dtype.

    >>> import camkernels
    >>> geometry = camkernels.GridGeometry.build(2, 4, 2, 10, finest_resolution=64)
    >>> table, weights = torch.rand(geometry.n_entries, 2), [torch.randn(16, 8), torch.randn(3, 16)]
    >>> camkernels.reference.hash_grid_mlp(torch.rand(5, 2), table, geometry, weights).shape
    torch.Size([5, 3])
    """
    features = hash_grid(x, table, geometry, interpolation=interpolation, max_level=max_level)
    return modulated_mlp(features, weights, biases, modulation, **options)
