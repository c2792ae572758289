# SPDX-License-Identifier: MIT
"""Multi-resolution hash grid: the function `hash_grid`, the layer `HashGrid`, and their operators."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from . import reference, triton
from ._autograd import Argument, Operator
from ._backends import BACKENDS, Call, choose, round_to_autocast
from ._checks import check_choice, check_dtype, check_flag, check_floating, check_number, check_same_device, check_shape
from ._geometry import GridGeometry
from ._layers import KeepsGeometry
from .reference.hash_grid import count_levels

__all__ = ["GridGeometry", "HashGrid", "hash_grid"]

INTERPOLATIONS = ("linear", "smoothstep", "nearest")  # numbered as in csrc/math/interpolation.h
OUTSIDE = ("clamp", "zero", "wrap")  # numbered as in csrc/math/hash_grid.h

# ---- operators -------------------------------------------------------------------------------------------------------
# x [N, D] float32 or float64 (float64 beside a float64 table), table [entries, F], level_counts int32 [N] or None.
# layout: per level the strides of the D axes, size, offset, hashed.

_TENSORS = (
    Argument("x", points=True),
    Argument("table"),
    Argument("level_counts", "Tensor?", points=True, differentiable=False),
)
_SETTINGS = (
    "float[] scales, float shift, int[] layout, bool ceil_corner, int outside, int interpolation, int active_levels, "
    "bool deterministic"
)


def _meta_value(x: Tensor, table: Tensor, level_counts: Tensor | None, *settings: Any) -> Tensor:
    n_levels = len(settings[2]) // (x.shape[1] + 3)
    return table.new_empty(x.shape[0], n_levels * table.shape[1])


def _meta_jacobian(x: Tensor, table: Tensor, level_counts: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    y = _meta_value(x, table, level_counts, *settings)
    return y, x.new_empty(*y.shape, x.shape[1])


def _declare(prefix: str, apart: bool) -> tuple[Operator, Operator]:
    """Operators of the value, with two derivatives, and of the Jacobian, with one."""
    y, jacobian = Argument("y", points=True, apart=apart), Argument("jacobian", points=True)
    value = Operator(f"{prefix}hash_grid", _TENSORS, _SETTINGS, [y], _meta_value)
    value.differentiate().differentiate()
    both = Operator(f"{prefix}hash_grid_jacobian", _TENSORS, _SETTINGS, [y, jacobian], _meta_jacobian)
    both.differentiate()
    return value, both


_COMPILED = _declare("", apart=True)  # "cpu" and "cuda": the dispatcher tells them apart
_TRITON = _declare("triton_", apart=False)
for _name, _module in (("", "hash_grid"), ("_backward", "hash_grid"), ("_backward_backward", "second_order")):
    triton.implement(f"triton_hash_grid{_name}", _module, _name.strip("_") or "value")
for _name, _module in (("jacobian", "hash_grid"), ("jacobian_backward", "second_order")):
    triton.implement(f"triton_hash_grid_{_name}", _module, _name)


def _settings(geometry: GridGeometry, interpolation: str, active_levels: int) -> tuple:
    scales, layout = geometry.flat
    outside, kind = OUTSIDE.index(geometry.outside), INTERPOLATIONS.index(interpolation)
    deterministic = torch.are_deterministic_algorithms_enabled()
    return (scales, geometry.shift, layout, geometry.ceil_corner, outside, kind, active_levels, deterministic)


def prepare_lookup(
    x: Tensor, table: Tensor, geometry: GridGeometry, interpolation: str, max_level: int | float | Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple]:
    """Tensors and settings as the operators take them."""
    compute = torch.float64 if torch.float64 in (x.dtype, table.dtype) else torch.float32
    count = count_levels(max_level, geometry.n_levels, x.shape[:-1], compute)
    per_point = isinstance(count, Tensor)
    tensors = (x.to(compute).reshape(-1, geometry.dims), table, count.reshape(-1) if per_point else None)
    return tensors, _settings(geometry, interpolation, geometry.n_levels if per_point else count)


# ---- function --------------------------------------------------------------------------------------------------------


def hash_grid(
    x: Tensor,
    table: Tensor,
    geometry: GridGeometry,
    *,
    interpolation: str = "linear",
    max_level: int | float | Tensor | None = None,
    backend: str | None = None,
    return_jacobian: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[l*F + k] = sum over the 2^D corners c around x at level l of weight_c(x) table[index_l(c), k].

    x [..., D] in [0, 1]; table [entries, F], the layout given by `geometry` -> [..., L*F] in the table's dtype, or
    autocast's where it is on. Exact definition: `camkernels.reference.hash_grid`.

    interpolation: "linear", "smoothstep" (3t^2 - 2t^3, continuous first derivative) or "nearest".
    max_level: an int n computes the first n levels; a float m in [0, 1] the levels l < m*L + 1e-3; a float Tensor
    [...] is m per point, which may be any number; NaN computes no level. Other levels give 0 and receive no gradient.
    backend: "cpu", "cuda", "triton", "reference"; None takes the best that can run.
    return_jacobian: also J [..., L*F, D] = dy/dx from the same pass, in x's dtype (at least float32), itself
    differentiable once: eikonal losses and normals need no second backward and compile with fullgraph=True.

    First and second derivatives in x and table. A coordinate outside [0, 1] follows geometry.outside; a point with a
    NaN coordinate gives NaN and touches no table entry. Coordinates are computed in float32 (float64 if given), sums in
    float32 (float64 for a float64 table).

    Raises ValueError for shapes, values and mixed devices, TypeError for dtypes, RuntimeError where a backend that was
    asked for cannot run.

    Source: Mueller et al., "Instant Neural Graphics Primitives with a Multiresolution Hash Encoding", 2022.

    >>> geometry = GridGeometry.build(2, n_levels=4, n_features_per_level=2, log2_hashmap_size=12)
    >>> y = hash_grid(torch.rand(100, 2), torch.randn(geometry.n_entries, 2), geometry)
    >>> y.shape
    torch.Size([100, 8])
    """
    check_hash_grid(x, table, geometry, interpolation, max_level)
    check_flag("hash_grid", "return_jacobian", return_jacobian)
    chosen = choose(Call("hash_grid", x.device.type, x.device.index), backend)
    if chosen == "reference":
        options = {"interpolation": interpolation, "max_level": max_level, "return_jacobian": return_jacobian}
        result = reference.hash_grid(x, table, geometry, **options)
    else:
        tensors, settings = prepare_lookup(x, table, geometry, interpolation, max_level)
        value, jacobian_too = _TRITON if chosen == "triton" else _COMPILED
        result = (jacobian_too if return_jacobian else value)(*tensors, settings=settings)
    y, *jacobian = result if return_jacobian else (result,)
    y = round_to_autocast(y).reshape(*x.shape[:-1], geometry.output_dim)
    return (y, jacobian[0].reshape(*y.shape, geometry.dims)) if return_jacobian else y


