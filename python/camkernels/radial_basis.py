# SPDX-License-Identifier: MIT
"""Radial-basis evaluation: the function `radial_basis`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._autograd import Argument, Operator
from ._backends import Call, choose, define, round_to_autocast
from ._checks import check_floating
from ._modulation import compute_dtype
from ._radial_basis import KINDS, SHAPES, Basis

__all__ = ["radial_basis"]

# ---- operators -------------------------------------------------------------------------------------------------------
# C: float64 where a tensor is, else float32. x [N, d], centers [n, d], shapes [n, s] in C; features [n, F]; phase and
# frequencies [F - keep] in C; neighbors int32 [N, K], of which those that name no kernel make their point NaN. kind and
# shape: as in csrc/math/radial_basis.h.

_TENSORS = (
    Argument("x", points=True),
    Argument("centers"),
    Argument("shapes"),
    Argument("features"),
    Argument("phase", "Tensor?"),
    Argument("neighbors", "Tensor?", points=True, differentiable=False),
    Argument("frequencies", "Tensor?", differentiable=False),
)
_SETTINGS = "int kind, int shape, bool normalize, bool detach_normalizer, float eps, int keep"


def _meta(x: Tensor, centers: Tensor, shapes: Tensor, features: Tensor, *rest: Any) -> Tensor:
    return features.new_empty(x.shape[0], features.shape[1])


_COMPILED = Operator("radial_basis", _TENSORS, _SETTINGS, [Argument("y", points=True)], _meta)
_COMPILED.differentiate().differentiate()


def _kernels(
    x: Tensor, centers: Tensor, shapes: Tensor, features: Tensor, neighbors: Tensor | None, basis: Basis
) -> Tensor:
    """radial_basis by the operator."""
    dtype = compute_dtype(x, centers, shapes, features)
    points, phase, frequencies = x.to(dtype).reshape(-1, x.shape[-1]), basis.phase, basis.frequencies
    phase, frequencies = (t if t is None else t.to(dtype) for t in (phase, frequencies))
    if neighbors is not None:
        if neighbors.dtype == torch.int64:  # what names no kernel must not name one in 32 bits
            neighbors = neighbors.clamp(-1, centers.shape[0])
        neighbors = neighbors.int().reshape(-1, neighbors.shape[-1])
    settings = (
        KINDS.index(basis.kind), SHAPES.index(basis.shape), basis.normalize, basis.detach_normalizer, float(basis.eps),
        basis.keep,
    )  # fmt: skip
    tensors = (points, centers.to(dtype), shapes.to(dtype), features, phase, neighbors, frequencies)
    return _COMPILED(*tensors, settings=settings).reshape(*x.shape[:-1], features.shape[1])


# ---- function --------------------------------------------------------------------------------------------------------


def radial_basis(
    x: Tensor,
    centers: Tensor,
    shapes: Tensor,
    features: Tensor,
    neighbors: Tensor | None = None,
    *,
    kind: str = "ivq",
    shape: str = "full",
    normalize: bool = True,
    detach_normalizer: bool = True,
    eps: float = 1e-8,
    frequencies: Tensor | None = None,
    keep: int = 0,
    phase: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y_c = sum_k psi_c(u_k) features[k, c],  u_k = phi_k / (sum_k phi_k + eps), over the kernels k of a point

    with psi_c(u) = u for c < keep, and sin(frequencies_c u + phase_c) behind; u for all c without frequencies; u = phi
    without normalize. With detach_normalizer the sum counts as a constant in derivatives.

    x [..., d], d from 1 to 4; centers [n, d]; features [n, F] -> [..., F] in the dtype of the features, or autocast's
    where it is on. neighbors: integers [..., K], the kernels of each point; None: all n. shapes [n, s] of form
    `shape`: "isotropic" s = 1, "diagonal" d, "full" and "projected" d*d, "symmetric" d(d+1)/2, the upper triangle row
    by row. kind: the function phi of the offset x - center and the shape; all of them, and the exact definition:
    `camkernels.reference.radial_basis`. frequencies, constants, and phase: [F - keep] each. backend: None takes the
    best that can run.

    First and second derivatives in x, centers, shapes, features and phase; 0 where a root is singular at a centre.
    Weights and phases are computed in float32, or float64 if a tensor is float64.

    Raises ValueError for shapes, values (neighbours out of range, negative shapes where the form has a sign) and mixed
    devices, TypeError for dtypes, RuntimeError where a backend that was asked for cannot run.

    Source: Chen et al., "NeuRBF: A Neural Fields Representation with Adaptive Radial Basis Functions", ICCV 2023.

    >>> import torch
    >>> x, centers, features = torch.rand(5, 2), torch.rand(9, 2), torch.rand(9, 3)
    >>> radial_basis(x, centers, torch.full((9, 1), 16.0), features, shape="isotropic", kind="gauss").shape
    torch.Size([5, 3])
    """
    op = "radial_basis"
    check_floating(op, "x", x)
    chosen = choose(Call(op, x.device.type, x.device.index), backend)
    basis = Basis(kind, shape, normalize, detach_normalizer, eps, frequencies, keep, phase)
    if chosen == "reference":
        y = define(reference.radial_basis, x, centers, shapes, features, neighbors, **vars(basis))
    else:
        basis.check(op, x, centers, shapes, features, neighbors)
        y = _kernels(x, centers, shapes, features, neighbors, basis)
    return round_to_autocast(y)
