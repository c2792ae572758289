# SPDX-License-Identifier: MIT
"""Modulated MLP: the functions `modulated_mlp`, `modulate`, `coordinate_modulation`, `hash_grid_mlp` and the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from ._backends import BACKENDS, Call, autocast_dtype, choose, round_to_autocast
from ._checks import check_choice, check_dtype, check_floating, check_size
from ._geometry import GridGeometry
from ._layers import KeepsGeometry
from ._modulation import (
    ACTIVATIONS,
    COMBINES,
    NORMS,
    PADDINGS,
    Activation,
    Omega,
    check_frequencies,
    check_number,
    plan_layers,
)
from .hash_grid import hash_grid

__all__ = [
    "CoordinateModulation",
    "Modulate",
    "ModulatedMLP",
    "coordinate_modulation",
    "hash_grid_mlp",
    "modulate",
    "modulated_mlp",
]

# ---- functions -------------------------------------------------------------------------------------------------------


def _compute(
    op: str, x: Tensor, name: str, backend: str | None, definition: Callable[..., Tensor], *args: Any, **options: Any
) -> Tensor:
    """Computes an op on the backend that is asked for: so far its definition, which also checks the arguments."""
    check_floating(op, name, x)
    choose(Call(op, x.device.type), backend)
    if autocast_dtype(x.device.type) is None:
        return definition(x, *args, **options)
    with torch.autocast(x.device.type, enabled=False):  # or PyTorch would round each product inside
        y = definition(x, *args, **options)
    return round_to_autocast(y)


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
    backend: str | None = None,
) -> Tensor:
    """h <- act_i(gamma_i * norm(W_i h + b_i) + beta_i), then concat(h, x) if i is in skips, for every hidden layer i.

    x [..., in], weights [out, in] each, biases [out] each or None -> [..., out] in the weights' dtype, or autocast's
    where it is on. modulation [..., hidden, 2], or [..., hidden, 2, width] per channel: (gamma, beta) of the hidden
    layers, as `coordinate_modulation` gives them, its leading axes broadcast to x's. Exact definition:
    `camkernels.reference.modulated_mlp`.

    norm: None or "point", over the values of a point. activation: one name or None, or a list of one per hidden layer;
    names in `camkernels.reference.modulate`. output_layer: the last weight is a plain linear layer, with
    output_activation; False: it is a hidden layer too. omega: of "sine", a number or one per hidden layer. frequencies
    [width]: constants of "residual_sine". backend: None takes the best that can run; only "reference" does so far.

    First and second derivatives in x, weights, biases and modulation; call backward outside of autocast, as PyTorch
    advises: inside, the products of its own backward are rounded.
    Hidden values are float32, or float64 if a tensor is float64.

    Raises ValueError for shapes, values and mixed devices, TypeError for dtypes, RuntimeError where a
    backend that was asked for cannot run.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024.

    >>> weights = [torch.randn(16, 3), torch.randn(16, 16), torch.randn(1, 16)]
    >>> modulated_mlp(torch.rand(5, 3), weights, modulation=torch.rand(5, 2, 2), norm="point").shape
    torch.Size([5, 1])
    """
    return _compute(
        "modulated_mlp", x, "x", backend, reference.modulated_mlp, weights, biases, modulation, norm=norm, eps=eps,
        activation=activation, output_activation=output_activation, output_layer=output_layer, skips=skips, omega=omega,
        frequencies=frequencies,
    )  # fmt: skip


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
    backend: str | None = None,
) -> Tensor:
    """y = act(gamma * norm(h) + beta), the middle of a modulated layer, also where the linear part is a convolution.

    gamma and beta broadcast to h as in PyTorch: [..., 1] per point, [..., C] per channel, [N, C, 1, 1] for frames.
    norm: None, "point" (last axis), "ray" (last two axes together), "frame" (H and W of h [N, C, H, W]). The result has
    h's shape and dtype, or autocast's. Activations, dtypes and exact definition: `camkernels.reference.modulate`;
    backend and errors as in `modulated_mlp`.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024; Perez et al., "FiLM", 2018.

    >>> modulate(torch.randn(2, 3, 4, 4), torch.rand(2, 3, 1, 1), torch.zeros(3, 1, 1), norm="frame").shape
    torch.Size([2, 3, 4, 4])
    """
    return _compute(
        "modulate", h, "h", backend, reference.modulate, gamma, beta, norm=norm, eps=eps, activation=activation,
        omega=omega, frequencies=frequencies,
    )  # fmt: skip


def coordinate_modulation(
    coords: Tensor,
    grids: Tensor,
    *,
    padding: str = "border",
    align_corners: bool = True,
    combine: str = "single",
    backend: str | None = None,
) -> Tensor:
    """gamma and beta of every layer, interpolated linearly in small grids at the coordinates.

    coords [..., d] in [-1, 1], exactly as torch.nn.functional.grid_sample reads them: slot 0 is the LAST axis of a
    grid. grids [layers, 2, *nodes] -> [..., layers, 2], or [layers, 2, C, *nodes] -> [..., layers, 2, C]; of the 2, the
    first is gamma. combine="plane_product": d = 3, grids [layers, 2, 3, (C,) h, w], the product over planes xy, xz, yz.
    The result has the grids' dtype, or autocast's; gradients flow to coords too: detach them where they should not.
    Exact definition, padding, NaN: `camkernels.reference.coordinate_modulation`; backend and errors: `modulated_mlp`.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024.

    >>> coordinate_modulation(torch.rand(5, 2) * 2 - 1, torch.rand(3, 2, 32, 32)).shape
    torch.Size([5, 3, 2])
    """
    return _compute(
        "coordinate_modulation", coords, "coords", backend, reference.coordinate_modulation, grids, padding=padding,
        align_corners=align_corners, combine=combine,
    )  # fmt: skip


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
    backend: str | None = None,
    **options: Any,
) -> Tensor:
    """y = modulated_mlp(hash_grid(x, table, geometry), weights, biases, modulation), with the options of both
    but return_jacobian.

    x [..., D] in [0, 1] -> [..., out] in the weights' dtype. Nothing is fused yet: each of the two ops takes its best
    backend, or the one that is asked for.

    >>> geometry = GridGeometry.build(2, n_levels=4, n_features_per_level=2, log2_hashmap_size=12)
    >>> table, weights = torch.rand(geometry.n_entries, 2), [torch.randn(16, 8), torch.randn(3, 16)]
    >>> hash_grid_mlp(torch.rand(5, 2), table, geometry, weights).shape
    torch.Size([5, 3])
    """
    check_floating("hash_grid_mlp", "x", x)
    choose(Call("hash_grid_mlp", x.device.type), backend)
    features = hash_grid(x, table, geometry, interpolation=interpolation, max_level=max_level, backend=backend)
    return modulated_mlp(features, weights, biases, modulation, backend=backend, **options)


# ---- layers ----------------------------------------------------------------------------------------------------------


class ModulatedMLP(nn.Module):
    """MLP whose hidden layers take a scale and a shift: x [..., in_features] -> [..., out_features].

    hidden_layers layers of `width` features, then a linear layer; with output_layer=False the last hidden layer has
    out_features, and forward returns it (with x behind it if that layer is in skips). Parameters `layers.{i}.weight`
    and `layers.{i}.bias`, drawn as torch.nn.Linear draws them. The weights of a sine layer are drawn as SIREN's: from
    U(-1/in, 1/in) in the first layer, else U(-sqrt(6/in)/omega, sqrt(6/in)/omega).

    The other arguments, the forms of modulation, and the errors: `modulated_mlp`.

    >>> mlp = ModulatedMLP(2, 3, width=32, hidden_layers=3, norm="point")
    >>> modulation = CoordinateModulation(hidden_layers=3)
    >>> coords = torch.rand(5, 2) * 2 - 1
    >>> mlp(coords, modulation(coords)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int = 64,
        hidden_layers: int = 2,
        *,
        activation: Activation = "relu",
        output_activation: str | None = None,
        norm: str | None = None,
        bias: bool = True,
        output_layer: bool = True,
        skips: Sequence[int] = (),
        omega: Omega = 1.0,
        frequencies: Tensor | Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        op = "ModulatedMLP"
        for name, size in (("in_features", in_features), ("out_features", out_features), ("width", width)):
            check_size(op, name, size)
        check_size(op, "hidden_layers", hidden_layers, least=0 if output_layer else 1)
        check_dtype(op, "dtype", dtype)
        check_choice(op, "backend", backend, (None, *BACKENDS))
        self.options = {
            "activation": activation, "output_activation": output_activation, "norm": norm, "skips": tuple(skips),
            "output_layer": output_layer, "omega": omega,
        }  # fmt: skip
        self.plan = plan_layers(op, hidden_layers + bool(output_layer), **self.options)
        self.in_features, self.out_features, self.width = in_features, out_features, width
        self.backend = backend
        place = {"dtype": dtype, "device": torch.get_default_device() if device is None else device}
        self._frequencies = None if frequencies is None else torch.as_tensor(frequencies).tolist()
        constants = None if frequencies is None else torch.tensor(self._frequencies, **place)
        self.register_buffer("frequencies", constants, persistent=False)
        outs = [width] * hidden_layers + [out_features]
        outs = outs if output_layer else outs[1:]
        for out, name in zip(outs, self.plan.activations, strict=False):
            check_frequencies(op, constants, name, out)
        ins = [in_features] + [out + in_features * (i in self.plan.skips) for i, out in enumerate(outs)]
        shapes = zip(ins, outs, strict=False)
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, *shape, bias=bias, **place) for shape in shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights and biases anew, in the order of the layers."""
        for layer in self.layers:
            layer.reset_parameters()
        for i, (name, omega) in enumerate(zip(self.plan.activations, self.plan.omegas, strict=True)):
            if name == "sine":
                fan_in = self.layers[i].in_features
                bound = 1 / fan_in if i == 0 else math.sqrt(6 / fan_in) / (abs(omega) or 1.0)
                nn.init.uniform_(self.layers[i].weight, -bound, bound)
        if self.frequencies is not None:
            self.frequencies.copy_(torch.tensor(self._frequencies))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """x [..., in_features], modulation as in `modulated_mlp` -> [..., out_features]."""
        weights = [layer.weight for layer in self.layers]
        biases = None if self.layers[0].bias is None else [layer.bias for layer in self.layers]
        options = {**self.options, "frequencies": self.frequencies, "backend": self.backend}
        return modulated_mlp(x, weights, biases, modulation, **options)

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.in_features}, {self.out_features}, {options}"


class CoordinateModulation(KeepsGeometry):
    """Trainable grids of scales and shifts: coords [..., d] in [-1, 1] -> [..., hidden_layers, 2], or with channels
    [..., hidden_layers, 2, channels]: what `ModulatedMLP` takes as modulation.

    resolution: the nodes along each axis, in the order of the grid's axes: slot 0 of coords is the last one; for
    combine="plane_product" those of one plane (h, w). The parameter is `grids`, gamma 1 and beta 0, so that at first
    nothing is modulated. A product of three beta planes of 0 would stay 0, as its gradient is: they are drawn from
    U(-0.5, 0.5) unless beta_init="zeros". A state_dict also holds the options; one with others is refused, one without
    them (a bare parameter) is accepted.

    The other arguments, and the errors: `coordinate_modulation`.

    >>> modulation = CoordinateModulation(hidden_layers=3, resolution=(32, 32))
    >>> modulation(torch.rand(5, 2) * 2 - 1).shape, modulation.grids.shape
    (torch.Size([5, 3, 2]), torch.Size([3, 2, 32, 32]))
    """

    def __init__(
        self,
        hidden_layers: int,
        resolution: int | Sequence[int] = (32, 32),
        *,
        channels: int | None = None,
        padding: str = "border",
        combine: str = "single",
        align_corners: bool = True,
        beta_init: str = "auto",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        op = "CoordinateModulation"
        nodes = (resolution,) if isinstance(resolution, int) else tuple(resolution)
        check_size(op, "hidden_layers", hidden_layers)
        for size in nodes:
            check_size(op, "resolution", size)
        if channels is not None:
            check_size(op, "channels", channels)
        check_choice(op, "padding", padding, PADDINGS)
        check_choice(op, "combine", combine, COMBINES)
        check_choice(op, "beta_init", beta_init, ("auto", "zeros"))
        check_choice(op, "backend", backend, (None, *BACKENDS))
        check_dtype(op, "dtype", dtype)
        if not isinstance(align_corners, bool):
            raise TypeError(f"{op}: align_corners must be True or False, got {align_corners!r}")
        planes = combine == "plane_product"
        if len(nodes) != 2 if planes else not nodes:
            wanted = "two sizes (h, w) of a plane" if planes else "at least one size"
            raise ValueError(f"{op}: resolution must be {wanted} for combine={combine!r}, got {nodes}")
        self.options = {"padding": padding, "align_corners": align_corners, "combine": combine}
        self.beta_init, self.backend = beta_init, backend
        shape = (hidden_layers, 2, *([3] * planes), *(() if channels is None else (channels,)), *nodes)
        self.grids = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gamma 1, beta 0; the beta planes of a product from U(-0.5, 0.5) unless beta_init="zeros"."""
        nn.init.ones_(self.grids[:, 0])
        nn.init.zeros_(self.grids[:, 1])
        if self.options["combine"] == "plane_product" and self.beta_init == "auto":
            nn.init.uniform_(self.grids[:, 1], -0.5, 0.5)

    def forward(self, coords: Tensor) -> Tensor:
        """coords [..., d] -> [..., hidden_layers, 2] or [..., hidden_layers, 2, channels]."""
        return coordinate_modulation(coords, self.grids, **self.options, backend=self.backend)

    def get_extra_state(self) -> dict[str, Any]:
        return dict(self.options)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != self.options:
            raise ValueError(
                f"CoordinateModulation: the state_dict is of a layer with {state}, this one has {self.options}; build "
                "it with those options"
            )

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"grids={list(self.grids.shape)}, {options}, dtype={self.grids.dtype}"