def check_hash_grid(x: Tensor, table: Tensor, geometry: GridGeometry, interpolation: str, max_level: Any) -> None:
    """Whether the arguments of a hash_grid fit together."""
    op = "hash_grid"
    _check_geometry(op, geometry)
    check_floating(op, "x", x)
    check_floating(op, "table", table)
    check_shape(op, "x", x, ["...", geometry.dims], f"the geometry has dims={geometry.dims}")
    rows = [geometry.n_entries, geometry.n_features_per_level]
    check_shape(op, "table", table, rows, "the geometry asks for [n_entries, n_features_per_level]")
    check_same_device(op, x=x, table=table, max_level=max_level if isinstance(max_level, Tensor) else None)
    check_choice(op, "interpolation", interpolation, INTERPOLATIONS)


def _check_geometry(op: str, geometry: Any) -> None:
    if not isinstance(geometry, GridGeometry):
        raise TypeError(f"{op}: geometry must be a GridGeometry, got {type(geometry).__name__}; see GridGeometry.build")


def _check_replacement(geometry: Any, sizes: dict[str, Any]) -> GridGeometry:
    """The geometry given to HashGrid in place of sizes, which must then be at their defaults."""
    _check_geometry("HashGrid", geometry)
    defaults = inspect.signature(HashGrid.__init__).parameters
    given = [f"{name}={value!r}" for name, value in sizes.items() if value != defaults[name].default]
    if given:
        raise ValueError(f"HashGrid: geometry replaces the size arguments; got {', '.join(given)} too, leave one out")
    return geometry


