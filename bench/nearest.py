# SPDX-License-Identifier: MIT
"""The nearest centres of many points beside SciPy's cKDTree with as many threads. `python -m bench.nearest`.

Uniform points and centres in [0, 1)^d, indices built before the clock starts; every answer is compared first. With
--device cuda they are on the GPU; the tree is on the CPU, with its points.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.spatial import cKDTree

from camkernels import NeighborIndex

from . import machine, timing
from .hash_grid_cases import uniform_points

GATE = 3.0  # times as fast as cKDTree


class Search(NamedTuple):
    """`neighbors` of `centers` centres for each of some points."""

    dims: int
    neighbors: int
    centers: int


SEARCHES = (Search(2, 4, 20_000), Search(3, 8, 100_000))
POINTS = (100_000, 1_000_000)


def measure(
    search: Search, points: int, threads: int, rounds: int, seconds: float, device: str = "cpu"
) -> dict[str, Any]:
    """{ns (median for one point, by side), speedup}. ValueError where the two find other distances."""
    centers = uniform_points(search.centers, search.dims, 0).double()
    queries = uniform_points(points, search.dims, 1).double().numpy()
    tree, index, x = cKDTree(centers.numpy()), NeighborIndex(centers.to(device)), torch.from_numpy(queries).to(device)
    runs = {
        "camkernels": lambda: index.search(x, search.neighbors),
        "cKDTree": lambda: tree.query(queries, search.neighbors, workers=threads),
    }
    clock = timing.clock_for(threads, device)
    timed, answers = [], []
    for name, run in runs.items():
        start = clock()
        answers.append(run())
        timed.append(timing.Timed(name, run, always=True))
        timed[-1].plan(clock() - start, rounds, seconds, repeat=False)
    (_, squares), (distances, _) = answers
    wanted = torch.from_numpy(distances).reshape(squares.shape).square()
    if not torch.allclose(squares.cpu(), wanted, rtol=1e-9, atol=0):
        raise ValueError(f"{search}: camkernels and cKDTree find other distances")
    timing.interleave(timed, rounds, seconds, clock)
    own, other = (task.seconds for task in timed)
    ns = {task.name: timing.quartiles(task.seconds.values())["median"] / points * 1e9 for task in timed}
    return {"ns": ns, "speedup": timing.speedup(own, other)}


def row(record: dict[str, Any]) -> str:
    """A line of the table."""
    search, ratio = Search(*(record[name] for name in Search._fields)), record["speedup"]
    own, other = record["ns"].values()
    title = f"{search.dims}-D K{search.neighbors} of {search.centers}"
    return f"| {title} | {record['points']} | {own:.0f} | {other:.0f} | {timing.spread(ratio)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each search and number of points; status 1 where one misses the gate."""
    parser = argparse.ArgumentParser(prog="python -m bench.nearest", description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, nargs="+", default=POINTS, help="(10^5 and 10^6)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="all cores; 1 is timed in CPU time")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each line (20)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, appended")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.device}, {options.threads} thread(s)")
    print(f"| search | points | ns a point | cKDTree | times as fast | needs {GATE:g} |")
    print("|---|---|---|---|---|---|")
    missed = 0
    for search in SEARCHES:
        for points in options.points:
            found = measure(search, points, options.threads, options.rounds, options.seconds, options.device)
            passed = found["speedup"]["median"] >= GATE
            missed += not passed
            record = {"kind": "nearest", "device": options.device, "threads": options.threads, "points": points}
            record |= search._asdict() | found
            print(row(record), "PASS |" if passed else "short of it |", flush=True)
            if options.out is not None:
                with options.out.open("a") as out:
                    out.write(json.dumps(record | {"machine": machine.facts(options.device)}) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
