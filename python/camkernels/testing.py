# SPDX-License-Identifier: MIT
"""Cases, tolerances and comparisons for checking an implementation of an op against its definition.

>>> import torch
>>> from camkernels import reference, testing
>>> for case in testing.cases("hash_grid")[:3]:
...     testing.check(case, reference.hash_grid, reference.hash_grid, dtype=torch.float32)

A new op adds a file to `_cases/` and its cases to CASES; tests run over the registry and need no change.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._cases import hash_grid as _hash_grid
from ._cases import hash_grid_mlp as _hash_grid_mlp
from ._cases import modulated_mlp as _mlp
from ._cases import radial_basis as _radial_basis
from ._cases.golden import Golden, golden_names, load_golden, load_json
from ._cases.hash_grid import face_distance, safe_points
from ._cases.pairwise import pairwise
from ._closeness import assert_close, describe, share_of, spread
from ._tolerances import TOLERANCES, bfloat16, tf32, tolerance
from .reference.hash_grid import FAR

__all__ = [
    "CASES",
    "TOLERANCES",
    "Call",
    "Case",
    "Golden",
    "assert_close",
    "assert_close_golden",
    "bfloat16",
    "cases",
    "check",
    "compare",
    "evaluate",
    "face_distance",
    "golden_call",
    "golden_names",
    "has_jacobian",
    "load_golden",
    "load_json",
    "pairwise",
    "safe_points",
    "spread",
    "tf32",
    "tolerance",
]

Function = Callable[..., Any]

# ---- registry --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """Arguments of one call of an op: tensors that may be differentiated, and the rest."""

    inputs: dict[str, Tensor]
    options: dict[str, Any]
    points: str = "x"  # the input that holds coordinates or features of points; the others are parameters
    beside: tuple[str, ...] = ()  # inputs and options that may have the axes of the points, too
    axes: int | None = None  # how many of the first axes of the points run over them; None: all but the last

    @property
    def leading(self) -> torch.Size:
        """Axes of the points."""
        return self.inputs[self.points].shape[: -1 if self.axes is None else self.axes]

    def arguments(self, inputs: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        """Keyword arguments of the op, with these inputs in place of its own; weights.0, weights.1 ... are a list."""
        grouped: dict[str, Any] = {}
        for name, tensor in (self.inputs if inputs is None else inputs).items():
            head, is_item, _ = name.partition(".")
            if is_item:
                grouped.setdefault(head, []).append(tensor)
            else:
                grouped[name] = tensor
        return grouped | self.options

    def run(self, function: Function, **extra: Any) -> Any:
        return function(**self.arguments(), **extra)


@dataclass(frozen=True)
class Case:
    """A named, reproducible call of an op. make(dtype, device, seed, points) -> Call; points: "mixed" | "safe".

    dtype is that of the parameters. "mixed" points lie anywhere, also on cell faces, outside and at NaN; "safe" points
    stay clear of everything at which a derivative jumps, for finite differences.
    """

    op: str
    name: str
    maker: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]] = field(repr=False, compare=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    coordinates: str = "x"  # the input that is Call.points
    beside: tuple[str, ...] = ()
    axes: int | None = None

    def make(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        points: str = "mixed",
    ) -> Call:
        inputs, options = self.maker(dict(self.options), dtype, device, seed, points)
        return Call(inputs, options, self.coordinates, self.beside, self.axes)

    def __str__(self) -> str:
        return self.name


def _cases(op: str, maker: Callable, named: dict[str, dict], **fields: Any) -> tuple[Case, ...]:
    return tuple(Case(op, name, maker, options, **fields) for name, options in named.items())


CASES: dict[str, tuple[Case, ...]] = {
    op: _cases(op, maker, named, **fields)
    for op, maker, named, fields in (
        ("hash_grid", _hash_grid.make, _hash_grid.case_options(), {"beside": ("max_level",)}),
        ("modulated_mlp", _mlp.make_mlp, _mlp.mlp_options(), {"beside": ("modulation",)}),
        (
            "modulate",
            _mlp.make_modulate,
            _mlp.modulate_options(),
            {"coordinates": "h", "beside": ("gamma", "beta"), "axes": 1},
        ),
        ("coordinate_modulation", _mlp.make_lookup, _mlp.lookup_options(), {"coordinates": "coords"}),
        ("radial_basis", _radial_basis.make, _radial_basis.case_options(), {"beside": ("neighbors",)}),
    )
}
# Of an op that is two in a row: beside the registry, whose tests are of each.
PAIRED: dict[str, tuple[Case, ...]] = {
    "hash_grid_mlp": _cases(
        "hash_grid_mlp", _hash_grid_mlp.make, _hash_grid_mlp.GRIDS, beside=("max_level", "modulation")
    ),
}
# What jumps at a cell face, where either side is right, and who knows the sides.
SIDED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "hash_grid": (_hash_grid, ("value", "jacobian", "grad.points")),
    "coordinate_modulation": (_mlp, ("grad.points",)),
}


def has_jacobian(op: str) -> bool:
    """Whether the op takes return_jacobian."""
    return "return_jacobian" in inspect.signature(getattr(reference, op)).parameters


def cases(op: str, **options: Any) -> list[Case]:
    """Cases of an op, optionally only those with the given option values: cases("hash_grid", dims=3, kind="hash")."""
    return [case for case in CASES[op] if all(case.options.get(name) == value for name, value in options.items())]


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(
    function: Function,
    call: Call,
    *,
    order: int = 1,
    jacobian: bool = False,
    seed: int = 0,
    quiet: Tensor | None = None,
    rounded: torch.dtype = torch.float64,
    **extra: Any,
) -> dict[str, Tensor]:
    """Results of a call by name, with cotangents drawn from `seed`:

    "value"; "jacobian" on demand; order >= 1: "grad.NAME" of <ct, value> for every input; order 2: with random v_NAME,
    the gradients "second.ct" and "second.NAME" of sum_NAME <v_NAME, grad.NAME>. Rows where quiet [...] is True get
    cotangents 0, so that they add nothing to sums over points. Cotangents are numbers of the dtype `rounded`, at least.
    """
    inputs = {name: tensor.detach().requires_grad_(order > 0) for name, tensor in call.inputs.items()}
    result = function(**call.arguments(inputs), **({"return_jacobian": True} if jacobian else {}), **extra)
    value, found = result if jacobian else (result, None)
    out = {"value": value.detach()}
    if found is not None:
        out["jacobian"] = found.detach()
    if order == 0:
        return out
    generator = torch.Generator().manual_seed(seed + 1)
    ct = _cotangent(value, generator, quiet, rounded).requires_grad_(order > 1)
    grads = torch.autograd.grad(value, list(inputs.values()), ct, create_graph=order > 1, materialize_grads=True)
    out |= {f"grad.{name}": grad.detach() for name, grad in zip(inputs, grads, strict=True)}
    if order == 1:
        return out
    leading = call.inputs[call.points].shape[:-1]
    along = [_cotangent(g, generator, quiet if g.shape[:-1] == leading else None, rounded) for g in grads]
    total = sum((v * g).sum() for v, g in zip(along, grads, strict=True))
    second = torch.autograd.grad(total, [ct, *inputs.values()], allow_unused=True, materialize_grads=True)
    return out | {f"second.{name}": grad.detach() for name, grad in zip(["ct", *inputs], second, strict=True)}


def _cotangent(
    like: Tensor, generator: torch.Generator, quiet: Tensor | None, rounded: torch.dtype = torch.float64
) -> Tensor:
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64) * 2 - 1
    drawn = drawn.to(rounded).to(like.dtype).to(like.device)
    return (
        drawn if quiet is None else torch.where(quiet.reshape(*quiet.shape, *[1] * (like.ndim - quiet.ndim)), 0, drawn)
    )


def check(
    case: Case,
    function: Function,
    reference: Function,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    order: int = 1,
    jacobian: bool = False,
    seed: int = 0,
    max_flips: float = 0.02,
) -> None:
    """Compare `function` with `reference` on a case: value, Jacobian, gradients up to `order`; see `compare`.

    What ops without sides (SIDED) give in float32 is compared with the reference in float64.
    """
    call = case.make(dtype, device, seed)
    actual = evaluate(function, call, order=order, jacobian=jacobian, seed=seed)
    if dtype == torch.float32 and case.op not in SIDED:  # where neither rounding of float32 is the right one
        exact = replace(call, inputs={name: tensor.double() for name, tensor in call.inputs.items()})
        expected = evaluate(reference, exact, order=order, jacobian=jacobian, seed=seed, rounded=dtype)
        expected = {name: tensor.to(actual[name].dtype) for name, tensor in expected.items()}
    else:
        expected = evaluate(reference, call, order=order, jacobian=jacobian, seed=seed)
    compare(case, call, actual, expected, seed=seed, max_flips=max_flips)


def compare(
    case: Case,
    call: Call,
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    max_flips: float = 0.02,
    **products: bool,
) -> None:
    """Compare results of `evaluate` at the tolerances of the parameters' dtype, or `dtype`; products: see `tolerance`.

    Second derivatives at points that are not finite are undefined and not compared.
    Of the ops in SIDED, at points within rounding of a cell face a derivative in the points (or a nearest value) may be
    that of the other side; at most max(1, max_flips * points) points may differ so.
    """
    dtype = dtype or next(t.dtype for name, t in call.inputs.items() if name != call.points)
    for name, wanted in expected.items():
        quantity = "second" if name.startswith("second") else name
        if name.startswith("grad"):
            # of a pair, whose values in between are rounded to 16 bits, as that of the points themselves
            half = dtype if case.op in PAIRED else call.inputs[call.points].dtype
            stored_half = half in (torch.float16, torch.bfloat16)
            of_points = name == f"grad.{call.points}" and not stored_half
            quantity = "grad.points" if of_points else "grad.parameters"
        rtol, atol = tolerance(dtype, quantity, **products)
        got, label = actual[name], f"{case.op} {case.name} {dtype} {name}"
        if name == f"second.{call.points}":
            # autograd of the definition gives NaN there or, where the first derivative is constant, 0
            finite = (call.inputs[call.points].abs() <= FAR).all(-1, keepdim=True)
            got, wanted = (torch.where(finite, t, 0.0) for t in (got, wanted))
        family, jumps = SIDED.get(case.op, (None, ()))
        if quantity in jumps:
            value = expected.get("value", wanted)
            ct = _cotangent(value, torch.Generator().manual_seed(seed + 1), None)
            _assert_close_sided(call, family, quantity, got, wanted, rtol, atol, label, ct, max_flips)
        else:
            least = _hash_grid.term_sizes(call.options) if name == "second.table" else 0.0
            assert_close(got, wanted, rtol=rtol, atol=atol, name=label, least=least)


# ---- closeness -------------------------------------------------------------------------------------------------------


def _assert_close_sided(call, family, quantity, actual, expected, rtol, atol, label, ct, max_flips) -> None:
    """assert_close, except that points within rounding of a cell face may show the other side of it."""
    assert actual.shape == expected.shape, f"{label}: shape is {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{label}: dtype is {actual.dtype}, expected {expected.dtype}"
    n = math.prod(call.inputs[call.points].shape[:-1])
    got, wanted = actual.reshape(n, -1), expected.reshape(n, -1)
    share = share_of(got, wanted, rtol, atol)
    bad = (share > 1).any(-1)
    if not bad.any():
        return
    near, width = family.near_faces(call.inputs, call.options)
    limit = max(1, math.floor(max_flips * n))
    if (bad & ~near).any():
        raise AssertionError(describe(label, got, wanted, torch.where(near.unsqueeze(-1), 0.0, share)))
    if int(bad.sum()) > limit:
        raise AssertionError(f"{label}: {int(bad.sum())} of {n} points show the other side of a cell face, {limit} may")
    at = bad.nonzero().squeeze(-1)
    slack = rtol + 4 * float(width[at].max())
    s = spread(wanted)
    sides = family.sides(call.inputs, call.options, quantity, at, ct)
    fits = torch.stack([share_of(got[at], side, slack, atol, s) <= 1 for side in sides]).any(0)
    if not fits.all():
        share = torch.where(fits, 0.0, share[at])
        raise AssertionError(describe(f"{label} (neither side of a cell face)", got[at], wanted[at], share))


# ---- goldens ---------------------------------------------------------------------------------------------------------


def golden_call(golden: Golden, dtype: torch.dtype, device: torch.device | str = "cpu") -> Call:
    """The call which a fixture records, with inputs in `dtype`."""
    family = golden.name.split("_")[0]
    if family != "hashgrid":
        raise ValueError(f"golden_call: {golden.name} belongs to no family known here; known: hashgrid")
    inputs = {name: golden.tensor(key, dtype, device) for name, key in (("x", "in.x"), ("table", "p.table"))}
    return Call(inputs, _hash_grid.golden_options(golden))


def assert_close_golden(actual: Tensor, golden: Golden, key: str, dtype: torch.dtype) -> None:
    """`actual`, computed in `dtype`, against an array of a fixture at the tolerance the fixture states."""
    rtol, atol = golden.tolerance(dtype)
    expected = golden.tensor(key, torch.float64)
    assert actual.shape == expected.shape, f"{golden.name} {key}: shape is {actual.shape}, expected {expected.shape}"
    counted = torch.from_numpy(golden.counted(key))
    share = torch.where(counted, share_of(actual.cpu(), expected, rtol, atol), 0.0)
    if (share > 1).any():
        raise AssertionError(describe(f"{golden.name} {key}", actual, expected, share))
