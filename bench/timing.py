# SPDX-License-Identifier: MIT
"""Interleaved timing of several tasks, and the statistics of it. Knows no op and no provider.

Rounds go through the tasks in turn, so that whatever else the machine does hits all of them alike; a speed-up is taken
within a round, and its median over the rounds is reported. A task that is slow beside its share of the time joins only
every k-th round.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

SAMPLE_S = 0.02  # a sample repeats a short call until it lasts this long
MAX_CALLS = 20
MIN_ROUNDS = 3
SHARE = 0.12  # of the time, for a task that need not join every round
CONTENDED = 0.9  # of the best calibration


def clock_for(threads: int, device: str) -> Callable[[], float]:
    """Seconds: CPU time of the process on one thread, wall time otherwise, synchronised on a GPU."""
    if device == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronised
    return time.process_time if threads == 1 else time.perf_counter


@dataclass
class Timed:
    """A task being timed: how to call it, how often, and what came out (round -> seconds per call)."""

    name: str
    run: Callable[[], object]
    always: bool = False
    calls: int = 1
    stride: int = 1
    seconds: dict[int, float] = field(default_factory=dict)

    def plan(self, estimate: float, rounds: int, budget: float, repeat: bool) -> None:
        """Calls per sample and rounds to join, from the estimated seconds of a call."""
        self.calls = min(MAX_CALLS, max(1, math.ceil(SAMPLE_S / max(estimate, 1e-9)))) if repeat else 1
        if not self.always:
            wanted = math.ceil(estimate * self.calls * rounds / max(SHARE * budget, 1e-9))
            self.stride = max(1, min(wanted, rounds // MIN_ROUNDS))


def interleave(
    tasks: list[Timed],
    rounds: int,
    budget: float,
    clock: Callable[[], float],
    before_round: Callable[[int], None] = lambda index: None,
) -> int:
    """Runs the rounds, at least 3, until `rounds` are done or `budget` seconds of wall time are spent; how many.

    The first task of a round changes, so that nobody always follows the same neighbour.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    end, done = time.perf_counter() + budget, 0
    try:
        while done < rounds and (done < MIN_ROUNDS or time.perf_counter() < end):
            before_round(done)
            turn = done % len(tasks) if tasks else 0
            for task in tasks[turn:] + tasks[:turn]:
                if done % task.stride == 0:
                    start = clock()
                    for _ in range(task.calls):
                        task.run()
                    task.seconds[done] = (clock() - start) / task.calls
            done += 1
    finally:
        if collecting:
            gc.enable()
    return done


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """{median, min, q1, q3}."""
    data = np.asarray(list(values), dtype=np.float64)
    q1, median, q3 = np.percentile(data, (25, 50, 75))
    return {"median": float(median), "min": float(data.min()), "q1": float(q1), "q3": float(q3)}


def speedup(of: dict[int, float], over: dict[int, float]) -> dict[str, float] | None:
    """Quartiles of over / of within the rounds that both joined: how many times faster `of` is; None without any."""
    common = sorted(of.keys() & over.keys())
    return quartiles(over[r] / of[r] for r in common) | {"rounds": len(common)} if common else None


def spread(ratio: dict[str, float]) -> str:
    """The median of quartiles, and the other two in brackets."""
    return f"{ratio['median']:.1f} ({ratio['q1']:.1f}-{ratio['q3']:.1f})"


def contended_share(calibrations: list[float], load: float | None, cores: int) -> float:
    """Share of rounds whose calibration was 10 % below the best; 1 if more wants to run than there are cores."""
    if load is not None and load > cores:
        return 1.0
    best = max(calibrations, default=0.0)
    return sum(rate < CONTENDED * best for rate in calibrations) / max(1, len(calibrations))
