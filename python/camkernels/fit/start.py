# SPDX-License-Identifier: MIT
"""What a run starts from and what it reports, whatever is fitted: options, device, folder, settings, model."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, _ops
from .._backends import Call, choose
from .errors import UserError
from .trainer import Settings, Stop, Trainer

DEFAULT_STEPS, DEFAULT_BATCH = 2000, 1 << 14


@dataclass
class Options:
    """What the command line asks for; None where it leaves the choice to the fit or to the checkpoint."""

    out: Path
    model: str | None = None
    architecture: dict[str, int] = field(default_factory=dict)  # arguments of the model that were given
    steps: int | None = None
    seconds: float | None = None
    batch: int | None = None
    lr: float | None = None
    seed: int | None = None
    device: str = "cpu"
    backend: str | None = None
    resume: Path | None = None
    quiet: bool = False

    @property
    def stop(self) -> Stop | None:
        """The stop rule that was asked for."""
        return None if self.steps is None and self.seconds is None else Stop(self.steps, self.seconds)


@contextlib.contextmanager
def placing(remedy: str) -> Iterator[None]:
    """Within, kernels are placed where the data are; UserError where that fails."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"the kernels cannot be placed: {error}; {remedy}") from error


def check_device(name: str) -> torch.device:
    """The device; UserError if this machine or this PyTorch has none such."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is unknown; use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices here; use --device cpu"
        )
    return device


def check_backend(ops: Sequence[str], name: str | None, device: torch.device) -> str:
    """The backend that computes these ops, or each with its ops; UserError with the reason if one asked for cannot."""
    try:
        found = {op: choose(Call(op, device.type), name) for op in ops}
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{error}; leave --backend out to take the best") from error
    shares = {backend: [op for op in ops if found[op] == backend] for backend in found.values()}
    return next(iter(shares)) if len(shares) == 1 else " and ".join(f"{b} ({', '.join(o)})" for b, o in shares.items())


def check_folder(out: Path) -> None:
    """Makes the folder for the results; UserError if nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".camkernels-write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"the output folder {out} cannot be written: {error}; choose another with --out") from error


def check_same_task(options: Options, saved: Mapping[str, Any], task: Mapping[str, Any], noun: str) -> None:
    """UserError unless a run goes on with the data, named `noun`, and the architecture that it started with."""
    kept = saved["task"]
    if kept.get("kind") != task["kind"]:
        raise UserError(f"{options.resume} is a fit of kind {kept.get('kind')!r}, not of kind {task['kind']!r}")
    for name, value in task.items():
        if name == "digest" and name not in kept:  # a checkpoint of an earlier version
            continue
        if kept.get(name) != value:
            raise UserError(
                f"{options.resume} was fitted to a {noun} of {name} {kept.get(name)}, this one has {value}; "
                f"give the same {noun}, or leave --resume out"
            )
    given = options.architecture | ({"model": options.model} if options.model else {})
    for name, value in given.items():
        before = saved["model"] if name == "model" else saved["config"].get(name)
        if before != value:
            raise UserError(
                f"{options.resume} is of another architecture: {name} is {before!r} there, {value!r} was asked for; "
                "leave that option out, or leave --resume out to start anew"
            )


def settings_of(options: Options, saved: Mapping[str, Any] | None, rate: float | None = None) -> Settings:
    """What was given, else what the checkpoint continues with, else the defaults with that learning rate."""
    given = {name: getattr(options, name) for name in ("stop", "batch", "lr", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if saved is None:
        return replace(Settings(Stop(DEFAULT_STEPS), DEFAULT_BATCH, rate), **given)
    if options.seed is not None and options.seed != saved["training"].get("seed"):
        raise UserError(f"{options.resume} goes on with the random numbers it was saved with; leave --seed out")
    try:
        kept = Settings.from_dict({name: saved["training"][name] for name in ("stop", "batch", "lr", "seed")})
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{options.resume} is damaged: its training settings are incomplete ({error}); fit again"
        ) from error
    return replace(kept, **given)


def new_model(
    models: Mapping[str, type[nn.Module]], name: str, defaults: Mapping[str, Any], options: Options, seed: int
) -> nn.Module:
    """The model of that name with the arguments that were given, else the defaults that it has, drawn with the seed."""
    arguments = [argument for argument in inspect.signature(models[name]).parameters if argument != "backend"]
    for argument in options.architecture:
        if argument not in arguments:
            raise UserError(f"model {name} has no {argument}; leave that option out (it has {', '.join(arguments)})")
    config = {argument: value for argument, value in defaults.items() if argument in arguments} | options.architecture
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return models[name](**config, backend=options.backend)
        except (ValueError, TypeError) as error:
            raise UserError(f"the model cannot be built: {error}") from error


def load_training(trainer: Trainer, options: Options, saved: Mapping[str, Any] | None) -> None:
    """Lets the trainer go on where the checkpoint, if there is one, was saved; UserError if that is damaged."""
    if saved is None:
        return
    try:
        trainer.load_state(saved)
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{options.resume} is damaged: training cannot go on from it ({error}); fit again") from error


def run_report(trainer: Trainer, device: torch.device, backend: str) -> dict[str, Any]:
    """What a report says of a training run on any data."""
    settings, parameters = trainer.settings, list(trainer.model.parameters())
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "seconds": trainer.seconds,
        "steps": trainer.step,
        "batch": settings.batch,
        "points_per_second": trainer.points_per_second,
        "lr": settings.lr,
        "seed": settings.seed,
        "stop": settings.to_dict()["stop"],
        "device": str(device),
        "backend": backend,
        "cpu_isa": _ops.cpu_isa,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "camkernels": __version__,
    }


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Writes the report as JSON."""
    try:
        path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; free some space or choose another folder") from error
