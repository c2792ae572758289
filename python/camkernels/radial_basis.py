# SPDX-License-Identifier: MIT
"""Radial-basis evaluation: the function `radial_basis`."""

from __future__ import annotations

from torch import Tensor

from . import reference
from ._backends import Call, choose, define, round_to_autocast
from ._checks import check_floating

__all__ = ["radial_basis"]


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
    options = {
        "kind": kind, "shape": shape, "normalize": normalize, "detach_normalizer": detach_normalizer, "eps": eps,
        "frequencies": frequencies, "keep": keep, "phase": phase,
    }  # fmt: skip
    choose(Call(op, x.device.type, x.device.index), backend)
    return round_to_autocast(define(reference.radial_basis, x, centers, shapes, features, neighbors, **options))
