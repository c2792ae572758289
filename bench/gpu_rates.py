# SPDX-License-Identifier: MIT
"""What a GPU can do at most, and what decides how kernels should be written: `python -m bench.gpu_rates`.

    random reads    of 4, 8 and 16 bytes in 2 and 40 MiB: the forward pass of a hash grid cannot read faster
    sums            into random rows of 1, 2 and 4 float32, alone, and 8 or 64 in the same place: its table gradient
    products        of matrices, in float32 proper, in TF32 and in half precision: an MLP cannot compute faster
    sorting         2^20 keys: whether points should be sorted first
    calls           of one point, in Python and from a CUDA graph: what a small batch pays

Random reads, copies and products are PyTorch's own operations: bounds from below. Times come from `bench.timing`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import camkernels
from camkernels import _backends, _gpu

from . import timing

MIB = 1 << 20
READS = 1 << 22
POINTS = 1 << 20
COPY_BYTES = 256 * MIB
PRODUCTS, PRODUCT_SIZE = ("float32", "tf32", "bfloat16", "float16"), 8192
ROUNDS, WARM_UPS = 10, 2
LOOKUP_BYTES = (1 << 16, 1 << 19, 1 << 22, 40 * MIB)


@dataclass(frozen=True)
class Work:
    """Something to time: `amount` of `unit` is done by each call."""

    name: str
    unit: str
    amount: float
    run: Callable[[], Any]


def measure(works: list[Work], device: str, seconds: float) -> dict[str, dict]:
    """{name: {unit, per_second (quartiles), seconds (quartiles of a call)}}, all in turn in every round."""
    clock = timing.clock_for(0, device)
    tasks = []
    for work in works:
        start = 0.0
        for _ in range(WARM_UPS):
            start = clock()
            work.run()
        tasks.append(timing.Timed(work.name, work.run, always=True))
        tasks[-1].plan(clock() - start, ROUNDS, seconds, repeat=True)
    timing.interleave(tasks, ROUNDS, seconds, clock)
    found = {}
    for work, task in zip(works, tasks, strict=True):
        spent = task.seconds.values()
        rate = timing.quartiles(work.amount / s for s in spent)
        found[work.name] = {"unit": work.unit, "per_second": rate, "seconds": timing.quartiles(spent)}
    return found


# ---- memory and arithmetic -------------------------------------------------------------------------------------------


def random_reads(device: str, table_bytes: int, row_bytes: int, count: int = READS) -> Work:
    """Rows of a table, at random."""
    table = torch.ones(table_bytes // row_bytes, row_bytes // 4, device=device)
    index = torch.randint(len(table), (count,), device=device, dtype=torch.int32)
    into = torch.empty(count, row_bytes // 4, device=device)
    name = f"read {row_bytes} B in {table_bytes / MIB:g} MiB"
    return Work(name, "rows", count, lambda: torch.index_select(table, 0, index, out=into))


def copying(device: str, size: int = COPY_BYTES) -> Work:
    """Bytes read plus bytes written."""
    source, into = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return Work("copy", "bytes", 2 * size, lambda: into.copy_(source))


def product(device: str, kind: str, size: int = PRODUCT_SIZE) -> Work:
    """Multiplications and additions of a matrix product; kind: a dtype, or "tf32", which float32 is not."""
    a = torch.ones(size, size, device=device, dtype=getattr(torch, "float32" if kind == "tf32" else kind))
    into, precision = torch.empty_like(a), "high" if kind == "tf32" else "highest"

    def run() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            torch.mm(a, a, out=into)
        finally:
            torch.set_float32_matmul_precision(before)

    return Work(f"{kind} product", "flops", 2.0 * size**3, run)


def ceilings(device: str = "cuda", seconds: float = 1.0) -> dict:
    """As `bench.ceilings.measure`, of a GPU."""
    reads = {size: random_reads(device, size, 8) for size in LOOKUP_BYTES}
    products = {kind: product(device, kind) for kind in PRODUCTS}
    works = [copying(device), *products.values(), *reads.values()]
    found = {name: result["per_second"]["median"] for name, result in measure(works, device, seconds).items()}
    return {
        "fma_gflops": found["float32 product"] / 1e9,
        "product_gflops": {kind: found[work.name] / 1e9 for kind, work in products.items()},
        "copy_gbs": found["copy"] / 1e9,
        "lookups": {str(size): found[work.name] for size, work in reads.items()},
        "threads": 1,
        "note": "ceilings of the GPU are rates of PyTorch's mm, copy_ and index_select: bounds from below",
    }


# ---- sums ------------------------------------------------------------------------------------------------------------


def own_backends(device: str) -> list[str]:
    """The compiled backends that can compute on a device here."""
    call = _backends.Call("hash_grid", device)
    return [b for b in _backends.BACKENDS if b != "reference" and _backends.can_run(b, call) is None]


def table_sums(device: str, backend: str, features: int, together: int, points: int = POINTS) -> Work:
    """Table gradient of one fine hashed level in 3-D: 8 rows a point, `together` neighbouring points in one place."""
    geometry = camkernels.GridGeometry.build(3, 1, features, 19, base_resolution=512)
    x = torch.rand(points // together, 3, device=device).repeat_interleave(together, 0)
    table = torch.zeros(geometry.n_entries, features, device=device, requires_grad=True)
    y = camkernels.hash_grid(x, table, geometry, backend=backend)
    ct = torch.ones_like(y)
    name = f"{backend}: add {features} x float32, {together} together"
    return Work(name, "rows", 8.0 * len(x), lambda: torch.autograd.grad(y, table, ct, retain_graph=True))


def scalar_sums(device: str, points: int = POINTS) -> Work:
    """PyTorch's atomic additions of single float32."""
    into, values = torch.zeros(1 << 19, device=device), torch.ones(points * 8, device=device)
    index = torch.randint(len(into), (len(values),), device=device)
    return Work("index_add_ of 1 x float32", "rows", len(values), lambda: into.index_add_(0, index, values))