# ---- layer -----------------------------------------------------------------------------------------------------------


class HashGrid(KeepsGeometry):
    """Trainable multi-resolution hash grid: x [..., dims] in [0, 1] -> [..., n_levels * n_features_per_level].

    Level l has resolution base_resolution * per_level_scale^l; give per_level_scale, or finest_resolution (2048 if
    neither), or a `geometry` (`GridGeometry.build`, with more options) in place of all size arguments. A level holds at
    most 2^log2_hashmap_size rows. The parameter is `table` [entries, n_features_per_level], drawn from
    U(-init_scale, init_scale) with torch's generator. A state_dict also holds the geometry as plain numbers: one of
    another geometry is refused, one without (a bare table) is accepted.

    The other arguments, the options of forward, and the errors: `hash_grid`.

    >>> grid = HashGrid(dims=2, finest_resolution=512)
    >>> grid(torch.rand(100, 2)).shape, grid.output_dim
    (torch.Size([100, 32]), 32)
    """

    def __init__(
        self,
        dims: int = 3,
        n_levels: int = 16,
        n_features_per_level: int = 2,
        log2_hashmap_size: int = 19,
        base_resolution: int = 16,
        per_level_scale: float | None = None,
        finest_resolution: float | None = None,
        *,
        geometry: GridGeometry | None = None,
        convention: str = "tcnn",
        kind: str = "hash",
        align_corners: bool = False,
        outside: str = "clamp",
        interpolation: str = "linear",
        init_scale: float = 1e-4,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        check_choice("HashGrid", "interpolation", interpolation, INTERPOLATIONS)
        check_choice("HashGrid", "backend", backend, (None, *BACKENDS))
        check_dtype("HashGrid", "dtype", dtype)
        check_number("HashGrid", "init_scale", init_scale, least=0.0)
        sizes = {
            "dims": dims,
            "n_levels": n_levels,
            "n_features_per_level": n_features_per_level,
            "log2_hashmap_size": log2_hashmap_size,
            "base_resolution": base_resolution,
            "per_level_scale": per_level_scale,
            "finest_resolution": finest_resolution,
            "convention": convention,
            "kind": kind,
            "align_corners": align_corners,
            "outside": outside,
        }
        self.geometry = GridGeometry.build(**sizes) if geometry is None else _check_replacement(geometry, sizes)
        self.interpolation = interpolation
        self.init_scale = init_scale
        self.backend = backend
        shape = (self.geometry.n_entries, self.geometry.n_features_per_level)
        self.table = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.reset_parameters()

    @property
    def output_dim(self) -> int:
        return self.geometry.output_dim

    def reset_parameters(self) -> None:
        """Draws the table anew from U(-init_scale, init_scale)."""
        nn.init.uniform_(self.table, -self.init_scale, self.init_scale)

    def forward(self, x: Tensor, max_level: int | float | Tensor | None = None) -> Tensor:
        """x [..., dims] -> [..., output_dim]; max_level as in `hash_grid`."""
        return hash_grid(
            x,
            self.table,
            self.geometry,
            interpolation=self.interpolation,
            max_level=max_level,
            backend=self.backend,
        )

    def get_extra_state(self) -> dict[str, Any]:
        return self.geometry.to_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        given = GridGeometry.from_dict(state)
        if given != self.geometry:
            raise ValueError(
                f"HashGrid: the state_dict is of another geometry: {given}, this layer has {self.geometry}; build the "
                "layer with geometry=GridGeometry.from_dict(state_dict['_extra_state'])"
            )

    def extra_repr(self) -> str:
        return f"{self.geometry}, interpolation={self.interpolation!r}, dtype={self.table.dtype}"