class Modulate(nn.Module):
    """act(gamma * norm(h) + beta) as a layer without parameters; arguments, shapes and errors: `modulate`.

    >>> Modulate(norm="ray", eps=1e-6)(torch.randn(4, 6, 8), torch.rand(4, 1, 1), torch.zeros(4, 1, 1)).shape
    torch.Size([4, 6, 8])
    """

    def __init__(
        self,
        norm: str | None = None,
        eps: float = 1e-5,
        activation: str | None = "relu",
        omega: float = 1.0,
        frequencies: Tensor | Sequence[float] | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        check_choice("Modulate", "norm", norm, NORMS)
        check_choice("Modulate", "activation", activation, ACTIVATIONS)
        check_choice("Modulate", "backend", backend, (None, *BACKENDS))
        check_number("Modulate", "eps", eps, least=0.0)
        check_number("Modulate", "omega", omega)
        self.options = {"norm": norm, "eps": eps, "activation": activation, "omega": omega}
        self.backend = backend
        constants = None if frequencies is None else torch.as_tensor(frequencies)
        self.register_buffer("frequencies", constants, persistent=False)

    def forward(self, h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """h, gamma and beta that broadcast to it -> h's shape."""
        return modulate(h, gamma, beta, **self.options, frequencies=self.frequencies, backend=self.backend)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
