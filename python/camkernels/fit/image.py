# SPDX-License-Identifier: MIT
"""Fit a picture: pixel centres ((column + 0.5) / width, (row + 0.5) / height) -> channels in [0, 1]."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__, _ops
from .._backends import Call, choose
from ..fields import MODELS
from .checkpoint import build_model, load_checkpoint, save_checkpoint
from .compare import Comparison, compare_steps
from .errors import UserError, require
from .metrics import psnr, psnr_of_mse, ssim
from .picture import Picture, quantize, read_picture, write_picture
from .plots import write_error_picture, write_loss_curve, write_modulation_maps
from .trainer import Interruption, ProgressBar, Settings, Stop, Trainer

CHUNK = 1 << 17  # points per call where the whole picture is evaluated
MAP_SIDE = 256  # points along the longer side of a map of scale or shift


@dataclass
class Options:
    """What the command line asks for; None where it leaves the choice to the fit or to the checkpoint."""

    out: Path
    model: str | None = None
    architecture: dict[str, int] = field(default_factory=dict)  # arguments of the model that were given
    steps: int | None = None
    seconds: float | None = None
    target_psnr: float | None = None
    batch: int | None = None
    lr: float | None = None
    seed: int | None = None
    device: str = "cpu"
    backend: str | None = None
    resume: Path | None = None
    compare: bool = False
    quiet: bool = False


DEFAULT_MODEL, DEFAULT_STEPS, DEFAULT_BATCH = "hash", 2000, 1 << 14
MOST_STEPS = 100_000  # where only a target is given
SMALLEST_LOG2_SIZE, LARGEST_LOG2_SIZE = 14, 24


class Pixels:
    """The pixels of a picture on a device: random batches, and the loss of a field on them."""

    def __init__(self, picture: Picture, batch: int, device: torch.device):
        self.values = picture.to_tensor().to(device)
        self.width, self.height = picture.size
        self.batch = batch

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Mean squared error on a batch of pixels drawn by the generator."""
        # drawn on the CPU: the same batches on every device
        index = torch.randint(len(self.values), (self.batch,), generator=generator).to(self.values.device)
        target = self.values.index_select(0, index)
        return nn.functional.mse_loss(model(pixel_centres(index, self.width, self.height)), target)


def pixel_centres(index: Tensor, width: int, height: int) -> Tensor:
    """Pixel numbers [N], row by row from the top left -> coordinates (x, y) [N, 2] in (0, 1)."""
    row = torch.div(index, width, rounding_mode="floor")
    x = (index - row * width).double().add_(0.5).div_(width)
    y = row.double().add_(0.5).div_(height)
    return torch.stack([x, y], -1).float()


@torch.no_grad()
def draw(model: nn.Module, width: int, height: int, bits: int, device: torch.device) -> np.ndarray:
    """The field at every pixel of a picture of that size, in chunks: [height, width, channels], 8 or 16 bit."""
    picture: np.ndarray | None = None
    for start in range(0, width * height, CHUNK):
        index = torch.arange(start, min(start + CHUNK, width * height), device=device)
        values = quantize(model(pixel_centres(index, width, height)), bits)
        if picture is None:  # room for all of it first: what will not fit fails now
            picture = np.empty((width * height, values.shape[1]), values.dtype)
        picture[start : start + len(values)] = values
    return picture.reshape(height, width, -1)


@torch.no_grad()
def modulation_maps(model: nn.Module, width: int, height: int, device: torch.device) -> np.ndarray:
    """Scale and shift of each layer all over a picture of that size: [rows, columns, layers, 2], at most 256 a side."""
    reduce = max(1.0, max(width, height) / MAP_SIDE)
    width, height = (max(1, round(side / reduce)) for side in (width, height))
    x = pixel_centres(torch.arange(width * height, device=device), width, height)
    return model.modulation(2 * x - 1).cpu().numpy().reshape(height, width, -1, 2)


def fit_image(path: Path, options: Options, say: Callable[[str], None] = print) -> int:
    """Fits the picture and writes everything; the exit status: 0, 1 if a target was missed, 130 after Ctrl-C."""
    for module in ("PIL.Image", "tqdm", "matplotlib.figure", "scipy.ndimage"):
        require(module)  # now rather than after the training
    picture = read_picture(path)
    device = check_device(options.device)
    _check_folder(options.out)
    saved = load_checkpoint(options.resume) if options.resume else None
    if saved is not None:
        _check_same_task(options, saved, picture)
    settings = _settings(options, saved)
    name, model = _model(options, saved, picture, settings)
    backend = check_backend(model.ops, options.backend, device)
    model.to(device)
    trainer = Trainer(model, Pixels(picture, settings.batch, device).loss, settings)
    if saved is not None:
        try:
            trainer.load_state(saved)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(
                f"{options.resume} is damaged: training cannot go on from it ({error}); fit again"
            ) from error
    count = sum(p.numel() for p in model.parameters())
    say(f"{path}: {picture.describe()}")
    for note in picture.notes:
        say(f"note: {note}")
    say(f"model {name}: {count:,} parameters, {settings.stop.describe()}, on {device} with backend {backend}")
    job = _Job(path, picture, name, trainer, device, backend, options, say)
    with Interruption() as interruption:
        return job.run(interruption)


