# SPDX-License-Identifier: MIT
"""Fit a picture: pixel centres ((column + 0.5) / width, (row + 0.5) / height) -> channels in [0, 1]."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..fields import MODELS
from ..fields.image import pixel_centres
from .checkpoint import build_model, load_checkpoint, save_checkpoint
from .compare import Comparison, compare_steps
from .errors import require
from .metrics import psnr, psnr_of_mse, ssim
from .picture import Picture, quantize, read_picture, write_picture
from .plots import write_error_picture, write_loss_curve, write_modulation_maps
from .start import Options as CommonOptions
from .start import (
    check_backend,
    check_device,
    check_folder,
    check_same_task,
    load_training,
    new_model,
    placing,
    run_report,
    settings_of,
    write_report,
)
from .trainer import Interruption, ProgressBar, Stop, Trainer

CHUNK = 1 << 17  # points per call where the whole picture is evaluated
MAP_SIDE = 256  # points along the longer side of a map of scale or shift


@dataclass
class Options(CommonOptions):
    """What the command line asks for a picture."""

    target_psnr: float | None = None
    compare: bool = False

    @property
    def stop(self) -> Stop | None:
        return super().stop if self.target_psnr is None else Stop(MOST_STEPS, target_psnr=self.target_psnr)


DEFAULT_MODEL = "hash"
MOST_STEPS = 100_000  # where only a target is given
SMALLEST_LOG2_SIZE, LARGEST_LOG2_SIZE = 14, 24
# Of NeuRBF's field; the public code has 2 levels and faster waves, for runs hundreds of times as long.
NEURBF = {"n_levels": 8, "feature_waves": [2.0**-3, 2.0**6], "decoder_waves": [5.0, 80.0]}


class Pixels:
    """The pixels of a picture on a device: random batches, and the loss of a field on them.

    All that a batch needs of a pixel is side by side, because it costs less to fetch one random row than several.
    """

    def __init__(self, picture: Picture, batch: int, device: torch.device):
        values = picture.to_tensor().to(device)
        x = pixel_centres(torch.arange(len(values), device=device), *picture.size)
        self.batch = batch
        self.widths = [x.shape[1], values.shape[1]]
        self.rows = torch.cat([x, values], 1).view(torch.int32)

    def prepare(self, model: nn.Module) -> None:
        """Finds the kernels of every pixel, for a model that has some; once."""
        if hasattr(model, "nearest"):
            neighbors = model.nearest(self.rows[:, : self.widths[0]].view(torch.float32))
            self.widths.append(neighbors.shape[1])
            self.rows = torch.cat([self.rows, neighbors.int()], 1)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Mean squared error on a batch of pixels drawn by the generator."""
        # drawn on the CPU: the same batches on every device
        index = torch.randint(len(self.rows), (self.batch,), generator=generator).to(self.rows.device)
        x, values, *neighbors = torch.split_with_sizes_copy(self.rows.index_select(0, index), self.widths, 1)
        return nn.functional.mse_loss(model(x.view(torch.float32), *neighbors), values.view(torch.float32))


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
    saved = load_checkpoint(options.resume) if options.resume else None
    if saved is None:
        name = options.model or DEFAULT_MODEL
        settings = settings_of(options, None, MODELS[name].learning_rate)
        model = new_model(MODELS, name, default_config(name, picture), options, settings.seed)
    else:
        check_same_task(options, saved, _task(picture), "picture")
        settings, name = settings_of(options, saved), saved["model"]
        model = build_model(options.resume, saved, options.backend)
    backend = check_backend(model.ops, options.backend, device)
    check_folder(options.out)
    model.to(device)
    pixels = Pixels(picture, settings.batch, device)
    start = time.monotonic()
    if saved is None:
        adapt(model, picture, settings.seed, options.quiet)
    pixels.prepare(model)
    preparation = time.monotonic() - start
    trainer = Trainer(model, pixels.loss, settings)
    load_training(trainer, options, saved)
    count = sum(p.numel() for p in model.parameters())
    say(f"{path}: {picture.describe()}")
    for note in picture.notes:
        say(f"note: {note}")
    say(f"model {name}: {count:,} parameters, {settings.stop.describe()}, on {device} with backend {backend}")
    job = _Job(path, picture, name, trainer, device, backend, options, say, preparation)
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
    preparation: float  # seconds before the first step, where the model is adapted to the picture
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
        task = _task(self.picture)
        return {"model": self.name, "config": self.model.config, "task": task} | self.trainer.state()

    def _report(self, ended: str, fitted: np.ndarray) -> dict[str, Any]:
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
            "preparation_seconds": self.preparation,
            "ended": ended,
        } | run_report(self.trainer, self.device, self.backend)

    def _write_report(self, report: dict[str, Any]) -> None:
        write_report(report, self.options.out / "report.json")

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


def _task(picture: Picture) -> dict[str, Any]:
    return {"kind": "image", "size": list(picture.size), "channels": picture.channels, "bits": picture.bits}


def adapt(model: nn.Module, picture: Picture, seed: int, quiet: bool = True) -> None:
    """Puts the kernels of a model that has some where the picture changes; the same under the same seed."""
    if not hasattr(model, "adapt"):
        return
    bar = functools.partial(require("tqdm").tqdm, desc="placing kernels", disable=quiet, file=sys.stderr)
    width, height = picture.size
    values = picture.to_tensor().to(next(model.parameters()).device).reshape(height, width, -1)
    with placing("ask for fewer kernels"):
        model.adapt(values, generator=torch.Generator().manual_seed(seed), progress=bar)


def default_config(name: str, picture: Picture) -> dict[str, Any]:
    """The arguments of a model for a picture; NeuRBF, which takes the picture's size, knows most of the others.

    Of a hash grid: finest cells as wide as a pixel of the longer side, in each level an entry per 4 to 8 pixels. With
    16 levels of 2 features this is about 0.7 parameters per number in the picture.
    """
    arguments = inspect.signature(MODELS[name]).parameters
    width, height = picture.size
    config: dict[str, Any] = {"channels": picture.channels}
    if "size" in arguments:
        return config | {"size": [width, height]} | NEURBF
    if "finest_resolution" not in arguments:
        return config
    return config | {
        "finest_resolution": max(2, width, height),
        "log2_hashmap_size": min(max((width * height).bit_length() - 3, SMALLEST_LOG2_SIZE), LARGEST_LOG2_SIZE),
    }
