# SPDX-License-Identifier: MIT
"""What a call of the modulated MLP family asks for: its options, one set per layer, and whether its tensors fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ._checks import check_choice, check_flag, check_floating, check_number, check_same_device, check_shape

ACTIVATIONS = (
    None, "relu", "leaky_relu", "gelu", "silu", "softplus", "sigmoid", "tanh", "exponential", "squareplus", "sine",
    "residual_sine",
)  # fmt: skip
NORMS = (None, "point", "ray", "frame")
PADDINGS = ("border", "zeros")
COMBINES = ("single", "plane_product")
MAX_DIMS = 7  # axes of a grid
PLANES = ((0, 1), (0, 2), (1, 2))  # coordinate slots of the planes xy, xz, yz

Activation = str | None | Sequence[str | None]
Omega = float | Sequence[float]


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where a tensor is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


# ---- modulated_mlp ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The options of an MLP, those of the hidden layers one by one."""

    activations: tuple[str | None, ...]
    omegas: tuple[float, ...]
    skips: frozenset[int]
    output_layer: bool
    output_activation: str | None
    output_omega: float
    norm: str | None
    eps: float
    frequencies: Tensor | None

    @property
    def hidden(self) -> int:
        return len(self.activations)


def plan_layers(
    op: str,
    layers: int,
    *,
    norm: str | None = None,
    eps: float = 1e-5,
    activation: Activation = "relu",
    output_activation: str | None = None,
    output_layer: bool = True,
    skips: Sequence[int] = (),
    omega: Omega = 1.0,
    frequencies: Tensor | None = None,
) -> Plan:
    """Options of an MLP of `layers` linear layers; ValueError for what does not exist or has another length."""
    check_flag(op, "output_layer", output_layer)
    hidden = layers - output_layer
    check_choice(op, "norm", norm, (None, "point"))
    check_number(op, "eps", eps, least=0.0)
    activations = _per_layer(op, "activation", activation, hidden)
    for name in activations:
        check_choice(op, "activation", name, ACTIVATIONS)
    omegas = _per_layer(op, "omega", omega, hidden)
    for value in omegas:
        check_number(op, "omega", value)
    skipped = _skipped(op, skips, hidden)
    check_choice(op, "output_activation", output_activation, [a for a in ACTIVATIONS if a != "residual_sine"])
    if output_activation is not None and not output_layer:
        raise ValueError(
            f"{op}: output_activation must be None where there is no output layer, got {output_activation!r}; put it "
            "last in activation"
        )
    one_omega = isinstance(omega, Real)
    if output_activation == "sine" and not one_omega:
        raise ValueError(f"{op}: omega must be one number where output_activation is 'sine', got {omega!r}")
    output_omega = float(omega) if one_omega else 1.0
    return Plan(activations, omegas, skipped, output_layer, output_activation, output_omega, norm, eps, frequencies)


def _skipped(op: str, skips: object, hidden: int) -> frozenset[int]:
    if not isinstance(skips, Iterable) or isinstance(skips, Tensor):
        raise TypeError(f"{op}: skips must be a list of hidden layers, got {skips!r}; for none leave it empty")
    layers = tuple(skips)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < hidden:
            raise ValueError(f"{op}: skips must name some of the {hidden} hidden layers, counted from 0, got {layer!r}")
    return frozenset(int(layer) for layer in layers)


def _per_layer(op: str, name: str, value: Any, hidden: int) -> tuple:
    if value is None or isinstance(value, (str, Real)):
        return (value,) * hidden
    if not isinstance(value, (list, tuple)) or len(value) != hidden:
        given = f"{len(value)} items" if isinstance(value, (list, tuple)) else f"{type(value).__name__}"
        raise ValueError(f"{op}: {name} must be one value or a list of one per hidden layer, {hidden}, got {given}")
    return tuple(value)


def check_frequencies(op: str, frequencies: Tensor | None, activation: str | None, width: int) -> None:
    """ValueError unless residual_sine has a constant frequency for each of the `width` channels."""
    if activation != "residual_sine":
        return
    if frequencies is None:
        raise ValueError(f"{op}: frequencies must be given for 'residual_sine', a tensor [{width}]")
    check_floating(op, "frequencies", frequencies)
    check_shape(op, "frequencies", frequencies, [width], f"'residual_sine' has {width} channels")
    if frequencies.requires_grad:
        raise ValueError(f"{op}: frequencies must be constants, got a tensor that requires a gradient; use .detach()")


