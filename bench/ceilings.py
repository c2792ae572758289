# SPDX-License-Identifier: MIT
"""What the machine can do at most, measured beside every case: `python -m bench.ceilings [--threads N]`.

A C++ file of a page is compiled into build/bench (or the temporary directory) with the compiler that $CXX names and
called through ctypes; without a compiler, PyTorch's own operations give an estimate from below, and a note says so.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import ROOT
from .case import Floor

SOURCE = Path(__file__).with_name("ceilings.cpp")
HEADERS = sorted((ROOT / "csrc" / "cpu").glob("*.h"))  # the matrix unit's instructions, and what they include
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=fast", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}"]
ISA_FLAGS = {"AVX512": ["-mavx512f", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
LOOKUP_BYTES = (1 << 16, 1 << 19, 1 << 22, 1 << 26)  # tables of 64 KB, 512 KB, 4 MB (one level of 2^19 pairs), 64 MB
LOOKUPS, COPY_BYTES = 1 << 20, 1 << 26
CALIBRATION_S = 0.02
REPEATS = 5


def _cache_folder() -> Path:
    for folder in (ROOT / "build" / "bench", Path(tempfile.gettempdir()) / "camkernels-bench"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp())


@functools.cache
def load_library() -> tuple[ctypes.CDLL | None, str | None]:
    """(the compiled ceilings, None) or (None, why there are none)."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), *FLAGS]
    capability = torch.backends.cpu.get_cpu_capability()  # less than the processor's where the user says so
    command += ISA_FLAGS.get(capability, [])
    command += ["-mavx512bf16"] * (capability == "AVX512" and torch.cpu._is_avx512_bf16_supported())
    text = "".join(path.read_text() for path in (SOURCE, *HEADERS))
    key = hashlib.sha256((" ".join(command) + text).encode()).hexdigest()[:12]
    target = _cache_folder() / f"ceilings-{key}.so"
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}")
        try:
            subprocess.run([*command, str(SOURCE), "-o", str(part)], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return None, f"ceilings are estimates by PyTorch operations: {command[0]} did not compile them ({error})"
        part.replace(target)
    library = ctypes.CDLL(str(target))
    library.ceiling_fma.restype = ctypes.c_double
    library.ceiling_fma.argtypes = [ctypes.c_long, ctypes.c_void_p]
    if hasattr(library, "ceiling_bfloat16"):
        library.ceiling_bfloat16.restype = ctypes.c_double
        library.ceiling_bfloat16.argtypes = [ctypes.c_long, ctypes.c_void_p]
    library.ceiling_lookups.restype = ctypes.c_uint64
    library.ceiling_lookups.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    library.ceiling_copy.restype = None
    library.ceiling_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
    return library, None


def _rate(work: Callable[[int], float], threads: int, repeats: int = REPEATS) -> float:
    """Best work per second of all threads, work(thread) -> amount; ctypes and PyTorch release the interpreter lock."""
    clock = time.process_time if threads == 1 else time.perf_counter
    if threads == 1:

        def run() -> float:
            return work(0)
    else:
        pool = ThreadPoolExecutor(threads)

        def run() -> float:
            return sum(pool.map(work, range(threads)))

    best = 0.0
    for _ in range(repeats):
        start = clock()
        amount = run()
        best = max(best, amount / (clock() - start))
    return best


def _fma(library: ctypes.CDLL | None, iterations: int, name: str = "ceiling_fma") -> float:
    if library is not None:
        sink = ctypes.c_float()
        return getattr(library, name)(iterations, ctypes.addressof(sink))
    size = 256
    a = torch.ones(size, size)
    count = max(1, iterations * 192 // (2 * size**3))
    for _ in range(count):
        torch.mm(a, a)
    return 2.0 * size**3 * count


def _lookups(library: ctypes.CDLL | None, table: torch.Tensor, index: torch.Tensor, ahead: int) -> float:
    rounds = 8
    for _ in range(rounds):
        if library is None:
            table.index_select(0, index)
        else:
            library.ceiling_lookups(table.data_ptr(), index.data_ptr(), index.numel(), ahead)
    return float(rounds * index.numel())


def _copy(library: ctypes.CDLL | None, to: torch.Tensor, source: torch.Tensor) -> float:
    if library is None:
        to.copy_(source)
    else:
        library.ceiling_copy(to.data_ptr(), source.data_ptr(), source.numel())
    return 2.0 * source.numel()


class Calibration:
    """20 ms of multiply-adds: how fast this core is right now, by the wall clock, so that sharing it shows."""

    def __init__(self, seconds: float = CALIBRATION_S):
        self.library, _ = load_library()
        self.iterations = 1 << 16
        flops = _fma(self.library, self.iterations)
        rate = _rate(lambda _: _fma(self.library, self.iterations), 1, 3)
        self.iterations = max(1, int(self.iterations * seconds * rate / flops))

    def __call__(self) -> float:
        """GF/s."""
        start = time.perf_counter()
        return _fma(self.library, self.iterations) / (time.perf_counter() - start) / 1e9


def measure(threads: int = 1) -> dict:
    """{fma_gflops, product_gflops {dtype of dot products that the processor has: rate}, copy_gbs (bytes read plus bytes
    written), lookups {table bytes: per second}, threads, note}."""
    library, note = load_library()
    lookups = {}
    for size in LOOKUP_BYTES:
        table = torch.ones(size // 8, 2)
        index = torch.randint(size // 8, (LOOKUPS,), dtype=torch.int32)
        lookups[str(size)] = max(
            _rate(lambda _, a=ahead, t=table, i=index: _lookups(library, t, i, a), threads, 3) for ahead in (0, 32)
        )
    source = torch.ones(COPY_BYTES, dtype=torch.uint8)
    copies = [torch.zeros_like(source) for _ in range(threads)]
    copy = _rate(lambda thread: _copy(library, copies[thread], source), threads)
    fma = _rate(lambda _: _fma(library, 1 << 20), threads)
    products = {}
    if hasattr(library, "ceiling_bfloat16"):
        products["bfloat16"] = _rate(lambda _: _fma(library, 1 << 20, "ceiling_bfloat16"), threads) / 1e9
    return {
        "fma_gflops": fma / 1e9,
        "product_gflops": products,
        "copy_gbs": copy / 1e9,
        "lookups": lookups,
        "threads": threads,
        "note": note,
    }


def floor_ns(floor: Floor, ceilings: dict) -> dict[str, float]:
    """ns per point that each part of a floor takes at the ceilings; the largest is the floor of the whole.

    A lookup goes at the rate of the smallest measured table that holds the memory it falls in; matrix products go at
    the rate of their dtype where there is one.
    """
    sizes = sorted(map(int, ceilings["lookups"]))
    total = 0.0
    for size, count in floor.lookups:
        fitting = next((s for s in sizes if s >= size), sizes[-1])
        total += count / ceilings["lookups"][str(fitting)] * 1e9
    rate = ceilings.get("product_gflops", {}).get(floor.product, ceilings["fma_gflops"])
    return {
        "lookups": total,
        "memory": floor.memory / ceilings["copy_gbs"],
        "arithmetic": floor.flops / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    print(json.dumps(measure(parser.parse_args().threads), indent=2))


if __name__ == "__main__":
    main()
