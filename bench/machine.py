# SPDX-License-Identifier: MIT
"""Facts of the machine and of the process that every record carries."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import torch

import camkernels
from camkernels import _ops

from . import ROOT

REGIMES: dict[str, dict[str, str]] = {
    "default": {},
    # freed memory stays with the process, so that large blocks are not faulted in again by every call
    "tuned": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "MALLOC_TOP_PAD_": "268435456",
    },
}
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
VARIABLES += ("CAMKERNELS_RECOMPUTE",)


def environment(threads: int, regime: dict[str, str]) -> dict[str, str]:
    """Environment of a measuring process: what a regime sets and the thread count are nobody's but ours."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return kept | regime | counts | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": path}


def load() -> float | None:
    """One-minute load average; None where the system has none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes(device: str = "cpu") -> int | None:
    """Memory that can be taken without swapping, or is free on the GPU; None where unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def facts(device: str = "cpu") -> dict:
    """CPU model, instruction set, caches, versions, commit, load."""
    return {
        "cpu": _cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "camkernels_isa": _ops.cpu_isa,
        "caches": _caches(),
        "cores": cores(),
        "load": load(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "camkernels": camkernels.__version__,
        "commit": _commit(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _cpu_model() -> str:
    described = {}
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        described.setdefault(key.strip(), value.strip())
    name = described.get("model name") or platform.processor() or "unknown"
    if "cpu family" in described:
        name += f" (family {described['cpu family']}, model {described.get('model')})"
    return name


def _caches() -> dict[str, str]:
    """{"L1d": "32K", "L2": ...} of the first core."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ("".join(_lines(str(index / name))) for name in ("level", "type", "size"))
        if level and size:
            sizes[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return sizes


def _commit() -> str | None:
    """Short hash of the checkout, with a + if files differ from it; of the build where there is no checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        built = Path(camkernels.__file__).with_name("build.json")
        return json.loads(built.read_text()).get("commit") if built.exists() else None
