# SPDX-License-Identifier: MIT
"""Measures cases x providers and writes JSON lines: `python -m bench.run`.

    python -m bench.run --list                         what there is to measure
    python -m bench.run --quick                        two minutes: small inputs, the baselines and the backends
    python -m bench.run                                2^17 points, all providers, both allocator regimes
    python -m bench.run --gate                         what the CPU kernels must reach, with verdicts
    python -m bench.run --gate modulated_mlp           of one op
    python -m bench.run --cases '*/coherent/*' --passes forward,fb-both --providers cpu,eager --memory
    python -m bench.run --base bench/results/old.jsonl --out bench/results/new.jsonl        and how it changed

Every (case, allocator regime) is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from camkernels import _gpu

from . import ROOT, cases, gate, machine, memory, providers, report, worker
from .case import Case

QUICK_PROVIDERS = "cpu,cuda,triton,eager,eager_fair"
RESULTS = ROOT / "bench" / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the presets applied."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--list", action="store_true", help="show cases, passes and providers, measure nothing")
    add("--quick", action="store_true", help="small inputs, few rounds, one regime")
    add("--gate", nargs="?", const="all", metavar="OP", help="the cases and passes of the gate, or of one op in it")
    add("--cases", metavar="GLOBS", help="cases whose name matches one (default: float32, uniform, 2^17)")
    add("--providers", metavar="NAMES", help="comma-separated (default: all)")
    add("--passes", metavar="NAMES", help="comma-separated (default: all of the case)")
    add("--regimes", metavar="NAMES", help="allocator: default,tuned (both)")
    add("--variants", metavar="NAMES", default="warm", help="warm: the same points again; fresh: new ones each round")
    add("--threads", type=int, default=1, help="1 is timed in CPU time, more in wall time")
    add("--seconds", type=float, metavar="S", help="time for the rounds of a case in one regime (60)")
    add("--rounds", type=int, help="rounds per pass (15)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--memory", action="store_true", help="also the peak extra memory of each pass, in fresh processes")
    add("--out", type=Path, metavar="FILE", help="JSON lines, appended (default: bench/results/<time>.jsonl)")
    add("--base", type=Path, metavar="FILE", help="a stored result to compare with")
    add("--plot", type=Path, metavar="PNG", help="draw the result")
    options = parser.parse_args(arguments)
    try:
        return apply_presets(options)
    except ValueError as error:
        parser.error(str(error))


def apply_presets(options: argparse.Namespace) -> argparse.Namespace:
    """Fills in what was not given: `options.cases` become Case objects, names become tuples. ValueError if unknown."""
    if options.gate and options.quick:
        raise ValueError("--gate and --quick exclude each other")
    if options.gate and (options.cases or options.passes):
        raise ValueError("--gate has its own cases and passes; leave --cases and --passes out")
    if options.base is not None and not options.base.exists():
        raise ValueError(f"--base {options.base} does not exist")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {options.threads}")
    preset = "gate" if options.gate else "quick" if options.quick else "default"
    if options.gate:
        options.cases = gate.select(options.gate)
    else:
        options.cases = cases.select(options.cases) if options.cases else cases.select(tag=preset)
    options.memory = options.memory or options.gate is not None
    options.rounds = options.rounds or (5 if options.quick else 15)
    if options.seconds is None:
        options.seconds = {"gate": None, "quick": 8.0, "default": 60.0}[preset]
    asked = options.providers or {"gate": gate.PROVIDERS, "quick": QUICK_PROVIDERS, "default": None}[preset]
    options.providers = tuple(provider.name for provider in providers.select(asked))
    every = dict.fromkeys(name for case in options.cases for name in case.passes)
    passes = [name for name in gate.PASSES if name in every] if options.gate or options.quick else every
    options.passes = names(options.passes or ",".join(passes), set(every), "pass")
    regimes = "tuned" if options.quick or options.device == "cuda" else ",".join(machine.REGIMES)
    options.regimes = names(options.regimes or regimes, set(machine.REGIMES), "regime")
    options.variants = names(options.variants, {"warm", "fresh"}, "variant")
    if options.out is None:
        options.out = RESULTS / f"{datetime.datetime.now():%Y%m%d-%H%M%S}.jsonl"
    return options


def names(given: str, known: set[str], what: str) -> tuple[str, ...]:
    """Comma-separated names, each of them known."""
    wanted = tuple(name.strip() for name in given.split(",") if name.strip())
    for name in wanted:
        if name not in known:
            raise ValueError(f"no {what} is called {name!r}; there are {', '.join(sorted(known))}")
    return wanted


def describe() -> str:
    """The registry."""
    text = ["cases"]
    for case in cases.all_cases():
        text.append(f"  {case.name:50s} {case.points:8d} points  {' '.join(sorted(case.tags))}")
    text.append("passes")
    for op, make in cases.OPS.items():
        text += [f"  {op:12s} {task.name:10s} {task.title}" for task in next(make()).passes.values()]
    text.append("providers")
    text += [f"  {provider.name:18s} {provider.about}" for provider in providers.PROVIDERS]
    return "\n".join(text)


def run_worker(job: worker.Job) -> list[dict]:
    """Records of a job, measured in a process of its own; what a crash leaves is kept."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.jsonl"
        out.touch()
        command = [sys.executable, "-m", "bench.worker", worker.to_json(job), str(out)]
        environment = machine.environment(job.threads, machine.REGIMES[job.regime])
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if status != 0:
            print(f"bench: the process that measured {job.case} ended with status {status}", file=sys.stderr)
        return [json.loads(line) for line in out.read_text().splitlines()]