def check_mlp(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    modulation: Tensor | None,
    plan: Plan,
) -> None:
    """Whether the tensors of a modulated_mlp fit together and the plan."""
    check_floating(op, "x", x)
    if x.ndim < 1:
        raise ValueError(f"{op}: x must have shape [..., in], got []")
    _check_widths(op, x.shape[-1], weights, biases, plan.skips)
    widths = [w.shape[0] for w in weights[: plan.hidden]]
    if plan.frequencies is not None:
        check_floating(op, "frequencies", plan.frequencies)
    for width, activation in zip(widths, plan.activations, strict=True):
        check_frequencies(op, plan.frequencies, activation, width)
    if modulation is not None:
        check_floating(op, "modulation", modulation)
        is_per_channel(op, modulation, x.shape[:-1], widths)
    lists = {"weights": weights, "biases": biases or ()}
    named = {f"{name}[{i}]": t for name, tensors in lists.items() for i, t in enumerate(tensors)}
    check_same_device(op, x=x, **named, modulation=modulation, frequencies=plan.frequencies)


def check_list(op: str, name: str, tensors: Any) -> None:
    """TypeError unless this is a list of floating-point tensors, ValueError if it is empty."""
    if not isinstance(tensors, (list, tuple, torch.nn.ParameterList)):
        raise TypeError(f"{op}: {name} must be a list of tensors, one per layer, got {type(tensors).__name__}")
    if len(tensors) == 0:
        raise ValueError(f"{op}: {name} must hold at least one layer, got an empty list")
    for i, tensor in enumerate(tensors):
        check_floating(op, f"{name}[{i}]", tensor)


def _check_widths(
    op: str, in_features: int, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, skips: frozenset[int]
) -> None:
    if biases is not None:
        check_list(op, "biases", biases)
        if len(biases) != len(weights):
            raise ValueError(f"{op}: biases must have one item per weight, {len(weights)}, got {len(biases)}")
    given, remedy = in_features, f"x has {in_features} features"
    for i, weight in enumerate(weights):
        check_shape(op, f"weights[{i}]", weight, ["out", given], remedy)
        if 0 in weight.shape:
            raise ValueError(f"{op}: weights[{i}] must have at least one row and column, got {list(weight.shape)}")
        out = weight.shape[0]
        if biases is not None:
            check_shape(op, f"biases[{i}]", biases[i], [out], f"weights[{i}] has {out} rows")
        given = out + (in_features if i in skips else 0)
        remedy = f"layer {i} gives {out} features" + (f" and its skip {in_features}" if i in skips else "")
    dtypes = {t.dtype for t in [*weights, *(biases or ())]}
    if len(dtypes) > 1:
        found = ", ".join(sorted(map(str, dtypes)))
        raise TypeError(f"{op}: weights and biases must have one dtype, got {found}; convert them with .to(dtype)")


def widest_of(weights: Sequence[Tensor]) -> int:
    """Outputs of the widest linear layer."""
    return max([0, *(w.shape[0] for w in weights if w.ndim > 0)])


def is_per_channel(op: str, modulation: Tensor, leading: torch.Size, widths: Sequence[int]) -> bool:
    """True for a modulation [..., hidden, 2, width], False for [..., hidden, 2], ValueError for any other."""
    hidden, shape = len(widths), list(modulation.shape)
    backwards = shape[::-1]  # sizes of batches last: a trace then compares them only where all others fit
    scalar = backwards[:2] == [2, hidden] and _broadcasts(shape[:-2], leading)
    width = widths[0] if len(set(widths)) == 1 else -1  # layers of several widths have no per-channel modulation
    channel = backwards[:3] == [width, 2, hidden] and _broadcasts(shape[:-3], leading)
    if not (scalar or channel):
        forms = f"[..., {hidden}, 2]" + (f" or [..., {hidden}, 2, {width}]" if width >= 0 else "")
        raise ValueError(
            f"{op}: modulation must have shape {forms} with leading axes that broadcast to those of x, "
            f"{list(leading)}, got {shape}"
        )
    return channel and not (scalar and modulation.ndim == len(leading) + 2)


