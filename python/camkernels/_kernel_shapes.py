# SPDX-License-Identifier: MIT
"""The shapes of radial kernels that stand for clusters of points; public in `camkernels.neighbors`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_choice, check_finite, check_floating, check_shape
from ._modulation import compute_dtype
from ._radial_basis import KINDS, SHAPES, can_look_at, shape_width


def width_bounds(low: Tensor, high: Tensor, resolution: Tensor, *, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """(the least, the greatest) half-width [d] of kernels in a domain from low [d] to high [d].

    A hundredth of half the pitch of a grid of resolution [d] cells, but no less than `least`; a tenth of the domain.

    >>> import torch
    >>> width_bounds(torch.zeros(2), torch.ones(2), torch.tensor([5, 10]))
    (tensor([0.0010, 0.0005]), tensor([0.1000, 0.1000]))
    """
    extent = high - low
    return (extent / resolution / 200).clamp(min=least), extent / 10


def kernel_shapes(
    moments: Tensor,
    bounds: tuple[Tensor, Tensor],
    *,
    kind: str = "ivq",
    shape: str = "full",
    positive: bool = False,
) -> Tensor:
    """Shapes [n, s] of `radial_basis` for kernels with `second_moments` [n, s] in the same form, so that most kinds are
    1/2 at a distance of the root of the moment.

    bounds: the least and the greatest half-width [d], as `width_bounds` gives them; beyond them moments are clipped,
    and those off the diagonal to 0.999 of what a positive matrix can have. In three axes and more a matrix may
    nevertheless not be positive; "projected" is NaN there, and the other forms follow the formula, which has a pole.
    positive=True makes all of them positive: along no axis of its ellipsoid is a kernel narrower than the narrowest
    bound, nor so narrow beside the other axes that rounding hides it.

    Raises ValueError for shapes and values, TypeError for dtypes, torch.linalg.LinAlgError for a matrix without an
    inverse, which positive=True gives one.

    Source: initialisation of Chen et al., "NeuRBF", ICCV 2023.

    >>> import torch
    >>> kernel_shapes(torch.full((1, 2), 0.25), (torch.zeros(2), torch.ones(2)), shape="diagonal").tolist()
    [[4.0, 4.0]]
    >>> moments = torch.tensor([[1.0, 0.9, -0.9, 0.9, 1.0, 0.9, -0.9, 0.9, 1.0]])  # of no cluster in three axes
    >>> shapes = kernel_shapes(moments, (torch.full((3,), 0.5), torch.ones(3)), positive=True)
    >>> torch.linalg.eigvalsh(shapes.unflatten(1, (3, 3))).min() > 0
    tensor(True)
    """
    op = "kernel_shapes"
    check_floating(op, "moments", moments)
    check_choice(op, "kind", kind, KINDS)
    check_choice(op, "shape", shape, SHAPES)
    dims = len(bounds[0])
    for bound in bounds:
        check_shape(op, "bounds", bound, [dims], "one half-width for each axis")
    check_shape(op, "moments", moments, ["n", shape_width(shape, dims)], f"shape={shape!r} in {dims} axes")
    if can_look_at(moments):
        check_finite(op, "moments", moments)
        if not ((bounds[0] >= 0) & (bounds[0] <= bounds[1]) & (bounds[1] > 0) & bounds[1].isfinite()).all():
            given = " and ".join(str(bound.tolist()) for bound in bounds)
            raise ValueError(f"{op}: bounds must be from 0 on and in order, the greatest above 0, got {given}")
    dtype, moments = moments.dtype, moments.to(compute_dtype(moments))
    least, most = (bound.to(moments).square() for bound in bounds)
    moments = moments * {"nlin": 4.0, "ivmq": 1 / 3}.get(kind, 1.0)
    if shape in ("isotropic", "diagonal"):
        if shape == "isotropic":
            least, most = least.max(), most.min()
        clipped = moments.clamp(least, most)
        _check_widths(op, clipped)
        return (clipped.rsqrt() if kind == "nlin" else 1 / clipped).to(dtype)
    matrices = _clipped(_matrices(moments, shape, dims), least, most)
    _check_widths(op, matrices.diagonal(dim1=-2, dim2=-1))
    inverse = _positive_inverse(matrices, least.min(), dtype) if positive else torch.linalg.inv(matrices)
    if shape != "projected":
        return matrix_rows(inverse, shape).to(dtype)
    values, vectors = torch.linalg.eigh(inverse)
    return (vectors * values.sqrt().unsqueeze(-2)).mT.flatten(1).to(dtype)


def _check_widths(op: str, squares: Tensor) -> None:
    if can_look_at(squares) and not (squares > 0).all():
        raise ValueError(
            f"{op}: moments must be above 0 where the square of the least half-width is 0, got "
            f"{squares.min().item():g}; give a greater least half-width"
        )


def matrix_rows(matrices: Tensor, shape: str) -> Tensor:
    """Matrices [..., d, d] as rows of a form [..., s]."""
    if shape != "symmetric":
        return matrices.flatten(-2)
    row, column = torch.triu_indices(*matrices.shape[-2:], device=matrices.device)
    return matrices[..., row, column]


def _matrices(rows: Tensor, shape: str, dims: int) -> Tensor:
    """Inverse of matrix_rows."""
    if shape != "symmetric":
        return rows.unflatten(-1, (dims, dims))
    row, column = torch.triu_indices(dims, dims, device=rows.device)
    matrices = rows.new_empty(*rows.shape[:-1], dims, dims)
    matrices[..., row, column] = matrices[..., column, row] = rows
    return matrices


def _clipped(matrices: Tensor, least: Tensor, most: Tensor) -> Tensor:
    diagonal = matrices.diagonal(dim1=-2, dim2=-1).clamp(least, most)
    bound = 0.999 * (diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2)).sqrt()
    return matrices.clamp(-bound, bound).diagonal_scatter(diagonal, dim1=-2, dim2=-1)


def _positive_inverse(matrices: Tensor, least: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the nearest matrices with no eigenvalue below `least`; in float64, and positive also when rounded to dtype."""
    values, vectors = torch.linalg.eigh((matrices + matrices.mT).double() / 2)
    values = values.maximum(least).maximum(64 * torch.finfo(dtype).eps * values[..., -1:])
    return (vectors / values.unsqueeze(-2)) @ vectors.mT
