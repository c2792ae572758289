# SPDX-License-Identifier: MIT
"""Peak extra memory of one provider at one pass: `python -m bench.memory CASE PROVIDER PASS [--regime live]`.

A fresh process makes the inputs, calls once with a handful of points (which loads code), gives freed memory back,
resets the kernel's record of the peak, makes the call and reads the peak: what the call needs beyond its inputs, its
results included. A compiled provider is called with all points before, since compiling takes more memory than running.

Needs Linux with a writable /proc/self/clear_refs and CPU tensors; elsewhere the record says that it is not supported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from . import ROOT, cases, machine, providers
from .case import Case, Pass
from .providers import Provider
from .worker import Job, base_record, make_cotangent

FEW_POINTS = 64
REGIMES: dict[str, dict[str, str]] = {
    "default": {},  # what the process takes with malloc as it is: freed blocks stay with it, and leave gaps
    # every block above 64 KB is mapped on its own and given back when freed: the peak is that of live memory
    "live": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    "recompute": {"CAMKERNELS_RECOMPUTE": "1"},  # as "default", of an op that computes again what it could keep
}
TIMEOUT_S = 900


def regimes(case: Case, provider: str) -> list[str]:
    """Those that make a difference to a provider."""
    return [name for name in REGIMES if name != "recompute" or (case.recomputes and provider == "cpu")]


class NotSupportedError(RuntimeError):
    """This system does not tell the peak of resident memory."""


def status_bytes(field: str) -> int:
    """A memory entry of /proc/self/status, such as VmRSS or VmHWM."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise NotSupportedError(f"peak memory is read from /proc/self/status, which cannot be read: {error}") from None
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise NotSupportedError(f"peak memory is read from /proc/self/status, which has no {field}")


def reset_peak() -> int:
    """Gives freed memory back, sets VmHWM to the resident memory, which is returned."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise NotSupportedError(f"peak memory needs a writable /proc/self/clear_refs: {error}") from None
    return status_bytes("VmRSS")


def peak_of_call(case: Case, task: Pass, provider: Provider, seed: int = 0) -> tuple[int, int]:
    """(bytes beyond the inputs at the peak of one call in this process, those of its results)."""
    inputs = case.inputs(seed)
    cotangent = make_cotangent(case, task, inputs)
    if provider.compiled:
        runner = provider.make(case, task, "cpu")
        runner.prepare(inputs, cotangent)
        runner.run()
    else:
        points = case.make_points(1, 0)
        few = {name: t[:FEW_POINTS] if name in points else t for name, t in inputs.items()}
        warm = provider.make(case, task, "cpu")
        warm.prepare(few, None if cotangent is None else cotangent[:FEW_POINTS])
        warm.run()
        del warm
        runner = provider.make(case, task, "cpu")
        runner.prepare(inputs, cotangent)
    before = reset_peak()
    result = runner.run()
    peak = status_bytes("VmHWM")
    results = sum(t.numel() * t.element_size() for t in runner.export(result).values())
    return max(0, peak - before), results


def record_of_call(job: Job, provider: Provider, task: Pass) -> dict:
    """The record of one measurement, made in this process."""
    torch.set_num_threads(job.threads)
    case = cases.find(job.case)
    record = base_record(case, task, provider, job, machine.facts()) | {"kind": "memory", "variant": "cold"}
    reason = provider.missing(case, task, job.device)
    if reason is None and job.device != "cpu":
        reason = "peak memory is measured with CPU tensors"
    if reason is None:
        try:
            peak, results = peak_of_call(case, task, provider)
            found = {"bytes_per_point": peak / case.points, "result_bytes_per_point": results / case.points}
            return record | {"status": "ok", "bytes": peak} | found
        except Exception as error:  # another library's reason, or NotSupportedError
            reason = str(error)
    return record | {"status": "skipped", "reason": reason}


def run_here(job: Job) -> dict:
    """The record of a job of one provider and pass, made in this process, whose environment is the regime's."""
    return record_of_call(job, providers.find(job.providers[0]), cases.find(job.case).passes[job.passes[0]])


def measure(case: str, provider: str, task: str, threads: int = 1, regime: str = "default") -> dict:
    """The record of one measurement, made in a fresh process."""
    command = [sys.executable, "-m", "bench.memory", case, provider, task, "--threads", str(threads), "--here"]
    command += ["--regime", regime]
    environment = machine.environment(threads, REGIMES[regime])
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_S
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        job = Job(case, regime, (provider,), (task,), threads=threads)
        found = cases.find(case)
        record = base_record(found, found.passes[task], providers.find(provider), job, machine.facts())
        return record | {"kind": "memory", "variant": "cold", "status": "skipped", "reason": f"{error}"}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    for name in ("case", "provider", "task"):
        parser.add_argument(name, metavar=name.replace("task", "pass").upper())
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--regime", choices=tuple(REGIMES), default="default")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in the fresh process
    given = parser.parse_args()
    if given.here:
        job = Job(given.case, given.regime, (given.provider,), (given.task,), threads=given.threads)
        print(json.dumps(run_here(job)))
    else:
        print(json.dumps(measure(given.case, given.provider, given.task, given.threads, given.regime)))


if __name__ == "__main__":
    main()