@dataclass
class _Job:
    """From the first step to the last file."""

    path: Path
    picture: Picture
    name: str
    trainer: Trainer
    device: torch.device
    backend: str
    options: Options
    say: Callable[[str], None]
    failed_loss: float = math.inf  # at which the target was last found to be missed

    @property
    def model(self) -> nn.Module:
        return self.trainer.model

    @property
    def peak(self) -> int:
        return 2**self.picture.bits - 1

    def run(self, interruption: Interruption) -> int:
        bar = ProgressBar(self.trainer, lambda loss: f"PSNR {_psnr_or_nan(loss):.2f} dB", self.options.quiet)
        try:
            ended = self.trainer.run(interruption, bar.show, self._reached)
        finally:
            bar.close()
        report = self._write(ended)
        comparison = None
        if self.options.compare and not interruption.asked:
            comparison = compare_steps(self.trainer, self.backend, interruption)
            report["compare"] = comparison.to_dict() if comparison else None
            self._write_report(report)
        self._summary(report, comparison)
        if ended == "interrupted" or interruption.asked:
            again = f"--resume {self.options.out / 'checkpoint.pt'}"
            self.say(f"stopped by Ctrl-C at step {self.trainer.step}; the work is kept, {again} goes on")
            return 130
        target = self.trainer.settings.stop.target_psnr
        if target is not None and ended != "reached":
            self.say(
                f"the target of {target:g} dB was not reached; try a larger --log2-size or --finest, or more --steps"
            )
            return 1
        return 0

    def _reached(self, trainer: Trainer) -> bool:
        """Whether the target is met: by the recent batches, and then by the whole picture."""
        target, loss = trainer.settings.stop.target_psnr, trainer.recent_loss()
        if target is None or not _psnr_or_nan(loss) >= target or loss > 0.99 * self.failed_loss:
            return False
        if psnr(self._draw(), self.picture.values, self.peak) >= target:
            return True
        self.failed_loss = loss  # the whole picture is looked at again once the batches are better
        return False

    def _draw(self) -> np.ndarray:
        return draw(self.model, *self.picture.size, self.picture.bits, self.device)

    def _write(self, ended: str) -> dict[str, Any]:
        out, original = self.options.out, self.picture.values
        save_checkpoint(out / "checkpoint.pt", self._checkpoint())
        fitted = self._draw()
        write_picture(fitted, out / "reconstruction.png")
        write_error_picture(original, fitted, self.peak, out / "error.png")
        write_loss_curve(self.trainer.losses, out / "loss.png")
        if self.model.modulation is not None:
            write_modulation_maps(modulation_maps(self.model, *self.picture.size, self.device), out / "modulation.png")
        report = self._report(ended, fitted)
        self._write_report(report)
        return report

    def _checkpoint(self) -> dict[str, Any]:
        task = {
            "kind": "image",
            "size": list(self.picture.size),
            "channels": self.picture.channels,
            "bits": self.picture.bits,
        }
        return {"model": self.name, "config": self.model.config, "task": task} | self.trainer.state()

    def _report(self, ended: str, fitted: np.ndarray) -> dict[str, Any]:
        trainer, settings = self.trainer, self.trainer.settings
        parameters = list(self.model.parameters())
        value = psnr(fitted, self.picture.values, self.peak)
        return {
            "task": "image",
            "source": str(self.path),
            "size": list(self.picture.size),
            "channels": self.picture.channels,
            "bits": self.picture.bits,
            "notes": list(self.picture.notes),
            "model": self.name,
            "config": self.model.config,
            "psnr": value if math.isfinite(value) else None,  # a perfect fit has none
            "ssim": ssim(fitted, self.picture.values, self.peak),
            "parameters": sum(p.numel() for p in parameters),
            "bytes": sum(p.numel() * p.element_size() for p in parameters),
            "seconds": trainer.seconds,
            "steps": trainer.step,
            "batch": settings.batch,
            "points_per_second": trainer.points_per_second,
            "lr": settings.lr,
            "seed": settings.seed,
            "stop": settings.to_dict()["stop"],
            "ended": ended,
            "device": str(self.device),
            "backend": self.backend,
            "cpu_isa": _ops.cpu_isa,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "camkernels": __version__,
        }

    def _write_report(self, report: dict[str, Any]) -> None:
        path = self.options.out / "report.json"
        try:
            path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error}; free some space or choose another folder") from error

    def _summary(self, report: dict[str, Any], comparison: Comparison | None) -> None:
        quality = "identical" if report["psnr"] is None else f"PSNR {report['psnr']:.2f} dB, SSIM {report['ssim']:.4f}"
        speed = f"{report['points_per_second'] / 1e6:.2f} M points/s"
        self.say(f"{quality} after {report['steps']} steps, {report['seconds']:.1f} s, {speed}")
        if comparison is not None:
            self.say(comparison.describe())
        maps = "" if self.model.modulation is None else "modulation.png, "
        files = f"reconstruction.png, error.png, loss.png, {maps}checkpoint.pt, report.json"
        self.say(f"written to {self.options.out}: {files}")


