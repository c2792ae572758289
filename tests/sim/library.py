# SPDX-License-Identifier: MIT
"""A built simulated library in use: schedules, architectures, counters, sentences, runs under AddressSanitizer."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import build, toolkit

SCHEDULES = ("forward", "reverse", "random:7")
COUNTERS = ("launches", "blocks", "threads", "switches", "barriers", "warp_operations", "atomics", "vector_reductions")
COUNTERS += (
    "asynchronous_copies",
    "matrix_products",
    "matrix_loads",
    "loads",
    "bytes_loaded",
    "sectors_loaded",
    "stores",
    "bytes_stored",
)


class SimulationError(RuntimeError):
    """What the simulator found wrong with a kernel: "file:line: sentence [block, thread] (launched at file:line)"."""


class Library:
    """A library made by `build.build`.

    With glue, loading it registers the operators (`torch.ops.<namespace>`); their faults arrive as RuntimeError.
    Without, `call(name, *arguments)` reaches its extern "C" entry points; arguments are ctypes values, ints, or things
    with a `data_ptr()`, and faults arrive as SimulationError.
    """

    def __init__(self, path: Path, operators: bool = False) -> None:
        self.path = path
        if operators:
            import torch

            torch.ops.load_library(str(path))
        self.handle = ctypes.CDLL(str(path))
        self.handle.camk_sim_last_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: Any) -> None:
        if getattr(self.handle, name)(*map(_argument, arguments)):
            raise SimulationError(self.handle.camk_sim_last_error().decode())

    def set_schedule(self, schedule: str | None) -> None:
        """ "forward", "reverse", "random:SEED", or None for what the environment variable CAMK_SIM_SCHEDULE says."""
        if self.handle.camk_sim_schedule(schedule.encode() if schedule is not None else None):
            raise ValueError(self.handle.camk_sim_last_error().decode())

    @contextmanager
    def schedule(self, schedule: str) -> Iterator[None]:
        self.set_schedule(schedule)
        try:
            yield
        finally:
            self.set_schedule(None)

    @contextmanager
    def architecture(self, sm: int) -> Iterator[None]:
        """Simulates sm_80 or sm_90; 90 outside of this."""
        if self.handle.camk_sim_architecture(sm):
            raise ValueError(self.handle.camk_sim_last_error().decode())
        try:
            yield
        finally:
            self.handle.camk_sim_architecture(90)

    def counters(self) -> dict[str, int]:
        """What was executed since the last call: blocks, barriers, atomics, ... (a vector reduction counts as one);
        loads, stores and their bytes are those of the functions of device.cuh. sectors_loaded: of 32 bytes, without
        those that the same thread loaded from shortly before."""
        values = (ctypes.c_uint64 * 64)()
        count = self.handle.camk_sim_statistics(values)
        return dict(zip(COUNTERS, values[:count], strict=True))

    def write_coverage(self) -> None:
        self.handle.camk_sim_write_coverage()


def _argument(value: Any) -> Any:
    if hasattr(value, "data_ptr"):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)  # integer arguments of up to 64 bits share a register on the machines we run on
    return value


def load(recipe: build.Recipe) -> Library:
    """Builds and loads."""
    return Library(build.build(recipe), operators=bool(recipe.glue))


def why_no_asan() -> str | None:
    """A sentence for a skip message, or None where libraries can run under AddressSanitizer."""
    return None if _asan_run_time() else "this g++ has no AddressSanitizer run time (libasan)"


def _asan_run_time() -> Path | None:
    return _compiler_library("libasan.so")


def _compiler_library(name: str) -> Path | None:
    compiler = toolkit.compiler()
    if compiler is None:
        return None
    said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return Path(said) if Path(said).is_absolute() and Path(said).exists() else None


def run_under_asan(
    code: str, *arguments: str, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python `code` in a process of its own with AddressSanitizer preloaded; `tests` is on its path, so it can
    `from sim import build, library`. A finding ends that process: look for "AddressSanitizer" in stderr."""
    folders = [str(build.SIM.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The C++ run time too: AddressSanitizer looks for it when the process starts, and Python itself does not need it.
    preload = (_asan_run_time(), _compiler_library("libstdc++.so"))
    settings = {
        **os.environ,
        "LD_PRELOAD": " ".join(map(str, filter(None, preload))),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:abort_on_error=0",
        "PYTHONPATH": os.pathsep.join(folders),
        "PYTHONMALLOC": "malloc",  # so that overruns of Python-made buffers are seen too
        **environment,
    }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=timeout)
