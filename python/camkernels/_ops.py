# SPDX-License-Identifier: MIT
"""Loads the compiled libraries and declares operators. A library that cannot be loaded is a reason, not an error."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

NAMESPACE = "camkernels"
library = torch.library.Library(NAMESPACE, "DEF")
operators = getattr(torch.ops, NAMESPACE)

FOLDER = Path(__file__).parent
_CAPABILITY = {"AVX512": ("avx512", "avx2", "baseline"), "AVX2": ("avx2", "baseline")}


def usable_isas() -> tuple[str, ...]:
    """Instruction sets of this machine for which CPU kernels can be built, the best first."""
    return _CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), ("baseline",))


def _load(path: Path) -> str | None:
    """Loads a library of operators; the reason if that fails."""
    if not path.exists():
        how = "CAMKERNELS_CUDA=1 in the environment and nvcc" if path.stem == "_cuda" else "a C++ compiler"
        return f"{path.name} was not built (pip install --no-build-isolation . with {how} builds it)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    return None


def _load_cpu() -> tuple[str | None, str | None]:
    """(instruction set of the loaded CPU library, why there is none)."""
    forced = os.environ.get("CAMKERNELS_CPU_ISA")
    if forced and forced not in usable_isas():
        return None, f"CAMKERNELS_CPU_ISA={forced} is not one of {', '.join(usable_isas())}, which this machine runs"
    reasons = []
    for isa in [forced] if forced else usable_isas():
        reason = _load(FOLDER / f"_cpu_{isa}.so")
        if reason is None:
            return isa, None
        reasons.append(reason)
    return None, "; ".join(reasons)


cpu_isa, cpu_missing = _load_cpu()
cuda_missing = _load(FOLDER / "_cuda.so") if platform.system() == "Linux" else "CUDA kernels are built for Linux only"


_kernels: dict[str, tuple[str, ...]] = {}  # per operator, the devices whose kernels were loaded with the package


# Of an operator that waits for the device, which a CUDA graph cannot record.
WAITS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def declare(schema: str, fake: Callable, tags: Sequence[torch.Tag] = ()) -> Callable:
    """Defines an operator by its schema, with a function that gives its outputs on meta tensors; returns it bound."""
    library.define(schema, tags=tags)
    name = schema.split("(")[0]
    _kernels[name] = ()
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    _kernels[name] = tuple(device for device in ("cpu", "cuda") if has_kernel(name, device))
    return getattr(operators, name).default


def is_declared(name: str) -> bool:
    """Whether there is an operator of this name, with kernels or without."""
    return name in _kernels


def has_kernel(name: str, device_type: str) -> bool:
    """Whether there is an operator of this name with a kernel for tensors on a type of device."""
    loaded = device_type in _kernels.get(name, ())
    if loaded or torch.compiler.is_compiling() or not is_declared(name):  # a trace cannot ask the dispatcher
        return loaded
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)
