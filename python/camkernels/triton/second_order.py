# SPDX-License-Identifier: MIT
"""What the Triton kernels leave to the reference: derivatives of their derivatives.

The reference formula under autograd. Of the hash grid it holds [n, 2^D, F] per level, of the MLP the values of all
layers, several times over: it is there to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from .. import reference
from .._geometry import GridGeometry
from .._modulation import ACTIVATIONS
from .._radial_basis import KINDS, SHAPES
from ..hash_grid import INTERPOLATIONS, OUTSIDE

GRID_SETTINGS = 8  # of hash_grid's operators: the first of hash_grid_mlp's
# The state of a thread in which autograd records. Inside an operator the dispatcher has switched it off, and inside a
# dispatch mode torch.func as well, so that neither can be used without restoring this.
_INCLUDED = DispatchKeySet(DispatchKey.BackendSelect).add(DispatchKey.ADInplaceOrView)
_EXCLUDED = DispatchKeySet(DispatchKey.AutocastCPU).add(DispatchKey.AutocastCUDA)


def backward_backward(
    ggx: Tensor | None, ggtable: Tensor | None, grad: Tensor, x: Tensor, table: Tensor, counts: Tensor | None,
    *settings_and_mask: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator triton_hash_grid_backward_backward: gradients of <ggx, gx> + <ggtable, gtable> in grad, x, table."""
    *settings, mask = settings_and_mask
    lookup = _definition(x, table, counts, settings)

    def backward(grad: Tensor, x: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(lookup(x, table), (x, table), grad, create_graph=True, materialize_grads=True)

    return gradients(backward, (grad, x, table), (ggx, ggtable), mask)


def jacobian_backward(
    grad: Tensor | None, grad_jacobian: Tensor | None, x: Tensor, table: Tensor, counts: Tensor | None,
    *settings_and_mask: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator triton_hash_grid_jacobian_backward: gradients of <grad, y> + <grad_jacobian, j> in x and table."""
    *settings, mask = settings_and_mask
    lookup = _definition(x, table, counts, settings, return_jacobian=True)
    return gradients(lookup, (x, table), (grad, grad_jacobian), mask)


def modulated_mlp_backward_backward(
    ggx: Tensor | None, ggweights: list[Tensor], ggbiases: list[Tensor], ggmodulation: Tensor | None, grad: Tensor,
    x: Tensor, weights: list[Tensor], biases: list[Tensor], modulation: Tensor | None, frequencies: Tensor | None,
    kept: Tensor, *settings_and_mask: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The operator triton_modulated_mlp_backward_backward: gradients of <ggx, gx> + <ggweights, gweights> + ... in
    grad, x, weights, biases, modulation."""
    *settings, mask = settings_and_mask

    def network(x: Tensor, *parameters: Any) -> Tensor:
        return _mlp(x, *parameters, frequencies, settings)

    inputs, along = (x, weights, biases, modulation), (ggx, ggweights, ggbiases, ggmodulation)
    return _of_network(network, grad, inputs, along, mask)


def hash_grid_mlp_backward_backward(
    ggx: Tensor | None, ggtable: Tensor | None, ggweights: list[Tensor], ggbiases: list[Tensor],
    ggmodulation: Tensor | None, grad: Tensor, x: Tensor, table: Tensor, counts: Tensor | None, weights: list[Tensor],
    biases: list[Tensor], modulation: Tensor | None, frequencies: Tensor | None, *settings_and_mask: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The operator triton_hash_grid_mlp_backward_backward: as that of the MLP alone, with x and table for its x."""
    *settings, mask = settings_and_mask
    lookup = _definition(x, table, counts, settings[:GRID_SETTINGS])

    def network(x: Tensor, table: Tensor, *parameters: Any) -> Tensor:
        return _mlp(lookup(x, table), *parameters, frequencies, settings[GRID_SETTINGS:])

    inputs = (x, table, weights, biases, modulation)
    return _of_network(network, grad, inputs, (ggx, ggtable, ggweights, ggbiases, ggmodulation), mask)


def _of_network(
    network: Callable[..., Tensor], grad: Tensor, inputs: Sequence[Any], along: Sequence[Any], mask: Sequence[bool]
) -> tuple[Any, ...]:
    """Gradients of <along, the gradients of <grad, network(inputs)> in the inputs> in grad and the inputs, which are
    tensors, lists of them, or None."""
    lists = [t if isinstance(t, list) else [] if t is None else [t] for t in inputs]
    ends = list(accumulate((len(items) for items in lists), initial=0))

    def regroup(flat: Sequence[Any]) -> list[Any]:
        groups = [list(flat[start:end]) for start, end in pairwise(ends)]
        return [g if isinstance(t, list) else g[0] if g else None for g, t in zip(groups, inputs, strict=True)]

    def backward(grad: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        y = network(*regroup(flat))
        return torch.autograd.grad(y, flat, grad, create_graph=True, materialize_grads=True)

    cotangents: list[Tensor | None] = []
    wishes = [mask[0]]
    for items, given, wish in zip(lists, along, mask[1:], strict=True):
        known = given if isinstance(given, list) else [given]
        cotangents += (known or [None] * len(items))[: len(items)]
        wishes += [wish] * len(items)
    of_grad, *found = gradients(backward, (grad, *(t for items in lists for t in items)), cotangents, wishes)
    results = []
    for group, wish in zip(regroup(found), mask[1:], strict=True):
        results.append(
            inputs[0].new_empty(0) if group is None else [] if isinstance(group, list) and not wish else group
        )
    return (of_grad, *results)


def _mlp(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], modulation: Tensor | None,
    frequencies: Tensor | None, settings: Sequence[Any],
) -> Tensor:  # fmt: skip
    """The reference for the settings of an operator: y [N, out]."""
    numbers, omegas, skips, output_layer, point_norm, eps, *_ = settings
    names = [ACTIVATIONS[number] for number in numbers]
    points = x.unsqueeze(0)
    if modulation is not None:  # [M, hidden, 2, ...]: its row i belongs to the points of group i
        points = x.reshape(len(modulation), len(x) // max(len(modulation), 1), x.shape[1])
        modulation = modulation.unsqueeze(1)
    y = reference.modulated_mlp(
        points, weights, biases or None, modulation,
        norm="point" if point_norm else None, eps=eps,
        activation=names[:-1] if output_layer else names, output_activation=names[-1] if output_layer else None,
        output_layer=output_layer, skips=[i for i, skip in enumerate(skips) if skip],
        omega=omegas[-1] if len(set(omegas)) == 1 else omegas[:-1] if output_layer else omegas, frequencies=frequencies,
    )  # fmt: skip
    return y.flatten(0, 1)


def gradients(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    mask: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of <cotangents, function(inputs)>; empty(0) where the mask does not want one."""
    with torch._C._ForceDispatchKeyGuard(_INCLUDED, _EXCLUDED), torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        pairs = zip(function(*leaves), cotangents, strict=True)
        known = [(output, c) for output, c in pairs if c is not None and output.requires_grad]
        outputs, given = [output for output, _ in known], [c for _, c in known]
        wanted = [leaf for leaf, wish in zip(leaves, mask, strict=True) if wish]
        if outputs and wanted:
            found = iter(torch.autograd.grad(outputs, wanted, given, allow_unused=True, materialize_grads=True))
        else:
            found = iter([torch.zeros_like(leaf) for leaf in wanted])
    return tuple(
        next(found).detach().contiguous() if wish else t.new_empty(0) for t, wish in zip(inputs, mask, strict=True)
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


def coordinate_modulation_backward_backward(
    ggcoords: Tensor | None, gggrids: Tensor | None, grad: Tensor, coords: Tensor, grids: Tensor,
    *settings_and_mask: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator triton_coordinate_modulation_backward_backward: gradients of <ggcoords, gcoords> +
    <gggrids, ggrids> in grad, coords, grids."""
    zeros, align_corners, planes, _, mask = settings_and_mask
    options = {
        "padding": "zeros" if zeros else "border",
        "align_corners": align_corners,
        "combine": "plane_product" if planes else "single",
    }

    def backward(grad: Tensor, coords: Tensor, grids: Tensor) -> tuple[Tensor, ...]:
        y = reference.coordinate_modulation(coords, grids, **options)
        return torch.autograd.grad(y, (coords, grids), grad, create_graph=True, materialize_grads=True)

    return gradients(backward, (grad, coords, grids), (ggcoords, gggrids), mask)


def radial_basis_backward_backward(
    ggx: Tensor | None, ggcenters: Tensor | None, ggshapes: Tensor | None, ggfeatures: Tensor | None,
    ggphase: Tensor | None, grad: Tensor, x: Tensor, centers: Tensor, shapes: Tensor, features: Tensor,
    phase: Tensor | None, neighbors: Tensor | None, frequencies: Tensor | None, *settings_and_mask: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The operator triton_radial_basis_backward_backward: gradients of <ggx, gx> + <ggcenters, gcenters> + ... in grad,
    x, centers, shapes, features, phase."""
    (kind, shape, normalize, detach_normalizer, eps, keep, _), mask = settings_and_mask[:-1], settings_and_mask[-1]
    options = {
        "kind": KINDS[kind], "shape": SHAPES[shape], "normalize": normalize, "detach_normalizer": detach_normalizer,
        "eps": eps, "keep": keep, "frequencies": frequencies,
    }  # fmt: skip
    phases = [] if phase is None else [phase]

    def backward(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, centers, shapes, features, *phases = tensors
        y = reference.radial_basis(
            x, centers, shapes, features, neighbors, **options, phase=phases[0] if phases else None
        )
        return torch.autograd.grad(y, tensors, grad, create_graph=True, materialize_grads=True)

    inputs = (grad, x, centers, shapes, features, *phases)
    along = (ggx, ggcenters, ggshapes, ggfeatures, ggphase)[: len(inputs) - 1]
    found = gradients(backward, inputs, along, mask[: len(inputs)])
    return found if phases else (*found, x.new_empty(0))
