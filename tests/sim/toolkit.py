# SPDX-License-Identifier: MIT
"""Finds what the simulator and the compile checks need of CUDA: headers (no GPU, no driver), and nvcc where present."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HEADERS = ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h")

Candidate = tuple[tuple[Path, ...], "Path | None", str]  # header folders, nvcc, origin


@dataclass(frozen=True)
class Toolkit:
    """Header folders (searched in order), nvcc if found, and how they were found."""

    includes: tuple[Path, ...]
    nvcc: Path | None
    origin: str


def _complete(includes: tuple[Path, ...]) -> bool:
    return all(any((folder / header).is_file() for folder in includes) for header in HEADERS)


def _home_of_nvcc(nvcc: str) -> Path | None:
    """The toolkit folder nvcc itself reports: the entry on PATH may be a link or a wrapper script."""
    command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    try:
        log = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    except OSError:
        return None
    tops = (line.split("=", 1)[1] for line in log.splitlines() if line.startswith("#$ TOP="))
    return next((Path(top).resolve() for top in tops), None)


def _candidates(environment: Mapping[str, str], site_packages: Path) -> Iterator[Candidate]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            home = Path(environment[name])
            yield (home / "include",), home / "bin" / "nvcc", name
    nvcc = shutil.which("nvcc", path=environment.get("PATH", ""))
    if nvcc and (home := _home_of_nvcc(nvcc)):
        yield (home / "include",), Path(nvcc), "nvcc on PATH"
    usual = Path(environment.get("CAMKERNELS_USUAL_CUDA", "/usr/local/cuda"))
    yield (usual / "include",), usual / "bin" / "nvcc", str(usual)
    wheels = site_packages / "nvidia"
    for home in sorted(wheels.glob("cu[0-9]*"), reverse=True):  # one folder for all wheels, from CUDA 13 on
        yield (home / "include",), home / "bin" / "nvcc", f"pip wheels in {home}"
    nvcc_wheel = wheels / "cuda_nvcc"  # CUDA 12: one folder per wheel
    yield (
        (wheels / "cuda_runtime" / "include", nvcc_wheel / "include", wheels / "cuda_cccl" / "include"),
        nvcc_wheel / "bin" / "nvcc",
        f"pip wheels in {wheels}",
    )
    triton = site_packages / "triton" / "backends" / "nvidia" / "include"
    yield (triton,), None, "the headers inside Triton's wheel"


def find(environment: Mapping[str, str] | None = None, site_packages: Path | None = None) -> Toolkit | None:
    """The first complete set of headers: CUDA_HOME, nvcc on PATH, the usual folder, pip wheels, Triton's wheel."""
    environment = os.environ if environment is None else environment
    site_packages = site_packages or Path(sysconfig.get_paths()["purelib"])
    for includes, nvcc, origin in _candidates(environment, site_packages):
        if _complete(includes):
            usable = nvcc if nvcc and nvcc.is_file() else None
            return Toolkit(tuple(folder for folder in includes if folder.is_dir()), usable, origin)
    return None


@lru_cache(maxsize=1)
def toolkit() -> Toolkit | None:
    return find()


def compiler() -> str | None:
    """A GNU C++ compiler: the simulator uses its `noinit` attribute and, in one build, its gcov."""
    return shutil.which(os.environ.get("CXX", "g++"))


def why_no_simulator() -> str | None:
    """A sentence for a skip message, or None where simulated kernels can be built."""
    if compiler() is None:
        return "the CUDA simulator needs g++ 11 or later (or CXX naming it)"
    if toolkit() is None:
        return (
            "the CUDA simulator needs NVIDIA's headers: set CUDA_HOME or install nvidia-cuda-runtime, nvidia-cuda-crt"
        )
    return None


def why_no_nvcc() -> str | None:
    """A sentence for a skip message, or None where kernels can be compiled for real devices."""
    found = toolkit()
    if found is None or found.nvcc is None:
        return "compiling for sm_80 and sm_90 needs nvcc: install the CUDA toolkit (12.8 or later), no GPU is needed"
    return None
