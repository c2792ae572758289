# SPDX-License-Identifier: MIT
"""What the hash grid's Triton kernels leave to the reference: derivatives of their derivatives.

The reference formula under `torch.func`, which also differentiates where an operator of the dispatcher has switched
autograd off. It holds [n, 2^D, F] per level, several times over: a convenience, not a fast path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._geometry import GridGeometry
from ..hash_grid import INTERPOLATIONS, OUTSIDE


def backward_backward(
    ggx: Tensor | None, ggtable: Tensor | None, grad: Tensor, x: Tensor, table: Tensor, counts: Tensor | None,
    *settings_and_mask: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator triton_hash_grid_backward_backward: gradients of <ggx, gx> + <ggtable, gtable> in grad, x, table."""
    *settings, mask = settings_and_mask
    lookup = _definition(x, table, counts, settings)

    def backward(grad: Tensor, x: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(lookup, x, table)[1](grad)

    return _gradients(backward, (grad, x, table), (ggx, ggtable), mask)


def jacobian_backward(
    grad: Tensor | None, grad_jacobian: Tensor | None, x: Tensor, table: Tensor, counts: Tensor | None,
    *settings_and_mask: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator triton_hash_grid_jacobian_backward: gradients of <grad, y> + <grad_jacobian, j> in x and table."""
    *settings, mask = settings_and_mask
    lookup = _definition(x, table, counts, settings, return_jacobian=True)
    return _gradients(lookup, (x, table), (grad, grad_jacobian), mask)


def _gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of <cotangents, function(inputs)>; empty(0) where the mask does not want one."""
    wanted = [i for i, wish in enumerate(mask) if wish]

    def of_wanted(*some: Tensor) -> tuple[Tensor, ...]:
        chosen = dict(zip(wanted, some, strict=True))
        return function(*(chosen.get(i, tensor) for i, tensor in enumerate(inputs)))

    outputs, pull = torch.func.vjp(of_wanted, *(inputs[i] for i in wanted))
    pairs = zip(outputs, cotangents, strict=True)
    found = iter(pull(tuple(torch.zeros_like(o) if c is None else c for o, c in pairs)))
    return tuple(
        next(found).contiguous() if wish else t.new_empty(0) for t, wish in zip(inputs, mask, strict=True)
    )


def _definition(
    x: Tensor, table: Tensor, counts: Tensor | None, settings: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """The reference as a function of x and table, for the settings of an operator."""
    scales, shift, layout, ceil_corner, outside, interpolation, active_levels, _ = settings
    dims = x.shape[1]
    rows = [layout[at : at + dims + 3] for at in range(0, len(layout), dims + 3)]
    n_levels = len(rows)
    geometry = GridGeometry(
        dims=dims,
        n_levels=n_levels,
        n_features_per_level=table.shape[1],
        scales=tuple(tuple(scales[at : at + dims]) for at in range(0, len(scales), dims)),
        shift=shift,
        strides=tuple(tuple(row[:dims]) for row in rows),
        sizes=tuple(row[dims] for row in rows),
        offsets=(*(row[dims + 1] for row in rows), table.shape[0]),
        hashed=tuple(bool(row[dims + 2]) for row in rows),
        ceil_corner=ceil_corner,
        outside=OUTSIDE[outside],
        # how the numbers above came about, which the formula does not read
        resolutions=((0,) * dims,) * n_levels,
        convention="tcnn",
        kind="hash",
        align_corners=False,
        log2_hashmap_size=0,
        base_resolution=0,
        per_level_scale=None,
        compat=(),
    )
    # half a level below the count: levels l < m L + 1e-3 are computed
    max_level = active_levels if counts is None else (counts.to(x.dtype) - 0.5) / n_levels

    def lookup(x: Tensor, table: Tensor) -> Any:
        options_of_all = {"interpolation": INTERPOLATIONS[interpolation], "max_level": max_level}
        return reference.hash_grid(x, table, geometry, **options_of_all, **options)

    return lookup
