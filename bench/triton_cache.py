# SPDX-License-Identifier: MIT
"""Compiles what the tests need of Triton into its cache, in several processes: `python -m bench.triton_cache`.

Triton compiles a kernel when it is first launched, one at a time: the case registry takes a quarter of an hour so, and
tests that find the cache filled take a minute. Results are thrown away, the tests look at them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

import camkernels
from camkernels import _gpu, _ops, testing

from . import machine

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PASSES = ({"order": 1}, {"order": 0, "jacobian": True})
PROCESSES = 8  # each holds some hundred MB of GPU memory


def ops() -> list[str]:
    """Those that have Triton kernels."""
    return [op for op in testing.CASES if _ops.is_declared(f"triton_{op}")]


def run_share(share: int, shares: int, function: Callable[..., Any] | None = None, device: str = "cuda") -> int:
    """Runs every `shares`-th call of the registry on Triton, whatever comes out; how many."""
    calls = [(op, case, dtype) for dtype in DTYPES for op in ops() for case in testing.cases(op)]
    mine = calls[share::shares]
    for op, case, dtype in mine:
        call = case.make(dtype, device)
        for options in PASSES:
            with contextlib.suppress(Exception):  # the tests tell of it
                testing.evaluate(
                    function or functools.partial(getattr(camkernels, op), backend="triton"), call, **options
                )
    return len(mine)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.triton_cache", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=min(PROCESSES, machine.cores()))
    count = parser.parse_args(arguments).processes
    if (reason := _gpu.no_gpu()) is not None:
        print(f"bench.triton_cache: {reason}", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        done = sum(pool.map(run_share, range(count), [count] * count))
    print(f"{done} calls in {count} processes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
