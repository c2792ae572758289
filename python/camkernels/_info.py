# SPDX-License-Identifier: MIT
"""What this installation can run on this machine, and why not the rest: `python -m camkernels info [--json]`."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__, _gpu, _ops
from ._backends import BACKENDS, Call, can_run
from ._geometry import geometry_table
from ._gpu import build_facts
from .neighbors import search_method
from .testing import CASES, PAIRED
from .triton import SECOND_ORDER as TRITON_SECOND_ORDER

OPS = (*CASES, *PAIRED, "sparse_row_adam")
KNOWN_VARIABLES = ("CAMKERNELS_BACKEND", "CAMKERNELS_CPU_ISA")


def home_of(backend: str) -> str:
    """The kind of device a backend computes on; the reference can on any."""
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def reason_against(backend: str, op: str) -> str | None:
    """Why a backend cannot compute an op on this machine; None if it can."""
    home = home_of(backend)
    reason = can_run(backend, Call(op, home))
    return _gpu.no_gpu() if reason is None and home == "cuda" else reason


def collect() -> dict[str, Any]:
    """Everything that `info` prints, as plain numbers, strings and lists."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    variables = {name: value for name, value in os.environ.items() if name.startswith("CAMKERNELS_")}
    return {
        "camkernels": __version__,
        "folder": str(_ops.FOLDER),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
        "threads": torch.get_num_threads(),
        "cpu": {"library": _ops.cpu_isa, "reason": _ops.cpu_missing, "machine": list(_ops.usable_isas())},
        "cuda": {"library": _ops.cuda_missing is None, "reason": _ops.cuda_missing},
        "build": build_facts(_ops.FOLDER),
        "environment": {name: variables.get(name) for name in sorted({*KNOWN_VARIABLES, *variables})},
        "ops": {op: {backend: reason_against(backend, op) for backend in BACKENDS} for op in OPS},
        "nearest": {"cpu": search_method(), "cuda": reason_against("cuda", "nearest")},
        "second_order": {backend: second_order(backend) for backend in BACKENDS},
        "hardware": hardware(_ops.FOLDER.parents[1] / "bench" / "results"),
        "hash_grid_geometries": geometry_table(),
    }


def second_order(backend: str) -> str:
    """What computes the derivatives of a backend's derivatives."""
    return {"triton": TRITON_SECOND_ORDER, "reference": "itself"}.get(backend, "own kernels")


def hardware(results: Path) -> dict[str, Any]:
    """{runs, reason}: on which GPUs the kernels have run, from the files that `make gpu` leaves in a checkout.

    A run is {gpu, time, commit, backends: {name: {passed, failed, skipped} tests}, file}; reason: why there is none.
    """
    if not results.is_dir():
        return {
            "runs": [],
            "reason": f"no folder {results}: results come with a checkout, not with an installed package",
        }
    runs, broken = [], []
    for file in sorted(results.glob("*.json")):
        try:
            result = json.loads(file.read_text())
            found = {name: result[name] for name in ("gpu", "time", "commit")}
            runs.append(found | {"backends": result.get("tests", {}).get("backends", {}), "file": str(file)})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            broken.append(file.name)
    reason = None if runs else f"no result of `make gpu` in {results}"
    if broken:
        reason = f"not results of `make gpu`: {', '.join(broken)}"
    return {"runs": runs, "reason": reason}


def print_info(as_json: bool) -> int:
    facts = collect()
    print(json.dumps(facts, indent=2) if as_json else describe(facts))
    return 0


def describe(facts: dict[str, Any]) -> str:
    """The facts as text for a terminal."""
    cpu, cuda, build = facts["cpu"], facts["cuda"], facts["build"]
    isas = ", ".join(cpu["machine"])
    lines = [
        f"camkernels {facts['camkernels']} in {facts['folder']}",
        f"Python {facts['python']}, PyTorch {facts['torch']}, CUDA of PyTorch: {facts['torch_cuda'] or 'none'}",
        f"machine: {facts['platform']}, {facts['threads']} threads, GPUs: {', '.join(facts['gpus']) or 'none'}",
        f"CPU kernels: {cpu['library'] or 'none: ' + str(cpu['reason'])} (this machine runs {isas})",
        f"CUDA kernels: {'loaded' if cuda['library'] else 'none: ' + str(cuda['reason'])}",
    ]
    if build is None:
        lines.append("build: no note of one; the package runs as pure Python")
    else:
        lines.append(f"build: {build.get('date')}, {build.get('compiler')}, PyTorch {build.get('torch')}")
        lines.append(f"  libraries: {', '.join(build.get('libraries', {})) or 'none'}")
    lines.append("environment:")
    lines += [f"  {name}={value if value is not None else '(not set)'}" for name, value in facts["environment"].items()]
    lines += ["", "what can run here:"]
    for op, backends in facts["ops"].items():
        for backend, reason in backends.items():
            lines.append(f"  {op:24} {backend:10} {'yes' if reason is None else 'no: ' + reason}")
    lines += _nearest_lines(facts["nearest"])
    lines += [f"second order: {', '.join(f'{b}: {by}' for b, by in facts['second_order'].items())}", ""]
    lines += _hardware_lines(facts["hardware"])
    return "\n".join([*lines, "", *_geometry_lines(facts["hash_grid_geometries"])])


def _nearest_lines(nearest: dict[str, str | None]) -> list[str]:
    """How the nearest centres are found on the CPU and on a GPU."""
    there = "by cells, where they are" if nearest["cuda"] is None else f"copied to the CPU: {nearest['cuda']}"
    return [f"nearest centres: by {nearest['cpu']} on the CPU", f"  of CUDA tensors: {there}"]


def _hardware_lines(hardware: dict[str, Any]) -> list[str]:
    """Which kernels have run on which GPU, and how their tests ended."""
    lines = ["GPUs on which the kernels have run:"]
    for run in hardware["runs"]:
        for name, count in run["backends"].items() or [("no backend", None)]:
            tests = f"{count['passed']} tests passed, {count['failed']} failed" if count else "no tests recorded"
            lines.append(f"  {run['gpu']:30} {name:10} {tests} ({run['time']}, commit {run['commit']})")
    if hardware["reason"]:
        lines.append(f"  {'also' if hardware['runs'] else 'none known'}: {hardware['reason']}")
    return lines


def _geometry_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The legal table of hash grids: dims built here, and those that the convention's own code offers."""
    lines = ["hash grids:", f"  {'convention':12} {'kind':6} {'corners':8} {'dims here':10} dims of its public code"]
    for row in rows:
        corners = "aligned" if row["align_corners"] else "-"
        head = f"  {row['convention']:12} {row['kind']:6} {corners:8}"
        if row["dims"]:
            lines.append(f"{head} {_span(row['dims']):10} {_span(row['published_dims']) or 'none, extended'}")
        else:
            lines.append(f"{head} no: {row['reason']}")
    return lines


def _span(dims: list[int]) -> str:
    return "" if not dims else f"{dims[0]}" if len(dims) == 1 else f"{dims[0]}..{dims[-1]}"
