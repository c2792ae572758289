# SPDX-License-Identifier: MIT
"""Measures one case in a process of its own, which `bench.run` starts: a Job as JSON in, records as JSON lines out."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import camkernels

from . import cases, ceilings, gpu_rates, machine, providers, timing
from .case import Case, Inputs, Pass, arguments
from .providers import Outputs, Provider, Task

SCHEMA = 1
WARM_UPS = 2
SAMPLE_POINTS = 4096
MEMORY_SHARE = 0.7


@dataclass(frozen=True)
class Job:
    """What a worker does: a case under one allocator regime, and how long it may take."""

    case: str
    regime: str
    providers: tuple[str, ...]
    passes: tuple[str, ...]
    variants: tuple[str, ...] = ("warm",)
    threads: int = 1
    seconds: float = 60.0
    rounds: int = 15
    device: str = "cpu"
    seed: int = 0


@dataclass
class Candidate:
    """A provider that was asked for: a working task, or the reason why there is none."""

    provider: Provider
    task: Task | None = None
    reason: str | None = None
    first_s: float = 0.0
    call_s: float = 0.0
    agreement: dict[str, float] | None = None


# ---- agreement -------------------------------------------------------------------------------------------------------


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; infinite for another shape or a NaN."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.to(a.device).double()
    error = ((a - b).norm() / b.norm().clamp(min=1e-300)).item()
    return error if error == error else float("inf")


def compare(outputs: Outputs, expected: Outputs, case: Case, slack: float) -> tuple[dict[str, float], str | None]:
    """(relative errors ||a - b|| / ||b||, the first that the case does not allow as a sentence)."""
    errors = {name: relative_error(outputs[name], expected[name]) for name in expected}
    for name, error in errors.items():
        allowed = slack * case.tolerances[name]
        if not error <= allowed:
            return errors, f"disagrees in {name}: relative error {error:.1e}, allowed {allowed:.0e}"
    return errors, None


def make_cotangent(case: Case, task: Pass, inputs: Inputs) -> Tensor | None:
    """Random gradient of the output, whose width and dtype come from one point; None for a forward pass."""
    if not task.wrt:
        return None
    points = case.make_points(1, 0)
    first = {name: t[:1] if name in points else t for name, t in inputs.items()}
    with torch.no_grad():
        y = case.computed_by(camkernels.reference)(**arguments(first))
    count = inputs[next(iter(points))].shape[0]
    drawn = torch.randn(count, *y.shape[1:], generator=torch.Generator().manual_seed(7))
    return drawn.to(device=y.device, dtype=y.dtype)


def check_sample(case: Case, task: Pass, provider: Provider, inputs: Inputs, device: str) -> str | None:
    """Compares a provider with camkernels.reference on some of the points; a disagreement, or None."""
    points = case.make_points(1, 0)
    step = max(1, case.points // SAMPLE_POINTS)
    some = {name: t[::step][:SAMPLE_POINTS] if name in points else t for name, t in inputs.items()}
    cotangent = make_cotangent(case, task, some)
    results = []
    for source in (providers.find("reference"), provider):
        sample = source.make(case, task, device)
        sample.prepare(some, cotangent)
        results.append(sample.export(sample.run()))
    return compare(results[1], results[0], case, provider.slack)[1]


# ---- one pass --------------------------------------------------------------------------------------------------------


def too_large(case: Case, provider: Provider, device: str = "cpu") -> str | None:
    """Why a provider would need more memory than there is."""
    available, needed = machine.available_bytes(device), provider.scratch * case.scratch * case.points
    if available is None or needed <= MEMORY_SHARE * available:
        return None
    return f"would need about {needed / 1e9:.0f} GB of memory, {available / 1e9:.0f} GB are available"


def warm_up(candidate: Candidate, case: Case, task: Pass, job: Job, inputs: Inputs, cotangent) -> Outputs:
    """Makes the task and calls it; the outputs of the first call. The last call's time is the estimate for the plan."""
    candidate.task = candidate.provider.make(case, task, job.device)
    candidate.task.prepare(inputs, cotangent)
    outputs: Outputs = {}
    for call in range(WARM_UPS):
        start = time.perf_counter()
        result = candidate.task.run()
        if job.device == "cuda":
            torch.cuda.synchronize()
        candidate.call_s = time.perf_counter() - start
        if call == 0:
            candidate.first_s = candidate.call_s
            outputs = candidate.task.export(result)
    return outputs


def gather(case: Case, task: Pass, job: Job, inputs: Inputs, cotangent: Tensor | None) -> list[Candidate]:
    """Every provider asked for, warmed up and compared: the first with the reference, the others with the first."""
    found, anchor = [], None
    for name in job.providers:
        provider = providers.find(name)
        reason = provider.missing(case, task, job.device) or too_large(case, provider, job.device)
        candidate = Candidate(provider, reason=reason)
        found.append(candidate)
        if candidate.reason is not None:
            continue
        print(f"    {provider.name} ...", end="", file=sys.stderr, flush=True)
        try:
            outputs = warm_up(candidate, case, task, job, inputs, cotangent)
            if anchor is None and not provider.compiled:
                candidate.reason = check_sample(case, task, provider, inputs, job.device)
                anchor = outputs if candidate.reason is None else None
            elif anchor is None:
                candidate.reason = "nothing to compare it with; name a provider that is not compiled beside it"
            else:
                errors, candidate.reason = compare(outputs, anchor, case, provider.slack)
                candidate.agreement = errors
        except Exception as error:  # whatever another library raises is its reason, the others are still measured
            candidate.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f" {candidate.reason or f'{candidate.first_s:.1f} s'}", file=sys.stderr, flush=True)
    return found


