# SPDX-License-Identifier: MIT
"""The optimizer step of a large hash table: SparseRowAdam beside torch.optim.Adam. `python -m bench.optim_step`.

One level of 2^19 rows of 2 features, float32, of which a batch touches a share; the gradient is dense, as hash_grid
gives it, or lists its rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from camkernels.optim import SparseRowAdam

from . import machine, timing

ROWS, FEATURES = 1 << 19, 2
SHARES = (0.001, 0.01, 0.1, 1.0)
BASELINES = ("Adam, fused", "Adam")


def tasks(rows: int, share: float) -> list[timing.Timed]:
    """A step of each optimizer, the baselines first."""
    generator = torch.Generator().manual_seed(0)
    touched = torch.randperm(rows, generator=generator)[: max(1, round(share * rows))]
    dense = torch.zeros(rows, FEATURES)
    dense[touched] = torch.randn(len(touched), FEATURES, generator=generator)
    options = {"betas": (0.9, 0.99), "eps": 1e-15}
    runs = {
        BASELINES[0]: (torch.optim.Adam, dense, {"fused": True}),
        BASELINES[1]: (torch.optim.Adam, dense, {"foreach": False}),
        "SparseRowAdam": (SparseRowAdam, dense, {}),
        "SparseRowAdam, sparse": (SparseRowAdam, dense.to_sparse(1).coalesce(), {}),
    }
    found = []
    for name, (optimizer, gradient, more) in runs.items():
        table = torch.nn.Parameter(torch.rand(rows, FEATURES, generator=generator))
        table.grad = gradient
        found.append(timing.Timed(name, optimizer([table], **options, **more).step, always=True))
    return found


def measure(rows: int, share: float, threads: int, rounds: int, seconds: float) -> list[tuple[str, float, list[float]]]:
    """[(optimizer, median ms of a step, times as fast as each of the baselines)]."""
    clock, timed = timing.clock_for(threads, "cpu"), tasks(rows, share)
    for task in timed:
        task.run()
        start = clock()
        task.run()
        task.plan(clock() - start, rounds, seconds, repeat=True)
    timing.interleave(timed, rounds, seconds, clock)
    return [
        (task.name, timing.quartiles(task.seconds.values())["median"] * 1e3,
         [timing.speedup(task.seconds, baseline.seconds)["median"] for baseline in timed[: len(BASELINES)]])
        for task in timed
    ]  # fmt: skip


def row(record: dict) -> str:
    """A line of the table."""
    ratios = " | ".join(f"{ratio:.2f}" for ratio in record["times"])
    return f"| {record['share']:.1%} | {record['optimizer']} | {record['ms']:.3f} | {ratios} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.optim_step", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="of the table (2^19)")
    parser.add_argument("--threads", type=int, default=1, help="1 is timed in CPU time, more in wall time")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each share of the rows (5)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, appended")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.rows} rows x {FEATURES}, {options.threads} thread(s)")
    titles = ["rows touched", "optimizer", "ms a step", *(f"x {name}" for name in BASELINES)]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for share in SHARES:
        for name, ms, times in measure(options.rows, share, options.threads, options.rounds, options.seconds):
            record = {"kind": "optim_step", "rows": options.rows, "threads": options.threads, "share": share}
            record |= {"optimizer": name, "ms": ms, "times": times}
            print(row(record), flush=True)
            if options.out is not None:
                with options.out.open("a") as out:
                    out.write(json.dumps(record | {"machine": machine.facts()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
