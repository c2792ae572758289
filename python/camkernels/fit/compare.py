# SPDX-License-Identifier: MIT
"""The same training step with the compiled kernels and in plain PyTorch, timed in turns."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from .trainer import Interruption, Trainer

ROUNDS, FASTER_PER_ROUND = 5, 5


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds, in seconds per training step."""

    backend: str
    step: float
    plain_step: float | None  # None where plain PyTorch is what computes
    unmodulated_step: float | None  # None for models without modulation
    unmodulated_plain_step: float | None
    batch: int
    rounds: int

    @property
    def ratio(self) -> float | None:
        return None if self.plain_step is None else self.plain_step / self.step

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "step_seconds": self.step,
            "plain_pytorch_step_seconds": self.plain_step,
            "unmodulated_step_seconds": self.unmodulated_step,
            "unmodulated_plain_pytorch_step_seconds": self.unmodulated_plain_step,
            "ratio": self.ratio,
            "batch": self.batch,
            "rounds": self.rounds,
        }

    def describe(self) -> str:
        """One sentence, for a modulated model a second one."""
        times = _side_by_side(self.step, self.plain_step)
        text = f"one training step on {self.batch:,} points with backend {self.backend}: {times}"
        if self.unmodulated_step is None:
            return text
        return f"{text}\nwithout modulation: {_side_by_side(self.unmodulated_step, self.unmodulated_plain_step)}"


def _side_by_side(step: float, plain: float | None) -> str:
    text = f"{step * 1e3:.1f} ms"
    return text if plain is None else f"{text}, {plain * 1e3:.1f} ms in plain PyTorch, {plain / step:.1f} times as long"


def compare_steps(trainer: Trainer, backend: str, interruption: Interruption) -> Comparison | None:
    """Times the whole step (draw, forward, backward, Adam) on copies; None if there is nothing to compare.

    As it is, in plain PyTorch (`camkernels.reference`), and both without modulation if the model has one. They take
    turns, so that other load on the machine meets all.
    """
    ways = [(False, False), (True, False), (False, True), (True, True)]  # (plain PyTorch, unmodulated)
    if backend == "reference":
        ways = [way for way in ways if not way[0]]
    if trainer.model.modulation is None:
        ways = [way for way in ways if not way[1]]
    if len(ways) == 1:
        return None
    rivals = {way: _copy(trainer, *way) for way in ways}
    for rival in rivals.values():
        _time_steps(rival, 1)
    times: dict[tuple[bool, bool], list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, rival in rivals.items():
            if interruption.asked:
                return None
            times[way].append(_time_steps(rival, 1 if way[0] else FASTER_PER_ROUND))
    medians = {way: statistics.median(values) for way, values in times.items()}
    return Comparison(
        backend, medians[False, False], medians.get((True, False)), medians.get((False, True)),
        medians.get((True, True)), trainer.settings.batch, ROUNDS,
    )  # fmt: skip


def _copy(trainer: Trainer, plain: bool, unmodulated: bool) -> Trainer:
    model = copy.deepcopy(trainer.model)
    if unmodulated:
        model.modulation = None
    if plain:
        for module in model.modules():
            if hasattr(module, "backend"):
                module.backend = "reference"
    return Trainer(model, trainer.draw_loss, trainer.settings)


def _time_steps(trainer: Trainer, count: int) -> float:
    _synchronize()
    start = time.perf_counter()
    for _ in range(count):
        trainer.advance()
    _synchronize()
    return (time.perf_counter() - start) / count


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
