# SPDX-License-Identifier: MIT
"""The pictures that explain a fit: where the error is, how the loss fell, where the network is scaled and shifted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import UserError, require

LONGEST = 1600  # pixels of the longer side of the error picture, beyond which it is reduced
DPI = 100


def write_error_picture(original: np.ndarray, fitted: np.ndarray, peak: float, path: Path) -> None:
    """|original - fitted|, mean over channels, in percent of white; the colours end at its 99.9th percentile."""
    error = np.abs(original.astype(np.float32) - fitted).mean(-1) * (100 / peak)
    top = max(float(np.percentile(error, 99.9)), 100 / peak)
    height, width = error.shape
    reduce = max(1, -(-max(height, width) // LONGEST))
    enlarge = max(1.0, 400 / max(height, width))
    across, down = (max(200.0, side / reduce * enlarge) for side in (width, height))
    margins = {"left": 20, "right": 110, "top": 40, "bottom": 15}  # pixels
    total = (across + margins["left"] + margins["right"], down + margins["top"] + margins["bottom"])
    figure = require("matplotlib.figure").Figure(figsize=(total[0] / DPI, total[1] / DPI), dpi=DPI)
    place = (margins["left"] / total[0], margins["bottom"] / total[1], across / total[0], down / total[1])
    axes = figure.add_axes(place)
    shown = axes.imshow(error[::reduce, ::reduce], cmap="inferno", vmin=0, vmax=top, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(f"absolute error in % of white, mean {error.mean():.2f}, largest {error.max():.1f}", fontsize=10)
    bar = figure.add_axes((place[0] + place[2] + 15 / total[0], place[1], 15 / total[0], place[3]))
    figure.colorbar(shown, cax=bar, extend="max", format="%.3g")
    _save(figure, path)


def write_loss_curve(losses: list[float], path: Path, name: str = "mean squared error") -> None:
    """The loss of every step, its running mean, and the PSNR that a mean squared error stands for."""
    figure = require("matplotlib.figure").Figure(figsize=(8, 4.5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    values = np.maximum(np.asarray(losses, dtype=np.float64), 1e-12)
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color="tab:blue", alpha=0.35, linewidth=0.8, label="each step")
    window = max(1, len(values) // 100)
    if window > 1:
        smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel=name, yscale="log", title="loss on random points")
    axes.grid(alpha=0.3)
    axes.legend()
    if name == "mean squared error":
        decibels = axes.twinx()
        decibels.set_ylim(*(-10 * np.log10(limit) for limit in axes.get_ylim()))  # linear where the loss is logarithmic
        decibels.set_ylabel("PSNR in dB")
    _save(figure, path)


def write_modulation_maps(maps: np.ndarray, path: Path) -> None:
    """Scale (above) and shift (below) of every hidden layer over the picture, from maps [height, width, layers, 2]."""
    layers = maps.shape[2]
    size = (1.5 + 3 * layers, 0.6 + 6 * min(2.0, maps.shape[0] / maps.shape[1]))
    figure = require("matplotlib.figure").Figure(figsize=size, dpi=DPI, layout="constrained")
    rows = figure.subplots(2, layers, squeeze=False)
    for k, (name, identity) in enumerate((("gamma", 1.0), ("beta", 0.0))):
        reach = max(float(np.abs(maps[..., k] - identity).max()), 1e-3)  # white is what changes nothing
        for layer, axes in enumerate(rows[k]):
            shown = axes.imshow(maps[:, :, layer, k], cmap="RdBu_r", vmin=identity - reach, vmax=identity + reach)
            axes.set_title(f"{name}, hidden layer {layer}", fontsize=10)
            axes.set_axis_off()
        figure.colorbar(shown, ax=list(rows[k]), format="%.3g")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; free some space or choose another folder") from error
