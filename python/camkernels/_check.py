# SPDX-License-Identifier: MIT
"""Every op on every backend of this machine against its definition: `python -m camkernels check`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

import camkernels

from . import optim, reference
from ._backends import BACKENDS
from ._info import home_of, reason_against
from ._neighbor_fallbacks import search_all
from .neighbors import NeighborIndex, search_method
from .testing import CASES, PAIRED, Case, assert_close, bfloat16, check, has_jacobian, tf32, tolerance

SHOWN = 3  # failures of one line that are spelled out
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ---- ops without derivatives -----------------------------------------------------------------------------------------


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def search_methods(backend: str) -> list[str]:
    """How `nearest` can search on a backend, but for all distances, which the others are compared with."""
    found = [search_method(home_of(backend))]
    if backend == "cpu" and find_spec("scipy"):
        found.append("cKDTree")
    return [method for method in dict.fromkeys(found) if method != "exhaustive"]


@dataclass(frozen=True)
class Search:
    """`nearest` among centers of which some are alike, by every method."""

    dims: int

    def check(self, backend: str, dtype: torch.dtype) -> None:
        """AssertionError where rows or distances are not those of a search through all of them."""
        centers = _drawn(300, self.dims, seed=0).to(dtype)
        centers[200:] = centers[:100]
        x = torch.cat([2 * _drawn(100, self.dims, seed=1).to(dtype) - 0.5, centers[:50]])
        for method in search_methods(backend):
            index = NeighborIndex(centers.to(home_of(backend)))
            index.method = method
            for k in (1, 8, len(centers)):
                rows, squares = index.search(x.to(home_of(backend)), k)
                wanted_rows, wanted_squares = search_all(centers.double(), x.double(), k)
                differ = (rows.cpu() != wanted_rows) | (squares.cpu() != wanted_squares.to(squares.dtype))
                assert not differ.any(), f"{method}: {int(differ.any(-1).sum())} of {len(x)} points differ for k={k}"


@dataclass(frozen=True)
class Step:
    """A step of `SparseRowAdam` from the middle of a run; listed: its gradient lists rows."""

    listed: bool

    def check(self, backend: str, dtype: torch.dtype) -> None:
        """AssertionError where values, moments or counts of steps are not those of the definition."""
        like = {"device": home_of(backend), "dtype": torch.promote_types(dtype, torch.float32)}
        counts = (5 * _drawn(101, seed=0)).int().to(like["device"])
        values, first, second, gradient = (_drawn(101, 5, seed=seed).to(**like) for seed in range(1, 5))
        gradient[::3] = 0
        rows = torch.arange(0, 101, 2, device=like["device"]) if self.listed else None
        gradient = (gradient if rows is None else gradient[rows]).to(dtype)
        state = {"values": values.to(dtype), "exp_avg": first, "exp_avg_sq": second, "step": counts}
        ours, expected = ({name: t.clone() for name, t in state.items()} for _ in range(2))
        lr, betas, eps = 0.01, (0.9, 0.99), 1e-8
        corrections = optim._corrections(betas, like["dtype"], torch.device(like["device"]))
        optim._STEP(*ours.values(), gradient, rows, corrections, lr, *betas, eps)
        reference.sparse_row_adam(*expected.values(), gradient, rows, lr=lr, betas=betas, eps=eps)
        for name, wanted in expected.items():
            rtol, atol = (0, 0) if name == "step" else tolerance(wanted.dtype, "value")
            assert_close(ours[name], wanted, rtol=rtol, atol=atol, name=name)


WITHOUT_DERIVATIVES = {
    "nearest": tuple(Search(dims) for dims in (1, 2, 3, 4)),
    "sparse_row_adam": (Step(listed=False), Step(listed=True)),
}
Ops = Mapping[str, tuple[Case | Search | Step, ...]]


# ---- all of them -----------------------------------------------------------------------------------------------------


def check_backends(ops: Ops = CASES | PAIRED | WITHOUT_DERIVATIVES) -> int:
    """Compares values, Jacobians, gradients and second derivatives over the case registry, and the results of the ops
    that have no derivatives; 0 if all agree, else 1.

    Without TF32 and bfloat16, which some environments allow."""
    with tf32(False), bfloat16(False):
        return _check_all(ops)


def _reason(backend: str, op: str) -> str | None:
    """Why there is nothing to compare; the CPU may search without kernels."""
    return None if (backend, op) == ("cpu", "nearest") and search_methods("cpu") else reason_against(backend, op)


def _check_all(ops: Ops) -> int:
    failed = compared = 0
    for op, cases in ops.items():
        for backend in BACKENDS:
            if backend == "reference":
                continue
            reason = _reason(backend, op)
            if reason is not None:
                print(f"{op:22} {backend:8} not here: {reason}")
                continue
            for dtype in DTYPES:
                failures, seconds = _compare(op, backend, dtype, cases)
                compared, failed = compared + len(cases), failed + len(failures)
                verdict = f"{len(failures)} of {len(cases)} cases DIFFER" if failures else f"{len(cases)} cases agree"
                print(
                    f"{op:22} {backend:8} {str(dtype).removeprefix('torch.'):9} {verdict}, {seconds:.1f} s", flush=True
                )
                for failure in failures[:SHOWN]:
                    print(f"    {failure}")
    print(_verdict(compared, failed))
    return 1 if failed else 0


def _verdict(compared: int, failed: int) -> str:
    if failed:
        return f"{failed} of {compared} comparisons failed: do not trust the backends above; please report this output"
    if not compared:
        return "nothing to compare: no compiled backend can run here, the reference computes everything"
    return f"all {compared} comparisons agree"


def _compare(op: str, backend: str, dtype: torch.dtype, cases: tuple) -> tuple[list[str], float]:
    """What differs, in a sentence each, and the seconds it took."""
    failures, start = [], time.monotonic()
    for case in cases:
        try:
            if isinstance(case, Case):
                _check_case(case, op, backend, dtype)
            else:
                case.check(backend, dtype)
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            failures.append(f"{case}: {type(error).__name__}: {error}")
    return failures, time.monotonic() - start


def _check_case(case: Case, op: str, backend: str, dtype: torch.dtype) -> None:
    """`check` of a case, with all that the op and the dtype have."""
    function, definition = partial(getattr(camkernels, op), backend=backend), getattr(reference, op)
    passes = [{"order": 2 if dtype in (torch.float64, torch.float32) else 1}]
    if has_jacobian(op):
        passes.append({"order": 1, "jacobian": True})
    for options in passes:
        check(case, function, definition, dtype=dtype, device=home_of(backend), **options)
