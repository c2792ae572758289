# SPDX-License-Identifier: MIT
"""The training loop, ignorant of what is fitted: stop rule, learning rate, progress, losses, interruption, resuming."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError, require

# Adam as instant-ngp sets it: hash entries that are seldom hit get gradients as small as the square of 1e-8.
BETAS, EPS = (0.9, 0.99), 1e-15
HOLD, FINAL = 0.3, 0.02  # the rate is constant for this share of the run, then falls exponentially to this share of it
REFRESH = 0.3  # seconds between looks at the loss
WINDOW = 20  # steps over which a loss shown is averaged


@dataclass(frozen=True)
class Stop:
    """When a run ends: after `steps`, after `seconds` of training, or at `target_psnr`, then at most after `steps`."""

    steps: int | None = None
    seconds: float | None = None
    target_psnr: float | None = None

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is done, in [0, 1]."""
        if self.seconds is not None:
            return min(1.0, seconds / self.seconds)
        return min(1.0, step / self.steps) if self.steps else 1.0

    def describe(self) -> str:
        if self.seconds is not None:
            return f"{self.seconds:g} seconds"
        if self.target_psnr is not None:
            return f"up to {self.target_psnr:g} dB, at most {self.steps} steps"
        return f"{self.steps} steps"


@dataclass(frozen=True)
class Settings:
    """What a run needs besides model and data; kept in checkpoints."""

    stop: Stop
    batch: int
    lr: float
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        return cls(**{**values, "stop": Stop(**values["stop"])})


class Interruption:
    """While entered, the first Ctrl-C only sets `asked`; a second one stops the program as usual."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def hold_then_fall(done: float) -> float:
    """Factor of the learning rates when a share of the run is done."""
    return FINAL ** max(0.0, (done - HOLD) / (1 - HOLD))


class Trainer:
    """Minimises draw_loss(model, generator) with Adam under a stop rule; `state` and `load_state` make it resumable.

    The model names its parameters and their rates in `parameter_groups(lr)`; the rates are multiplied by its
    `decay(done)`, or `hold_then_fall(done)` where it has none, done being the share of the run.

    Two runs with equal settings and steps see the same numbers, also if one was saved and loaded in between.
    """

    def __init__(self, model: nn.Module, draw_loss: Callable[[nn.Module, torch.Generator], Tensor], settings: Settings):
        self.model = model
        self.draw_loss = draw_loss
        self.settings = settings
        groups = model.parameter_groups(settings.lr)
        self.optimizer = torch.optim.Adam(groups, betas=BETAS, eps=EPS, fused=True)
        self._decay = getattr(model, "decay", hold_then_fall)
        self._rates = [group["lr"] for group in groups]
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = self.points = 0
        self.seconds = 0.0
        self.losses: list[float] = []

    @property
    def points_per_second(self) -> float:
        return self.points / self.seconds if self.seconds > 0 else 0.0

    def recent_loss(self) -> float:
        """Mean of the last losses; NaN before the first step."""
        recent = self.losses[-WINDOW:]
        return sum(recent) / len(recent) if recent else math.nan

    def advance(self) -> Tensor:
        """One training step; the loss, detached."""
        done = self.settings.stop.progress(self.step, self.seconds)
        decay = self._decay(done)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * decay
        for parameter in self._parameters:  # zero_grad of the optimizer takes 60 us
            parameter.grad = None
        loss = self.draw_loss(self.model, self.generator)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.points += self.settings.batch
        return loss.detach()

    def run(
        self,
        interruption: Interruption,
        show: Callable[[Trainer], None],
        reached: Callable[[Trainer], bool] = lambda trainer: False,
    ) -> str:
        """Trains until the stop rule holds; says why it ended: "finished", "reached" or "interrupted".

        show is called about three times a second, and so is reached, which may end the run.
        """
        start = time.monotonic() - self.seconds
        next_look = time.monotonic() + REFRESH
        pending: list[Tensor] = []
        ended = None
        while ended is None and self.settings.stop.progress(self.step, self.seconds) < 1:
            pending.append(self.advance())
            self.seconds = time.monotonic() - start
            if time.monotonic() >= next_look or interruption.asked:
                self._collect(pending)
                show(self)
                next_look = time.monotonic() + REFRESH
                ended = "interrupted" if interruption.asked else "reached" if reached(self) else None
        self._collect(pending)
        show(self)
        return ended or ("reached" if reached(self) else "finished")

    def _collect(self, pending: list[Tensor]) -> None:
        if pending:
            self.losses += torch.stack(pending).tolist()
            pending.clear()
        if self.losses and not math.isfinite(self.losses[-1]):
            raise UserError(
                f"the loss is no longer finite at step {self.step}; lower --lr (it is {self.settings.lr:g})"
            )

    def state(self) -> dict[str, Any]:
        """Everything a run continues from: state, optimizer, step, rng, training."""
        return {
            "state": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rng": self.generator.get_state(),
            "training": self.settings.to_dict()
            | {"elapsed": self.seconds, "points": self.points, "losses": torch.tensor(self.losses)},
        }

    def load_state(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["state"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.generator.set_state(saved["rng"])
        self.step = int(saved["step"])
        self.seconds = float(saved["training"]["elapsed"])
        self.points = int(saved["training"]["points"])
        self.losses = saved["training"]["losses"].tolist()


class ProgressBar:
    """A line on stderr: how far, how fast, and the quality that `quality(loss)` words."""

    def __init__(self, trainer: Trainer, quality: Callable[[float], str], quiet: bool):
        tqdm = require("tqdm").tqdm
        stop = trainer.settings.stop
        self._timed, self._quality = stop.seconds is not None, quality
        self._points, self._began = trainer.points, trainer.seconds
        unit = "s" if self._timed else " steps"
        counter = "{n:.0f}/{total:.0f}" if self._timed else "{n_fmt}/{total_fmt}"
        self._total = stop.seconds if self._timed else stop.steps
        self._bar = tqdm(
            total=self._total,
            initial=self._done(trainer),
            bar_format="{desc}: {percentage:3.0f}%|{bar:24}| " + counter + unit + "{postfix}",
            desc="fitting",
            disable=quiet,
            mininterval=0 if sys.stderr.isatty() else 5,  # a log gets a line now and then
            file=sys.stderr,
        )

    def _done(self, trainer: Trainer) -> float:
        return min(trainer.seconds if self._timed else trainer.step, self._total)

    def show(self, trainer: Trainer) -> None:
        since = max(trainer.seconds - self._began, 1e-9)
        rate = (trainer.points - self._points) / since
        self._bar.set_postfix_str(f"{self._quality(trainer.recent_loss())}, {rate / 1e6:.2f} M points/s", refresh=False)
        self._bar.update(self._done(trainer) - self._bar.n)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()
