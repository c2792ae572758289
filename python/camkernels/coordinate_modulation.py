# SPDX-License-Identifier: MIT
"""Scales and shifts from coordinate grids: the function `coordinate_modulation`, the layer `CoordinateModulation`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference, triton
from ._autograd import Argument, Operator
from ._backends import BACKENDS, Call, choose, define, round_to_autocast
from ._checks import check_choice, check_dtype, check_flag, check_floating, check_size, check_sizes
from ._layers import KeepsGeometry
from ._modulation import COMBINES, MAX_DIMS, PADDINGS, check_lookup, compute_dtype

__all__ = ["CoordinateModulation", "coordinate_modulation"]

# ---- operators -------------------------------------------------------------------------------------------------------
# coords [N, d] float32 or float64 (float64 beside float64 grids), grids as in the function; planes: combine is
# "plane_product".

_TENSORS = (Argument("coords", points=True), Argument("grids"))
_SETTINGS = "bool zeros, bool align_corners, bool planes, bool deterministic"


def _meta(coords: Tensor, grids: Tensor, zeros: bool, align_corners: bool, planes: bool, *settings: Any) -> Tensor:
    nodes = 2 if planes else coords.shape[1]
    channels = grids.shape[3 if planes else 2 : grids.ndim - nodes]
    return grids.new_empty(coords.shape[0], grids.shape[0], 2, *channels)


def _declare(prefix: str) -> Operator:
    op = Operator(f"{prefix}coordinate_modulation", _TENSORS, _SETTINGS, [Argument("y", points=True)], _meta)
    op.differentiate().differentiate()
    return op


_COMPILED = _declare("")  # "cpu" and "cuda": the dispatcher tells them apart
_TRITON = _declare("triton_")
for _name, _module, _function in (
    ("", "coordinate_modulation", "value"),
    ("_backward", "coordinate_modulation", "backward"),
    ("_backward_backward", "second_order", "coordinate_modulation_backward_backward"),
):
    triton.implement(f"triton_coordinate_modulation{_name}", _module, _function)


# ---- function --------------------------------------------------------------------------------------------------------


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
    op = "coordinate_modulation"
    check_floating(op, "coords", coords)
    chosen = choose(Call(op, coords.device.type, coords.device.index), backend)
    if chosen == "reference":
        options = {"padding": padding, "align_corners": align_corners, "combine": combine}
        y = define(reference.coordinate_modulation, coords, grids, **options)
    else:
        check_lookup(op, coords, grids, padding, align_corners, combine)
        points = coords.to(compute_dtype(coords, grids)).reshape(-1, coords.shape[-1])
        deterministic = torch.are_deterministic_algorithms_enabled()
        settings = (padding == "zeros", align_corners, combine == "plane_product", deterministic)
        y = (_TRITON if chosen == "triton" else _COMPILED)(points, grids, settings=settings)
        y = y.reshape(*coords.shape[:-1], *y.shape[1:])
    return round_to_autocast(y)


# ---- layer -----------------------------------------------------------------------------------------------------------


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
        nodes = check_sizes(op, "resolution", resolution)
        check_size(op, "hidden_layers", hidden_layers)
        if channels is not None:
            check_size(op, "channels", channels)
        check_choice(op, "padding", padding, PADDINGS)
        check_choice(op, "combine", combine, COMBINES)
        check_choice(op, "beta_init", beta_init, ("auto", "zeros"))
        check_choice(op, "backend", backend, (None, *BACKENDS))
        check_dtype(op, "dtype", dtype)
        check_flag(op, "align_corners", align_corners)
        planes = combine == "plane_product"
        if len(nodes) != 2 if planes else not 1 <= len(nodes) <= MAX_DIMS:
            wanted = "two sizes (h, w) of a plane" if planes else f"from 1 to {MAX_DIMS} sizes"
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
