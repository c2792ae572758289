# SPDX-License-Identifier: MIT
"""Radial-basis evaluation: the function `radial_basis` and the layer `RadialBasis`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference, triton
from ._autograd import Argument, Operator
from ._backends import BACKENDS, Call, choose, define, round_to_autocast
from ._checks import check_choice, check_dtype, check_floating, check_size
from ._layers import KeepsFrequencies, KeepsGeometry, as_frequencies
from ._modulation import compute_dtype
from ._radial_basis import KINDS, MOST_DIMS, SHAPES, Basis, has_values, shape_width
from .neighbors import NeighborIndex, nearest

__all__ = ["RadialBasis", "radial_basis"]

# ---- operators -------------------------------------------------------------------------------------------------------
# C: float64 where a tensor is, else float32. x [N, d], centers [n, d], shapes [n, s] in C; features [n, F]; phase and
# frequencies [F - keep] in C; neighbors int32 [N, K], of which those that name no kernel make their point NaN. kind and
# shape: as in csrc/math/radial_basis.h. deterministic: sums over points do not depend on their order.

_TENSORS = (
    Argument("x", points=True),
    Argument("centers"),
    Argument("shapes"),
    Argument("features"),
    Argument("phase", "Tensor?"),
    Argument("neighbors", "Tensor?", points=True, differentiable=False),
    Argument("frequencies", "Tensor?", differentiable=False),
)
_SETTINGS = "int kind, int shape, bool normalize, bool detach_normalizer, float eps, int keep, bool deterministic"


def _meta(x: Tensor, centers: Tensor, shapes: Tensor, features: Tensor, *rest: Any) -> Tensor:
    return features.new_empty(x.shape[0], features.shape[1])


def _declare(name: str, apart: bool) -> Operator:
    op = Operator(name, _TENSORS, _SETTINGS, [Argument("y", points=True, apart=apart)], _meta)
    op.differentiate().differentiate()
    return op


_COMPILED, _TRITON = _declare("radial_basis", apart=True), _declare("triton_radial_basis", apart=False)
for _name, _module, _function in (
    ("", "radial_basis", "value"),
    ("_backward", "radial_basis", "backward"),
    ("_backward_backward", "second_order", "radial_basis_backward_backward"),
):
    triton.implement(f"triton_radial_basis{_name}", _module, _function)


def _kernels(
    operator: Operator, x: Tensor, centers: Tensor, shapes: Tensor, features: Tensor, neighbors: Tensor | None,
    basis: Basis,
) -> Tensor:  # fmt: skip
    """radial_basis by one of the operators."""
    dtype = compute_dtype(x, centers, shapes, features)
    points, phase, frequencies = x.to(dtype).reshape(-1, x.shape[-1]), basis.phase, basis.frequencies
    phase, frequencies = (t if t is None else t.to(dtype) for t in (phase, frequencies))
    if neighbors is not None:
        if neighbors.dtype == torch.int64:  # what names no kernel must not name one in 32 bits
            neighbors = neighbors.clamp(-1, centers.shape[0])
        neighbors = neighbors.int().reshape(-1, neighbors.shape[-1])
    settings = (
        KINDS.index(basis.kind), SHAPES.index(basis.shape), basis.normalize, basis.detach_normalizer, float(basis.eps),
        basis.keep, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    tensors = (points, centers.to(dtype), shapes.to(dtype), features, phase, neighbors, frequencies)
    return operator(*tensors, settings=settings).reshape(*x.shape[:-1], features.shape[1])


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
        operator = _TRITON if chosen == "triton" else _COMPILED
        y = _kernels(operator, x, centers, shapes, features, neighbors, basis)
    return round_to_autocast(y)


# ---- layer -----------------------------------------------------------------------------------------------------------


def _check_trainable(op: str, trainable: Any) -> tuple[str, ...]:
    """The names; TypeError unless it is some, ValueError for those of no parameter."""
    if not isinstance(trainable, Iterable) or isinstance(trainable, Tensor):
        raise TypeError(f"{op}: trainable must be a list of names of parameters, got {trainable!r}; for none give ()")
    names = (trainable,) if isinstance(trainable, str) else tuple(trainable)
    for name in names:
        check_choice(op, "trainable", name, ("centers", "shapes", "features"))
    return names


class RadialBasis(KeepsFrequencies, KeepsGeometry):
    """Trainable radial kernels: x [..., dims] -> [..., features], from the nearest `neighbors` kernels of each point.

    The parameters are `centers` [count, dims], at first from U(-1, 1), `shapes` [count, s], such that a kernel is as
    wide as a regular grid of as many would be, and `features` [count, features], from U(-1e-4, 1e-4); only those named
    in `trainable` require gradients. neighbors: how many, or None for all kernels; forward also takes the neighbours
    themselves, as `camkernels.nearest` finds them. Without, they are searched in a `NeighborIndex`, which is kept
    until centers change; each call compares them by value, which waits for a GPU, whereas `forward(x, neighbors)` with
    neighbours found once does not wait. `camkernels.neighbors` places centers and shapes where the data are. A
    state_dict also holds the options; one with others is refused, one without them (bare parameters) is accepted.

    Trained shapes may become matrices that are not positive, which follow the formula: `camkernels.reference`. The
    other arguments, and the errors: `radial_basis`.

    >>> layer = RadialBasis(100, dims=2, features=8, frequencies=torch.logspace(-3, 12, 8, base=2.0))
    >>> layer(torch.rand(5, 2)).shape, [name for name, p in layer.named_parameters() if p.requires_grad]
    (torch.Size([5, 8]), ['features'])
    """

    def __init__(
        self,
        count: int,
        dims: int,
        features: int,
        neighbors: int | None = 4,
        *,
        kind: str = "ivq",
        shape: str = "full",
        normalize: bool = True,
        detach_normalizer: bool = True,
        frequencies: Tensor | Sequence[float] | None = None,
        keep: int = 0,
        trainable: Iterable[str] = ("features",),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        op = "RadialBasis"
        sizes = {"count": count, "dims": dims, "features": features}
        for name, size in sizes.items():
            check_size(op, name, size)
        if dims > MOST_DIMS:
            raise ValueError(f"{op}: dims must be from 1 to {MOST_DIMS}, got {dims}")
        if neighbors is not None:
            check_size(op, "neighbors", neighbors)
            if neighbors > count:
                raise ValueError(f"{op}: neighbors must be at most count, {count}, got {neighbors}")
        check_choice(op, "backend", backend, (None, *BACKENDS))
        check_dtype(op, "dtype", dtype)
        trainable = _check_trainable(op, trainable)
        constants = None if frequencies is None else as_frequencies(op, frequencies, torch.float32, device)
        options = {"kind": kind, "shape": shape, "normalize": normalize, "detach_normalizer": detach_normalizer}
        self.options = {**options, "keep": keep}
        Basis(**self.options, frequencies=constants).check_options(op, features)
        self.neighbors, self.backend = neighbors, backend
        self.register_buffer("frequencies", constants, persistent=False)
        for name, width in (("centers", dims), ("shapes", shape_width(shape, dims)), ("features", features)):
            empty = torch.empty(count, width, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=name in trainable))
        self._index: NeighborIndex | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Centers from U(-1, 1), shapes of kernels as wide as the pitch of a grid of them, features U(-1e-4, 1e-4)."""
        count, dims = self.centers.shape
        pitch = 2 / count ** (1 / dims)
        form = self.options["shape"]
        linear = self.options["kind"] == "nlin"
        scale = 1 / pitch if linear or form == "projected" else (2 / pitch) ** 2
        with torch.no_grad():
            self.centers.uniform_(-1, 1)
            self.features.uniform_(-1e-4, 1e-4)
            if form in ("isotropic", "diagonal"):
                self.shapes.fill_(scale)
                return
            identity = torch.eye(dims, dtype=self.shapes.dtype, device=self.shapes.device)
            if form == "symmetric":
                row, column = torch.triu_indices(dims, dims, device=identity.device)
                identity = identity[row, column]
            self.shapes.copy_((scale * identity).flatten().expand_as(self.shapes))

    def forward(self, x: Tensor, neighbors: Tensor | None = None) -> Tensor:
        """x [..., dims], neighbors integers [..., K] or None -> [..., features]."""
        if neighbors is None and self.neighbors is not None:
            neighbors = self._search(x)
        return radial_basis(
            x, self.centers, self.shapes, self.features, neighbors, **self.options, frequencies=self.frequencies,
            backend=self.backend,
        )  # fmt: skip

    def _search(self, x: Tensor) -> Tensor:
        if not (has_values(x) and has_values(self.centers)):
            return nearest(x, self.centers, self.neighbors)
        if self._index is None or not self._index.holds(self.centers):
            self._index = NeighborIndex(self.centers)
        return self._index.search(x, self.neighbors)[0]

    def get_extra_state(self) -> dict[str, Any]:
        frequencies = None if self.frequencies is None else self.frequencies.tolist()
        return {**self.options, "neighbors": self.neighbors, "frequencies": frequencies}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state != self.get_extra_state():
            raise ValueError(
                f"RadialBasis: the state_dict is of a layer with {state}, this one has {self.get_extra_state()}; build "
                "it with those options"
            )

    def extra_repr(self) -> str:
        count, dims = self.centers.shape
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        trained = tuple(name for name, p in self.named_parameters() if p.requires_grad)
        return (
            f"{count}, {dims}, {self.features.shape[1]}, neighbors={self.neighbors}, {options}, trainable={trained}, "
            f"dtype={self.features.dtype}"
        )