def sorting(device: str, count: int = POINTS) -> Work:
    keys = torch.randint(1 << 30, (count,), device=device, dtype=torch.int32)
    return Work("sort int32 keys", "keys", count, lambda: torch.sort(keys))


# ---- calls -----------------------------------------------------------------------------------------------------------


def calls(device: str) -> Iterator[Work]:
    """Calls for one point: plain PyTorch, each backend from Python, and replayed from a CUDA graph."""
    x = torch.rand(1, 3, device=device)
    yield Work("call of x + 1", "calls", 1, lambda: x + 1)
    geometry = camkernels.GridGeometry.build(3, 16, 2, 14, finest_resolution=2048)
    table = torch.zeros(geometry.n_entries, 2, device=device)
    for backend in own_backends(device):

        def call(backend: str = backend) -> Tensor:
            return camkernels.hash_grid(x, table, geometry, backend=backend)

        yield Work(f"{backend}: call of hash_grid", "calls", 1, call)
        if device == "cuda":
            for _ in range(WARM_UPS):
                call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            yield Work(f"{backend}: replay of hash_grid", "calls", 1, graph.replay)


def all_works(device: str = "cuda", shrink: int = 1) -> Iterator[Work]:
    """Everything the command measures; `shrink` divides sizes, for tests."""
    for size in (2 * MIB, 40 * MIB):
        for row in (4, 8, 16):
            yield random_reads(device, size // shrink, row, READS // shrink)
    yield copying(device, COPY_BYTES // shrink)
    for kind in PRODUCTS:
        yield product(device, kind, max(1, PRODUCT_SIZE // shrink))
    yield scalar_sums(device, POINTS // shrink)
    for backend in own_backends(device):
        for features in (1, 2, 4):
            for together in (1, 8, 64):
                yield table_sums(device, backend, features, together, POINTS // shrink)
    yield sorting(device, POINTS // shrink)
    yield from calls(device)


def table(rates: dict[str, dict]) -> str:
    lines = [f"{'what':44} {'per second':>12} unit   {'us a call':>10}"]
    for name, found in rates.items():
        rate, spent = found["per_second"]["median"], found["seconds"]["median"] * 1e6
        lines.append(f"{name:44} {rate:12.3e} {found['unit']:6} {spent:10.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_rates", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="time for the rounds (15)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the rates as JSON")
    options = parser.parse_args(arguments)
    if (reason := _gpu.no_gpu()) is not None:
        print(f"bench.gpu_rates: {reason}", file=sys.stderr)
        return 2
    rates = measure(list(all_works()), "cuda", options.seconds)
    print(table(rates))
    if options.out is not None:
        options.out.write_text(json.dumps(rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