def measure_memory(case: Case, options: argparse.Namespace) -> list[dict]:
    """Peak extra memory of every provider and pass."""
    found = []
    for task in gate.MEMORY_PASSES if options.gate else options.passes:
        for name in options.providers if task in case.passes else ():
            provider = providers.find(name)
            device = options.device
            reason = provider.missing(case, case.passes[task], device) or worker.too_large(case, provider, device)
            if reason is None and not (options.gate and name not in gate.MEMORY_PROVIDERS):
                print(f"  {case.name} {task} memory of {name}", file=sys.stderr, flush=True)
                for regime in memory.regimes(case, name):
                    found.append(memory.measure(case.name, name, task, options.threads, regime))
    return found


def measure(options: argparse.Namespace) -> list[dict]:
    """Everything that was asked for; records are also appended to the file as they come."""
    records = []

    def keep(new: list[dict]) -> None:
        records.extend(new)
        with options.out.open("a") as out:
            out.writelines(json.dumps(record) + "\n" for record in new)

    options.out.parent.mkdir(parents=True, exist_ok=True)
    for case in options.cases:
        seconds = options.seconds or gate.SECONDS[case.name]
        for regime in options.regimes:
            job = worker.Job(
                case=case.name,
                regime=regime,
                providers=options.providers,
                passes=tuple(name for name in options.passes if name in case.passes),
                variants=options.variants,
                threads=options.threads,
                seconds=seconds,
                rounds=options.rounds,
                device=options.device,
            )
            keep(run_worker(job))
        if options.memory:
            keep(measure_memory(case, options))
    return records


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print(describe())
        return 0
    if options.device == "cuda" and (reason := _gpu.no_gpu()) is not None:
        print(f"bench: --device cuda: {reason}", file=sys.stderr)
        return 2
    load, count = machine.load(), machine.cores()
    if load is not None and load > max(1, count - options.threads):
        print(f"bench: the load is {load} on {count} cores; times will be marked contended", file=sys.stderr)
    records = measure(options)
    print(report.table(records))
    if options.gate:
        print("\n".join(gate.lines(records, options.cases)))
    if options.base is not None:
        print(report.changes(report.load([options.base]), records))
    if options.plot is not None:
        report.plot(records, options.plot)
    with contextlib.suppress(ValueError):  # another drive
        options.out = Path(os.path.relpath(options.out))
    print(f"\n{len(records)} records in {options.out}; `python -m bench.report {options.out}` shows them again")
    return 0 if records else 1


if __name__ == "__main__":
    sys.exit(main())