def measure(
    case: Case,
    variant: str,
    job: Job,
    budget: float,
    candidates: list[Candidate],
    inputs: Inputs,
    cotangent: Tensor | None,
) -> tuple[dict[str, timing.Timed], list[float]]:
    """Interleaved rounds over the candidates that work: (Timed per provider name, calibrations)."""
    timed = []
    for candidate in candidates:
        if candidate.reason is None:
            always = candidate.provider.name in providers.BASELINES or not timed
            item = timing.Timed(candidate.provider.name, candidate.task.run, always)
            item.plan(candidate.call_s, job.rounds, budget, repeat=variant == "warm")
            candidate.task.prepare(inputs, cotangent)
            timed.append(item)
    calibration = ceilings.Calibration()
    calibrations: list[float] = []

    def before_round(index: int) -> None:
        if variant == "fresh":
            renewed = inputs | case.new_points(job.seed + 1000 + index, job.device)
            for candidate in candidates:
                if candidate.reason is None:
                    candidate.task.prepare(renewed, cotangent)
        calibrations.append(calibration())

    clock = timing.clock_for(job.threads, job.device)
    timing.interleave(timed, job.rounds, budget, clock, before_round)
    return {item.name: item for item in timed}, calibrations


# ---- records ---------------------------------------------------------------------------------------------------------


def base_record(case: Case, task: Pass, provider: Provider, job: Job, facts: dict) -> dict:
    """What every record says."""
    return {
        "schema": SCHEMA,
        "kind": "time",
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "op": case.op,
        "case": case.name,
        "points": case.points,
        "facts": dict(case.facts),
        "pass": task.name,
        "provider": provider.name,
        "regime": job.regime,
        "threads": job.threads,
        "device": job.device,
        "machine": facts,
    }


class Allowance:
    """The seconds of a job, shared by its passes and variants: what one leaves goes to those after it."""

    def __init__(self, seconds: float, shares: int):
        self.seconds, self.shares = seconds, shares

    def spend(self, work: Callable[[float], Any]) -> Any:
        """work(budget), whose time is taken off."""
        start = time.perf_counter()
        result = work(max(0.0, self.seconds) / max(1, self.shares))
        self.seconds -= time.perf_counter() - start
        self.shares -= 1
        return result


def records_of_pass(
    case: Case, task: Pass, job: Job, allowance: Allowance, facts: dict, limits: dict, inputs: Inputs
) -> Iterator[dict]:
    """Measures a pass and yields a record for each provider and variant."""
    print(f"  {case.name} {task.name} ({job.regime})", file=sys.stderr, flush=True)
    cotangent = make_cotangent(case, task, inputs)
    candidates = gather(case, task, job, inputs, cotangent)
    floor = case.floor(task)
    for variant in job.variants:
        rounds = functools.partial(measure, case, variant, job)
        timed, calibrations = allowance.spend(lambda s, run=rounds: run(s, candidates, inputs, cotangent))
        for candidate in candidates:
            record = base_record(case, task, candidate.provider, job, facts) | {"variant": variant}
            if candidate.reason is not None:
                yield record | {"status": "skipped", "reason": candidate.reason}
                continue
            item = timed[candidate.provider.name]
            product = candidate.provider.product or floor.product
            floor_ns = ceilings.floor_ns(dataclasses.replace(floor, product=product), limits)
            nanoseconds = timing.quartiles(s / case.points * 1e9 for s in item.seconds.values())
            speedups = {
                name: timing.speedup(item.seconds, timed[name].seconds)
                for name in providers.COMPARED
                if name in timed and name != item.name
            }
            yield record | {
                "status": "ok",
                "ns_per_point": nanoseconds,
                "rounds": len(item.seconds),
                "calls": item.calls,
                "compile_s": max(0.0, candidate.first_s - candidate.call_s) if candidate.provider.compiled else None,
                "agreement": candidate.agreement,
                "speedup": speedups,
                "floor": {"memory": floor.memory, "flops": floor.flops, "lookups": sum(n for _, n in floor.lookups)},
                "floor_ns": floor_ns,
                "of_ceiling": max(floor_ns.values()) / nanoseconds["median"],
                "contended": timing.contended_share(calibrations, machine.load(), machine.cores()),
                "calibration_gflops": timing.quartiles(calibrations),
                "ceilings": limits,
            }


def work(job: Job) -> Iterator[dict]:
    """All records of a job."""
    torch.set_num_threads(job.threads)
    case = cases.find(job.case)
    facts = machine.facts(job.device)
    limits = gpu_rates.ceilings() if job.device == "cuda" else ceilings.measure(job.threads)
    inputs = case.inputs(job.seed, job.device)
    passes = [case.passes[name] for name in job.passes if name in case.passes]
    allowance = Allowance(job.seconds, len(passes) * len(job.variants))
    for task in passes:
        yield from records_of_pass(case, task, job, allowance, facts, limits, inputs)
        gc.collect()


def main() -> None:
    job = Job(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()})
    with Path(sys.argv[2]).open("a") as out:
        for record in work(job):
            print(json.dumps(record), file=out, flush=True)


def to_json(job: Job) -> str:
    return json.dumps(dataclasses.asdict(job))


if __name__ == "__main__":
    main()