def _broadcasts(given: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a shape broadcasts to another without enlarging it."""
    pairs = zip(reversed(given), reversed(wanted), strict=False)
    return len(given) <= len(wanted) and all(g == 1 or g == w for g, w in pairs)  # a trace knows no "in"


def per_group(modulation: Tensor, leading: torch.Size, tail: int) -> Tensor:
    """[..., *tail axes] with leading axes that broadcast to those of x -> [M, *tail axes]; M divides the points."""
    axes = [1] * (len(leading) - modulation.ndim + tail) + list(modulation.shape[: modulation.ndim - tail])
    pairs = enumerate(zip(axes, leading, strict=True))
    groups = next((i for i, (a, b) in pairs if a != b), len(axes))  # a trace knows no "in"
    if all(a == 1 for a in axes[groups:]):  # the same row for all points of a group
        leading = leading[:groups]
    values = modulation.shape[modulation.ndim - tail :]
    rows = modulation.reshape(*axes[: len(leading)], *values).expand(*leading, *values)
    return rows.reshape(math.prod(leading), *values)


# ---- modulate and coordinate_modulation ------------------------------------------------------------------------------


def check_modulate(
    op: str, h: Tensor, gamma: Tensor, beta: Tensor, norm: str | None, eps: float, activation: str | None,
    omega: float, frequencies: Tensor | None,
) -> None:  # fmt: skip
    """Whether the arguments of a modulate fit together."""
    check_choice(op, "norm", norm, NORMS)
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_number(op, "eps", eps, least=0.0)
    check_number(op, "omega", omega)
    for name, tensor in (("h", h), ("gamma", gamma), ("beta", beta)):
        check_floating(op, name, tensor)
    axes = {None: 1, "point": 1, "ray": 2, "frame": 3}[norm]
    if h.ndim < axes or 0 in h.shape[-axes:]:
        wanted = {1: "[..., C]", 2: "[..., S, C]", 3: "[..., C, H, W]"}[axes]
        raise ValueError(f"{op}: h must have shape {wanted} for norm={norm!r}, none of size 0, got {list(h.shape)}")
    for name, tensor in (("gamma", gamma), ("beta", beta)):
        if not _broadcasts(tensor.shape, h.shape):
            raise ValueError(
                f"{op}: {name} must broadcast to h, {list(h.shape)}, got {list(tensor.shape)}; scalars per point are "
                "[..., 1], frames [N, C, 1, 1]"
            )
    check_frequencies(op, frequencies, activation, h.shape[-3 if norm == "frame" else -1])
    check_same_device(op, h=h, gamma=gamma, beta=beta, frequencies=frequencies)


def check_lookup(op: str, coords: Tensor, grids: Tensor, padding: str, align_corners: bool, combine: str) -> None:
    """Whether the arguments of a coordinate_modulation fit together."""
    check_choice(op, "padding", padding, PADDINGS)
    check_choice(op, "combine", combine, COMBINES)
    if not isinstance(align_corners, bool):
        raise TypeError(f"{op}: align_corners must be True or False, got {align_corners!r}")
    check_floating(op, "coords", coords)
    check_floating(op, "grids", grids)
    dims = coords.shape[-1] if coords.ndim else 0
    if not 1 <= dims <= MAX_DIMS or (combine == "plane_product" and dims != 3):
        wanted = "3]" if combine == "plane_product" else f"d], d from 1 to {MAX_DIMS},"
        given = list(coords.shape)
        raise ValueError(f"{op}: coords must have shape [..., {wanted} for combine={combine!r}, got {given}")
    fixed = [2, 3] if combine == "plane_product" else [2]
    nodes = 2 if combine == "plane_product" else dims
    found = list(grids.shape)
    if found[1 : 1 + len(fixed)] != fixed or len(found) - 1 - len(fixed) - nodes not in (0, 1) or 0 in found:
        sizes = ", ".join(["layers", *map(str, fixed)])
        raise ValueError(
            f"{op}: grids must have shape [{sizes}, *nodes] or [{sizes}, C, *nodes] with {nodes} axes of nodes for "
            f"coordinates of {dims} axes, no size 0, got {found}"
        )
    check_same_device(op, coords=coords, grids=grids)
