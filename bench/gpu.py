# SPDX-License-Identifier: MIT
"""Everything that only a GPU can show, in nine minutes and without a network: `make gpu` or `python -m bench.gpu`.

    python -m bench.gpu                  build, tests, check, benchmarks; writes bench/results/<gpu>.json
    python -m bench.gpu --dry-run        on any machine: every step up to the device; runs none on it, writes nothing
    python -m bench.gpu --only tests,check --budget 300

Needs torch, triton, numpy and pytest; nvcc and g++ too, where the CUDA library is not built yet. A step that fails or
takes too long is recorded and the next one follows; a step that no longer fits into the budget is left out, and said.
The file is written anew after each step, so that what was measured stays if the machine goes away.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import camkernels
from camkernels import _gpu, _ops
from camkernels import triton as triton_backend

from . import ROOT, gpu_steps, machine, providers, run
from .gpu_steps import Step

SCHEMA = 1
BUDGET = 510.0  # seconds; nine minutes less what starting and stopping take
RESULTS = ROOT / "bench" / "results"


def file_name(gpu: str) -> str:
    """NVIDIA H100 80GB HBM3 -> nvidia-h100-80gb-hbm3.json"""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def facts() -> dict[str, Any]:
    """The GPU, the driver, the versions, the commit, the library."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "schema": SCHEMA,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "gpus": torch.cuda.device_count(),
        "capability": f"{major}.{minor}",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "driver": gpu_steps.driver(),
        "cuda": torch.version.cuda,
        "triton": triton_version(),
        "machine": machine.facts("cuda"),
        "commit": machine.facts()["commit"],
    }


def triton_version() -> str | None:
    """None where Triton is not installed."""
    if triton_backend.MISSING is not None:
        return None
    import triton

    return triton.__version__


def library_line() -> str:
    """What is known of the CUDA library: the code it holds, or why there is none."""
    if _ops.cuda_missing is not None:
        return _ops.cuda_missing
    noted = _gpu.build_facts(_ops.FOLDER) or {}
    held = ", ".join(_gpu.codes(noted)) or "code that the build left no note of"
    return f"{_ops.FOLDER / '_cuda.so'} loads; {held}; built with CUDA {noted.get('cuda')}"


# ---- the run ---------------------------------------------------------------------------------------------------------


def allowance(step: Step, later: list[Step], left: float) -> float:
    """Seconds a step may take of those left: its limit at most, and the least that later steps need is kept."""
    return min(step.limit, left - sum(other.least for other in later))


def run_steps(steps: list[Step], result: dict[str, Any], out: Path, budget: float, folder: Path) -> None:
    """Runs the steps one after the other; after each, the result file holds all that is known."""
    end = time.monotonic() + budget
    for place, step in enumerate(steps):
        seconds = allowance(step, steps[place + 1 :], end - time.monotonic())
        reason = step.skip()
        if reason is None and seconds < step.least:
            reason = f"{max(0.0, end - time.monotonic()):.0f} s are left of {budget:.0f}, it and those behind need more"
        if reason is not None:
            record = {"step": step.name, "outcome": "skipped", "seconds": 0.0, "reason": reason}
        else:
            print(f"== {step.name}: {step.about} (at most {seconds:.0f} s)", flush=True)
            record = gpu_steps.execute(step, seconds, folder)
            result |= step.gather(folder)
        result["steps"].append(record)
        print(
            f"== {step.name}: {record['outcome']} after {record['seconds']:.0f} s {record['reason'] or ''}", flush=True
        )
        write(result, out)


def write(result: dict[str, Any], out: Path) -> None:
    """Replaces the file as a whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(out)


# ---- the dry run -----------------------------------------------------------------------------------------------------


def dry_run(steps: list[Step], budget: float) -> int:
    """Shows every step, runs what needs no device, lists the benchmarks; 1 if something would not work."""
    print("dry run: nothing runs on a GPU, no result file is written")
    print(f"GPU: {_gpu.no_gpu() or torch.cuda.get_device_name()}")
    print(f"library: {library_line()}")
    failed = 0
    for number, step in enumerate(steps, 1):
        print(f"\n{number}. {step.name}: {step.about}\n   {' '.join(step.shown())}   at most {step.limit:.0f} s")
        if (reason := step.skip()) is not None:
            print(f"   would be left out: {reason}")
        for line in list_benchmark(step):
            print(f"   {line}")
        if step.rehearsal:
            record = gpu_steps.execute(step.rehearsed(), step.limit)
            failed += record["outcome"] != "ok"
            print(f"   rehearsed: {record['outcome']}: {record['tail'][-1] if record['tail'] else 'no output'}")
    needed = sum(step.least for step in steps)
    print(f"\nall steps are tried with {needed:.0f} s, the budget is {budget:.0f} s")
    return 1 if failed or needed > budget else 0


def list_benchmark(step: Step) -> list[str]:
    """What a benchmark step measures, as its own command line reads it; nothing for other steps."""
    if "bench.run" not in step.command:
        return []
    options = run.parse(list(step.command[step.command.index("bench.run") + 1 :]))
    lines = []
    for case in options.cases:
        lines.append(f"{case.name}: {', '.join(options.passes)}")
        for name in options.providers:
            task = case.passes[options.passes[0]]
            reason = providers.find(name).missing(case, task, "cuda")
            lines.append(f"  {name}{' is left out here: ' + reason if reason else ''}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="everything up to the device, on any machine")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="S", help=f"seconds for all ({BUDGET:.0f})")
    parser.add_argument("--only", metavar="NAMES", help=f"of {', '.join(step.name for step in gpu_steps.all_steps())}")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<gpu>.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            steps = gpu_steps.select(options.only, Path(folder))
        except ValueError as error:
            parser.error(str(error))
        if options.dry_run:
            return dry_run(steps, options.budget)
        if (reason := _gpu.no_gpu()) is not None:
            print(f"bench.gpu: {reason}; --dry-run shows the steps without one", file=sys.stderr)
            return 2
        result = facts() | {"camkernels": camkernels.__version__, "budget_s": options.budget, "steps": []}
        out = options.out or RESULTS / file_name(result["gpu"])
        run_steps(steps, result, out, options.budget, Path(folder))
    print(summary(result))
    print(f"written: {out}")
    return 1 if any(step["outcome"] not in ("ok", "skipped") for step in result["steps"]) else 0


def summary(result: dict[str, Any]) -> str:
    """A line per step."""
    lines = [f"{result['gpu']}, driver {result['driver']}, commit {result['commit']}"]
    for step in result["steps"]:
        lines.append(
            f"  {step['step']:16} {step['outcome']:9} {step['seconds']:6.0f} s  {step['reason'] or ''}".rstrip()
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
