# SPDX-License-Identifier: MIT
"""Hash grid and MLP behind it: the function `hash_grid_mlp`, and the operators of its fused kernels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import triton
from ._autograd import Argument, Operator
from ._backends import Call, choose, define, round_to_autocast
from ._checks import check_floating
from ._geometry import GridGeometry
from ._modulation import check_list, check_mlp, compute_dtype, plan_layers, widest_of
from .hash_grid import check_hash_grid, hash_grid, prepare_lookup
from .modulated_mlp import mlp_settings, modulated_mlp, prepare_modulation

__all__ = ["hash_grid_mlp"]

# ---- operators -------------------------------------------------------------------------------------------------------
# Arguments and settings are those of hash_grid.py and modulated_mlp.py; C is the dtype of the MLP's hidden values, for
# features of the table's dtype.

_TENSORS = (
    Argument("x", points=True),
    Argument("table"),
    Argument("level_counts", "Tensor?", points=True, differentiable=False),
    Argument("weights", "Tensor[]"),
    Argument("biases", "Tensor[]"),
    Argument("modulation", "Tensor?", points=True),
    Argument("frequencies", "Tensor?", differentiable=False),
)
_SETTINGS = (
    "float[] scales, float shift, int[] layout, bool ceil_corner, int outside, int interpolation, int active_levels, "
    "bool deterministic, int[] activations, float[] omegas, bool[] skips, bool output_layer, bool point_norm, "
    "float eps, bool tf32, bool bfloat16"
)


def _meta(
    x: Tensor, table: Tensor, level_counts: Tensor | None, weights: Sequence[Tensor], biases: Sequence[Tensor],
    modulation: Tensor | None, frequencies: Tensor | None, *settings: Any,
) -> Tensor:  # fmt: skip
    layout, skips = settings[2], settings[10]
    features = len(layout) // (x.shape[1] + 3) * table.shape[1]
    return weights[0].new_empty(x.shape[0], weights[-1].shape[0] + (features if skips[-1] else 0))


_TRITON = Operator("triton_hash_grid_mlp", _TENSORS, _SETTINGS, [Argument("y", points=True)], _meta)
_TRITON.differentiate().differentiate()
for _name, _module, _function in (
    ("", "hash_grid_mlp", "value"),
    ("_backward", "hash_grid_mlp", "backward"),
    ("_backward_backward", "second_order", "hash_grid_mlp_backward_backward"),
):
    triton.implement(f"triton_hash_grid_mlp{_name}", _module, _function)


# ---- function --------------------------------------------------------------------------------------------------------

MLP_OPTIONS = tuple(
    p.name for p in inspect.signature(modulated_mlp).parameters.values()
    if p.kind is p.KEYWORD_ONLY and p.name != "backend"
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

    x [..., D] in [0, 1] -> [..., out] in the weights' dtype. On backend "triton" one kernel encodes and runs the MLP;
    on the others it is the two ops, each on the backend that is asked for, or on its best. First and second
    derivatives in x, table, weights, biases and modulation. TF32 where PyTorch allows it, as in `modulated_mlp`.

    Raises TypeError for an option that neither has, else what the two ops raise.

    >>> import torch
    >>> geometry = GridGeometry.build(2, n_levels=4, n_features_per_level=2, log2_hashmap_size=12)
    >>> table, weights = torch.rand(geometry.n_entries, 2), [torch.randn(16, 8), torch.randn(3, 16)]
    >>> hash_grid_mlp(torch.rand(5, 2), table, geometry, weights).shape
    torch.Size([5, 3])
    """
    op = "hash_grid_mlp"
    check_floating(op, "x", x)
    check_list(op, "weights", weights)
    for name in options:
        if name not in MLP_OPTIONS:
            known = ", ".join(("interpolation", "max_level", *MLP_OPTIONS, "backend"))
            raise TypeError(f"{op}: there is no option {name}; it has {known}")
    widest = max(widest_of(weights), geometry.output_dim if isinstance(geometry, GridGeometry) else 0)
    if choose(Call(op, x.device.type, x.device.index, widest), backend) == "triton":
        return _fused(x, table, geometry, weights, biases, modulation, interpolation, max_level, options)
    options_of_grid = {"interpolation": interpolation, "max_level": max_level, "backend": backend}
    features = define(hash_grid, x, table, geometry, **options_of_grid)  # autocast rounds the result alone
    return modulated_mlp(features, weights, biases, modulation, backend=backend, **options)


def _fused(
    x: Tensor, table: Tensor, geometry: GridGeometry, weights: Sequence[Tensor], biases: Sequence[Tensor] | None,
    modulation: Tensor | None, interpolation: str, max_level: int | float | Tensor | None, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """hash_grid_mlp by the operators."""
    check_hash_grid(x, table, geometry, interpolation, max_level)
    (points, *grid), settings = prepare_lookup(x, table, geometry, interpolation, max_level)
    plan = plan_layers("modulated_mlp", len(weights), **options)
    features = table.new_empty(1).expand(*x.shape[:-1], geometry.output_dim)  # has their shape, holds nothing
    check_mlp("modulated_mlp", features, weights, biases, modulation, plan)
    dtype = compute_dtype(features, modulation, *weights)
    scales = prepare_modulation(dtype, x.shape[:-1], weights, modulation, plan)
    y = _TRITON(points, *grid, list(weights), list(biases or ()), *scales, settings=(*settings, *mlp_settings(plan)))
    return round_to_autocast(y.reshape(*x.shape[:-1], y.shape[-1]))