def _psnr_or_nan(loss: float) -> float:
    return psnr_of_mse(loss) if math.isfinite(loss) else math.nan


# ---- what a run starts from ------------------------------------------------------------------------------------------


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


def _check_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".camkernels-write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"the output folder {out} cannot be written: {error}; choose another with --out") from error


def _check_same_task(options: Options, saved: dict[str, Any], picture: Picture) -> None:
    """A run goes on with the picture and the architecture that it started with."""
    task, now = saved["task"], {"size": list(picture.size), "channels": picture.channels, "bits": picture.bits}
    if task.get("kind") != "image":
        raise UserError(f"{options.resume} is a fit of kind {task.get('kind')!r}, not of an image")
    for name, value in now.items():
        if task.get(name) != value:
            raise UserError(
                f"{options.resume} was fitted to a picture of {name} {task.get(name)}, this one has {value}; "
                "give the same picture, or leave --resume out"
            )
    given = options.architecture | ({"model": options.model} if options.model else {})
    for name, value in given.items():
        kept = saved["model"] if name == "model" else saved["config"].get(name)
        if kept != value:
            raise UserError(
                f"{options.resume} is of another architecture: {name} is {kept!r} there, {value!r} was asked for; "
                "leave that option out, or leave --resume out to start anew"
            )


def _settings(options: Options, saved: dict[str, Any] | None) -> Settings:
    """What was given, else what the checkpoint continues with, else the defaults."""
    given = {name: getattr(options, name) for name in ("batch", "lr", "seed") if getattr(options, name) is not None}
    limits = (options.steps, options.seconds, options.target_psnr)
    if options.target_psnr is not None:
        given["stop"] = Stop(steps=MOST_STEPS, target_psnr=options.target_psnr)
    elif any(limit is not None for limit in limits):
        given["stop"] = Stop(*limits)
    if saved is None:
        rate = MODELS[options.model or DEFAULT_MODEL].learning_rate
        return Settings(**{"stop": Stop(DEFAULT_STEPS), "batch": DEFAULT_BATCH, "lr": rate, "seed": 0} | given)
    if options.seed is not None and options.seed != saved["training"].get("seed"):
        raise UserError(f"{options.resume} goes on with the random numbers it was saved with; leave --seed out")
    try:
        kept = {name: saved["training"][name] for name in ("stop", "batch", "lr", "seed")}
        return Settings.from_dict(
            kept | {name: value for name, value in given.items() if name != "stop"} | _stop(given)
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{options.resume} is damaged: its training settings are incomplete ({error}); fit again"
        ) from error


def _stop(given: dict[str, Any]) -> dict[str, Any]:
    return {"stop": vars(given["stop"])} if "stop" in given else {}


def _model(
    options: Options, saved: dict[str, Any] | None, picture: Picture, settings: Settings
) -> tuple[str, nn.Module]:
    if saved is not None:
        return saved["model"], build_model(options.resume, saved, options.backend)
    name = options.model or DEFAULT_MODEL
    arguments = [argument for argument in inspect.signature(MODELS[name]).parameters if argument != "backend"]
    for argument in options.architecture:
        if argument not in arguments:
            raise UserError(f"model {name} has no {argument}; leave that option out (it has {', '.join(arguments)})")
    defaults = {argument: value for argument, value in default_config(picture).items() if argument in arguments}
    config = {"channels": picture.channels} | defaults | options.architecture
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            return name, MODELS[name](**config, backend=options.backend)
        except (ValueError, TypeError) as error:
            raise UserError(f"the model cannot be built: {error}") from error


def default_config(picture: Picture) -> dict[str, int]:
    """Of a hash grid: finest cells as wide as a pixel of the longer side, in each level an entry per 4 to 8 pixels.

    With 16 levels of 2 features this is about 0.7 parameters per number in the picture.
    """
    width, height = picture.size
    return {
        "finest_resolution": max(2, width, height),
        "log2_hashmap_size": min(max((width * height).bit_length() - 3, SMALLEST_LOG2_SIZE), LARGEST_LOG2_SIZE),
    }
