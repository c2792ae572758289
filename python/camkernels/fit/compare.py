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
    plain_step: float
    batch: int
    rounds: int

    @property
    def ratio(self) -> float:
        return self.plain_step / self.step

    def to_dict(self) -> dict[str, Any]:
        return {
            "backend": self.backend,
            "step_seconds": self.step,
            "plain_pytorch_step_seconds": self.plain_step,
            "ratio": self.ratio,
            "batch": self.batch,
            "rounds": self.rounds,
        }

    def describe(self) -> str:
        return (
            f"one training step on {self.batch:,} points: {self.step * 1e3:.1f} ms with backend {self.backend}, "
            f"{self.plain_step * 1e3:.1f} ms in plain PyTorch, {self.ratio:.1f} times as long"
        )


def compare_steps(trainer: Trainer, backend: str, interruption: Interruption) -> Comparison | None:
    """Times the whole step (draw, forward, backward, Adam) of both on copies; None if there is nothing to compare.

    Plain PyTorch is `camkernels.reference`. The two take turns, so that other load on the machine meets both.
    """
    if backend == "reference":
        return None
    rivals = {name: _copy(trainer, name) for name in (backend, "reference")}
    for rival in rivals.values():
        _time_steps(rival, 1)
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(ROUNDS):
        for name, rival in rivals.items():
            if interruption.asked:
                return None
            times[name].append(_time_steps(rival, 1 if name == "reference" else FASTER_PER_ROUND))
    fast, plain = (statistics.median(times[name]) for name in rivals)
    return Comparison(backend, fast, plain, trainer.settings.batch, ROUNDS)


def _copy(trainer: Trainer, backend: str) -> Trainer:
    model = copy.deepcopy(trainer.model)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
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
