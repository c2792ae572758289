# SPDX-License-Identifier: MIT
"""The short table of `python -m camkernels bench`: every op against its definition in plain PyTorch, in 20 seconds.

The full harness, with other competitors, ceilings and memory, is the folder `bench` of the repository.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _ops, reference
from ._backends import BACKENDS, Call, choose
from ._geometry import GridGeometry
from .fit.errors import UserError
from .fit.start import check_backend, check_device
from .hash_grid import hash_grid

__all__ = ["Row", "add_arguments", "measure", "run"]

SECONDS = 20.0
POINTS = (1 << 13, 1 << 15)  # the definition takes seconds beyond
SAMPLE_S = 0.005


@dataclass(frozen=True)
class Problem:
    """An op with its arguments: make(points, device) -> tensors, `wrt` the differentiated ones; options the rest."""

    op: str
    title: str
    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    make: Callable[[int, str], dict[str, Tensor]]
    wrt: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ns per point."""

    problem: str
    task: str
    points: int
    backend: str
    ns: float
    definition_ns: float

    @property
    def ratio(self) -> float:
        return self.definition_ns / self.ns


def _hash_grid(dims: int) -> Problem:
    geometry = GridGeometry.build(dims, 16, 2, 19, finest_resolution=2048)

    def make(points: int, device: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(points, dims, generator=generator)
        table = torch.rand(geometry.n_entries, geometry.n_features_per_level, generator=generator)
        return {"x": x.to(device), "table": (table * 2 - 1).to(device)}

    title = f"hash grid {dims}-D, 16 x 2, 2^19"
    options = {"geometry": geometry}
    return Problem("hash_grid", title, hash_grid, reference.hash_grid, make, ("table",), options)


def problems() -> list[Problem]:
    """What is measured; a new op adds its own."""
    return [_hash_grid(3), _hash_grid(2)]


def _call(problem: Problem, function: Callable[..., Tensor], inputs: dict[str, Tensor], backward: bool) -> Callable:
    options = problem.options
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                function(**inputs, **options)

        return forward
    leaves = {name: t.detach().requires_grad_(name in problem.wrt) for name, t in inputs.items()}
    wrt = [leaves[name] for name in problem.wrt]
    with torch.no_grad():
        cotangent = torch.ones_like(function(**inputs, **options))
    return lambda: torch.autograd.grad(function(**leaves, **options), wrt, cotangent)


def _seconds(calls: list[Callable[[], Any]], budget: float, device: str) -> list[float]:
    """Median seconds of each call, taken in turns after a warm-up, at least one round."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    repeats = []
    for call in calls:
        start = clock()
        call()
        if clock() - start < 10 * SAMPLE_S:  # a first call may load or allocate: time another where that is cheap
            start = clock()
            call()
        repeats.append(max(1, min(20, math.ceil(SAMPLE_S / max(clock() - start, 1e-9)))))
    samples: list[list[float]] = [[] for _ in calls]
    end = clock() + budget
    while not samples[0] or (clock() < end and len(samples[0]) < 15):
        for call, repeat, kept in zip(calls, repeats, samples, strict=True):
            start = clock()
            for _ in range(repeat):
                call()
            kept.append((clock() - start) / repeat)
    return [statistics.median(kept) for kept in samples]


def measure(
    seconds: float = SECONDS,
    device: str = "cpu",
    backend: str | None = None,
    points: tuple[int, ...] = POINTS,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Times every problem at each number of points, forward and forward + backward; on_row sees rows as they come.

    backend: as in the ops; None takes what they would take. Raises RuntimeError if it cannot run.
    """
    rows: list[Row] = []
    tasks = [(problem, n, backward) for problem in problems() for n in points for backward in (False, True)]
    end = time.perf_counter() + seconds
    for done, (problem, n, backward) in enumerate(tasks):
        chosen = choose(Call(problem.op, device), backend)
        budget = max(0.0, end - time.perf_counter()) / (len(tasks) - done) / 2  # half of it for warm-up and inputs
        inputs, function = problem.make(n, device), functools.partial(problem.function, backend=chosen)
        own, definition = _seconds(
            [_call(problem, one, inputs, backward) for one in (function, problem.definition)], budget, device
        )
        name = f"forward + backward ({', '.join(problem.wrt)})" if backward else "forward"
        rows.append(Row(problem.title, name, n, chosen, own / n * 1e9, definition / n * 1e9))
        on_row(rows[-1])
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `python -m camkernels bench`."""
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="time to take, about (20), at least two calls each"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's choice)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--backend", choices=BACKENDS, help="default: what the ops choose")


def run(options: argparse.Namespace) -> int:
    """Measures and prints the table. UserError for what this machine cannot run."""
    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads must be at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_backend(["hash_grid"], options.backend, check_device(device))
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    isa = f", kernels for {_ops.cpu_isa}" if device == "cpu" and _ops.cpu_isa else ""
    print(f"torch {torch.__version__}, {where}{isa}; ns per point, medians; reference = the same in plain PyTorch\n")
    print(f"{'op':28s} {'pass':27s} {'points':>7s} {'backend':9s} {'ns':>8s} {'reference':>9s} {'ratio':>6s}")

    def show(row: Row) -> None:
        line = f"{row.problem:28s} {row.task:27s} {row.points:7d} {row.backend:9s} {row.ns:8.0f}"
        print(f"{line} {row.definition_ns:9.0f} {row.ratio:5.1f}x", flush=True)

    measure(options.seconds, device, options.backend, on_row=show)
    return 0
