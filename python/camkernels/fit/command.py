# SPDX-License-Identifier: MIT
"""Command lines of `fit` and `render`."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import torch

from .._backends import BACKENDS
from ..fields import MODELS

ARCHITECTURE = {  # option -> argument of the model, what it is
    "levels": ("n_levels", "resolutions of the grid (default 16)"),
    "features": ("n_features_per_level", "numbers per grid entry (default 2)"),
    "log2_size": ("log2_hashmap_size", "a level has at most 2^this entries (default: an entry per 4 to 8 pixels)"),
    "finest": ("finest_resolution", "cells of the finest level along each axis (default: pixels of the longer side)"),
    "width": ("width", "neurons per hidden layer of the perceptron (default 64, cam and fourier 256)"),
    "hidden": ("hidden_layers", "hidden layers of the perceptron (default: hash 1, hash-cam 2, cam and fourier 3)"),
    "nodes": ("nodes", "values of scale and shift along each axis, hash-cam and cam (default 32)"),
    "frequencies": ("num_frequencies", "Fourier features, cam and fourier (default 256)"),
}


def add_fit(subparsers: argparse._SubParsersAction) -> None:
    fit = subparsers.add_parser("fit", help="fit a field to data: the main job")
    kinds = fit.add_subparsers(dest="kind", required=True, metavar="KIND")
    image = kinds.add_parser(
        "image",
        help="fit a picture",
        description="Fits a picture and writes reconstruction.png, error.png, loss.png, checkpoint.pt and report.json; "
        "modulation.png too where the network is scaled and shifted. Ctrl-C ends the training early and keeps the "
        "work.",
    )
    image.add_argument("path", type=Path, help="any image that Pillow reads")
    image.add_argument("--out", type=Path, help="folder for the results (default: <name>-fit here)")
    stop = image.add_mutually_exclusive_group()
    stop.add_argument("--steps", type=_positive_int, help="training steps (default 2000)")
    stop.add_argument("--seconds", type=_positive, help="training time")
    stop.add_argument("--target-psnr", type=_positive, metavar="DB", help="train until the picture is that close")
    image.add_argument(
        "--model", choices=MODELS,
        help="hash: hash grid and perceptron (default); hash-cam: that perceptron scaled and shifted by coordinate; "
        "fourier: perceptron on random Fourier features; cam: that one scaled and shifted by coordinate",
    )  # fmt: skip
    for option, (_, text) in ARCHITECTURE.items():
        least = _count if option == "hidden" else _positive_int
        image.add_argument(f"--{option.replace('_', '-')}", type=least, metavar="N", help=text)
    image.add_argument("--batch", type=_positive_int, metavar="N", help="pixels per step (default 16384)")
    image.add_argument(
        "--lr", type=_positive,
        help="learning rate of the perceptron at the start (default 0.01, cam and fourier 0.001); a hash grid has "
        "twice that, scale and shift twice in hash-cam and ten times in cam",
    )  # fmt: skip
    image.add_argument("--seed", type=_seed, metavar="N", help="of initial values and batches (default 0)")
    _add_device(image)
    image.add_argument("--resume", type=Path, metavar="CHECKPOINT", help="go on from a checkpoint of the same picture")
    image.add_argument(
        "--compare", action="store_true", help="also time the same step in plain PyTorch and unmodulated"
    )
    image.add_argument("--quiet", action="store_true", help="print errors only")
    image.set_defaults(run=_fit_image)
    signal = kinds.add_parser(
        "signal",
        help="the one-dimensional experiment of CAM",
        description="Fits four networks to a sum of ten sines and prints their errors beside the published ones; half "
        "a minute of one core.",
    )
    signal.add_argument("--steps", type=_positive_int, default=1500, help="training steps (default 1500)")
    signal.set_defaults(run=_fit_signal)


def add_render(subparsers: argparse._SubParsersAction) -> None:
    render = subparsers.add_parser("render", help="draw a fitted picture at any size")
    render.add_argument("checkpoint", type=Path, help="checkpoint.pt of a fit")
    render.add_argument("--size", type=_size, required=True, metavar="WxH", help="width and height, such as 1920x1080")
    render.add_argument("--out", type=Path, help="file to write (default: render_WxH.png beside the checkpoint)")
    _add_device(render)
    render.set_defaults(run=_render)


def _add_device(parser: argparse.ArgumentParser) -> None:
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, help=f"cpu or cuda (default here: {best})")
    parser.add_argument("--backend", choices=BACKENDS, help="which kernels (default: the best that can run)")


def _fit_image(args: argparse.Namespace) -> int:
    from .image import Options, fit_image

    names = ("model", "steps", "seconds", "target_psnr", "batch", "lr", "seed", "device", "backend", "resume")
    given = {name: getattr(args, name) for name in (*names, "compare", "quiet")}
    architecture = {key: getattr(args, option) for option, (key, _) in ARCHITECTURE.items()}
    options = Options(
        out=args.out or Path(f"{args.path.stem or 'picture'}-fit"),
        architecture={key: value for key, value in architecture.items() if value is not None},
        **given,
    )
    return fit_image(args.path, options, say=_nothing if args.quiet else _print)


def _fit_signal(args: argparse.Namespace) -> int:
    from .signal import fit_signal

    return fit_signal(args.steps, _print)


def _render(args: argparse.Namespace) -> int:
    from .render import render

    return render(args.checkpoint, args.size, args.out, args.device, args.backend)


def _print(text: str) -> None:
    print(text, flush=True)


def _nothing(text: str) -> None:
    """Prints nothing, for --quiet."""


# ---- argument types --------------------------------------------------------------------------------------------------


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return value


def _seed(text: str) -> int:
    value = _count(text)
    if value >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} must be below 2^63")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} must be a positive number")
    return value


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match or 0 in (sides := (int(match[1]), int(match[2]))):
        raise argparse.ArgumentTypeError(f"{text!r} must be WIDTHxHEIGHT in pixels, such as 1920x1080")
    return sides


for _function in (_positive_int, _count, _seed, _positive):  # argparse says "invalid whole number value: 'x'"
    _function.__name__ = "number" if _function is _positive else "whole number"
