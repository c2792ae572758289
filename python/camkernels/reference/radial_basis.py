# SPDX-License-Identifier: MIT
"""The definition of the radial-basis evaluation in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._modulation import compute_dtype
from .._radial_basis import Basis, ignores_shape

# phi(q) of the kinds that depend on a quadratic form alone
PROFILES: dict[str, Callable[[Tensor], Tensor]] = {
    "ivq": lambda q: 1 / (1 + q),
    "ivmq": lambda q: (1 + q) ** -0.5,
    "ivd": lambda q: 1 / (q.sqrt() + 1e-10),
    "ivc": lambda q: 1 / (q**1.5 + 1e-30),
    "gauss": lambda q: torch.exp(-q / 2),
    "sgauss2": lambda q: torch.exp(-((q / 2) ** 2)),
    "nsgauss2": lambda q: torch.exp(-q),
    "markov": lambda q: torch.exp(-q.sqrt()),
    "expsin": lambda q: torch.exp(-torch.sin(q.sqrt())),
    "qd": lambda q: 1 + q,
    "mqd": lambda q: (1 + q).sqrt(),
    "phs1": lambda q: q.sqrt(),
    "phs3": lambda q: q**1.5,
    "vep": lambda q: 1 - q,
}
ROOTED = ("ivd", "ivc", "markov", "expsin", "phs1", "phs3")  # of sqrt(q): derivatives at q = 0 are singular


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
) -> Tensor:
    """y_c = sum_k psi_c(u_k) features[k, c],  u_k = phi_k / (sum_k phi_k + eps), over the kernels k of a point

    with psi_c(u) = u for c < keep, and sin(frequencies_c u + phase_c) behind; u for all c without frequencies. u = phi
    without normalize. With detach_normalizer the sum counts as a constant in derivatives.

    x [..., d], d from 1 to 4; centers [n, d]; shapes [n, s]; features [n, F] -> [..., F] in the dtype of the features.
    neighbors: integers [..., K], the kernels of each point, as `camkernels.nearest` finds them; None: all n.
    frequencies, constants, and phase: [F - keep] each. Computed in float64 if x, centers, shapes or features are, else
    in float32.

    shape, with o = x - center and s the row of shapes, matrices row by row: S o = s o ("isotropic", s = 1, and
    "diagonal", s = d, neither negative), the product with the matrix ("full" and "projected", s = d*d), or with the
    symmetric matrix whose upper triangle is given ("symmetric", s = d(d+1)/2). q = <o, S o>; "projected" |S o|^2.
    kind: nlin prod_i max(0, 1 - |(S o)_i|); ivq 1 / (1 + q); ivmq (1 + q)^-1/2; ivd 1 / (sqrt q + 1e-10);
    ivc 1 / (q^3/2 + 1e-30); gauss exp(-q/2); sgauss2 exp(-(q/2)^2); nsgauss2 exp(-q); markov exp(-sqrt q);
    expsin exp(-sin sqrt q); qd 1 + q; mqd sqrt(1 + q); phs1 sqrt q, if "isotropic" |o|, whatever the shape;
    phs3 q^3/2; vep 1 - q; cos <x, center> / (max(|x|, 1e-8) max(|center|, 1e-8)), whatever the shape.

    Derivatives of sqrt q at q = 0 and of nlin at its kinks are 0. A matrix that is not positive gives what the formula
    does: a negative 1 / (1 + q) beyond a pole, NaN for the root of a negative number. A point with a coordinate that is
    not finite gives NaN and adds nothing to the gradients of centers, shapes and features.

    Raises ValueError for shapes, values and mixed devices, TypeError for dtypes. Neighbours out of range: ValueError,
    but NaN for their point where that would wait for a GPU.

    Source: Chen et al., "NeuRBF: A Neural Fields Representation with Adaptive Radial Basis Functions", ICCV 2023.

    >>> import camkernels
    >>> x, centers, features = torch.rand(5, 2), torch.rand(9, 2), torch.rand(9, 3)
    >>> shapes = 16 * torch.eye(2).expand(9, 2, 2).flatten(1)
    >>> camkernels.reference.radial_basis(x, centers, shapes, features).shape
    torch.Size([5, 3])
    """
    basis = Basis(kind, shape, normalize, detach_normalizer, eps, frequencies, keep, phase)
    basis.check("radial_basis", x, centers, shapes, features, neighbors)
    dtype = compute_dtype(x, centers, shapes, features)
    c, s, weights, outside = _of_neighbors([t.to(dtype) for t in (centers, shapes, features)], neighbors)
    lost = (~x.isfinite().all(-1) | outside).unsqueeze(-1)
    point = torch.where(lost, 0.0, x.to(dtype)).unsqueeze(-2)
    o = torch.where(lost.unsqueeze(-1), 0.0, point - c)  # the centre of a kernel: finite for every kind
    phi = _kernel(kind, shape, point, c, s, o) + s[..., :0].sum(-1)  # + 0: shapes not read have a gradient, of zeros
    if normalize:
        total = phi.sum(-1, keepdim=True)
        phi = phi / ((total.detach() if detach_normalizer else total) + eps)
    y = (_waves(phi.unsqueeze(-1), basis) * weights).sum(-2)
    nothing = torch.where(lost, torch.nan, 0.0) * x.to(dtype).sum(-1, keepdim=True)  # its derivative in x is NaN too
    return torch.where(lost, nothing, y).to(features.dtype)


def _of_neighbors(tables: list[Tensor], neighbors: Tensor | None) -> tuple[Tensor | bool, ...]:
    """Rows [..., K, *] of each table, all without neighbours, and which points [...] have some that do not exist."""
    if neighbors is None:
        return *tables, False
    neighbors = neighbors.long()
    outside = (neighbors < 0) | (neighbors >= len(tables[0]))
    rows = torch.where(outside, 0, neighbors)
    return *(table[rows] for table in tables), outside.any(-1)


def _kernel(kind: str, shape: str, x: Tensor, c: Tensor, s: Tensor, o: Tensor) -> Tensor:
    """phi [..., K] of points x [..., 1, d], centres c, shapes s and offsets o [..., K, *]."""
    if kind == "cos":
        norms = (_root((v * v).sum(-1)).clamp(min=1e-8) for v in (x, c))
        return (x * c).sum(-1) / (next(norms) * next(norms))
    t, q = kernel_arguments(kind, shape, s, o)
    if kind == "nlin":
        hats = F.relu(1 - t.abs())  # derivatives 0 where one ends and where it peaks
        product = hats[..., 0]
        for i in range(1, t.shape[-1]):  # not .prod(): its second derivative divides by the factors
            product = product * hats[..., i]
        return product
    return _from_centre(PROFILES[kind], q) if kind in ROOTED else PROFILES[kind](q)


def kernel_arguments(kind: str, shape: str, s: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
    """(t [..., K, d], q [..., K]) of shapes s [..., K, *] and offsets o [..., K, d]: S o and the quadratic form."""
    t = o if ignores_shape(kind, shape) else _scaled(shape, s, o)
    return t, ((t if shape == "projected" else o) * t).sum(-1)


def _scaled(shape: str, s: Tensor, o: Tensor) -> Tensor:
    """S o of shapes s [..., K, *] and offsets o [..., K, d]."""
    dims = o.shape[-1]
    if shape in ("isotropic", "diagonal"):
        return s * o
    if shape == "symmetric":
        row, column = torch.triu_indices(dims, dims, device=s.device)
        place = torch.zeros(dims, dims, dtype=torch.long, device=s.device)
        place[row, column] = place[column, row] = torch.arange(len(row), device=s.device)
        s = s[..., place.flatten()]
    return (s.unflatten(-1, (dims, dims)) * o.unsqueeze(-2)).sum(-1)


def _from_centre(f: Callable[[Tensor], Tensor], q: Tensor) -> Tensor:
    """f(q), with derivatives 0 at q = 0."""
    centre = q == 0
    return torch.where(centre, f(torch.zeros_like(q)), f(torch.where(centre, 1.0, q)))


def _root(q: Tensor) -> Tensor:
    return _from_centre(torch.sqrt, q)


def _waves(u: Tensor, basis: Basis) -> Tensor:
    """psi(u) of u [..., 1], which broadcasts to the features."""
    if basis.frequencies is None:
        return u
    angle = u * basis.frequencies.to(u.dtype)
    if basis.phase is not None:
        angle = angle + basis.phase.to(u.dtype)
    return torch.cat([u.expand(*u.shape[:-1], basis.keep), torch.sin(angle)], -1)
