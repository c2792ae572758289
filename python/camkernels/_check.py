# SPDX-License-Identifier: MIT
"""Every op on every backend of this machine against its definition: `python -m camkernels check`."""

from __future__ import annotations

import time
from functools import partial

import torch

import camkernels

from . import reference
from ._backends import BACKENDS
from ._info import home_of, reason_against
from .testing import CASES, PAIRED, Case, bfloat16, check, has_jacobian, tf32

SHOWN = 3  # failures of one line that are spelled out
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_backends(ops: dict[str, tuple[Case, ...]] = CASES | PAIRED) -> int:
    """Compares values, Jacobians, gradients and second derivatives over the case registry; 0 if all agree, else 1.

    Without TF32 and bfloat16, which some environments allow."""
    with tf32(False), bfloat16(False):
        return _check_all(ops)


def _check_all(ops: dict[str, tuple[Case, ...]]) -> int:
    failed = compared = 0
    for op, cases in ops.items():
        for backend in BACKENDS:
            if backend == "reference":
                continue
            reason = reason_against(backend, op)
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


def _compare(op: str, backend: str, dtype: torch.dtype, cases: tuple[Case, ...]) -> tuple[list[str], float]:
    """What differs, in a sentence each, and the seconds it took."""
    function, definition = partial(getattr(camkernels, op), backend=backend), getattr(reference, op)
    passes = [{"order": 2 if dtype in (torch.float64, torch.float32) else 1}]
    if has_jacobian(op):
        passes.append({"order": 1, "jacobian": True})
    failures, start = [], time.monotonic()
    for case in cases:
        try:
            for options in passes:
                check(case, function, definition, dtype=dtype, device=home_of(backend), **options)
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            failures.append(f"{case}: {type(error).__name__}: {error}")
    return failures, time.monotonic() - start
