# SPDX-License-Identifier: MIT
"""Command lines of `fit` and `render`."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

import torch

from .._backends import BACKENDS
from ..fields import MODELS, SHAPE_MODELS

ARCHITECTURE = {  # option -> argument of the model, what it is
    "levels": ("n_levels", "resolutions of the grid (default 16, neurbf 8)"),
    "features": ("n_features_per_level", "numbers per grid entry (default 2)"),
    "log2_size": (
        "log2_hashmap_size",
        "a level has at most 2^this entries (default: one per 4 to 8 pixels, neurbf 24)",
    ),
    "finest": (
        "finest_resolution",
        "cells of the finest level along an axis (default: longer side, neurbf half of it)",
    ),
    "width": ("width", "neurons per hidden layer of the perceptron (default 64, cam and fourier 256)"),
    "hidden": (
        "hidden_layers",
        "hidden layers of the perceptron (default: hash 1, hash-cam, neurbf 2, cam, fourier 3)",
    ),
    "nodes": ("nodes", "values of scale and shift along each axis, hash-cam and cam (default 32)"),
    "frequencies": ("num_frequencies", "Fourier features, cam and fourier (default 256)"),
    "kernels": ("kernels", "radial kernels, neurbf (default: as many parameters as a hash grid of 16 levels)"),
    "parameters": (
        "parameters",
        "instead of --kernels and --finest: numbers to be held in all, neurbf; that of another model is in its "
        "report.json",
    ),
}
SHAPE_ARCHITECTURE = {
    "levels": ("n_levels", "resolutions of the grid (default 16)"),
    "features": ("n_features_per_level", "numbers per grid entry (default: hash 2, neurbf 1)"),
    "log2_size": ("log2_hashmap_size", "a level has at most 2^this entries (default 15)"),
    "finest": ("finest_resolution", "cells of the finest level along each axis (default 512)"),
    "width": ("width", "neurons per hidden layer of the perceptron (default 64)"),
    "hidden": ("hidden_layers", "hidden layers of the perceptron (default 2)"),
    "kernels": ("kernels", "radial kernels, neurbf (default 4000)"),
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
    stop = _add_stop(image)
    stop.add_argument("--target-psnr", type=_positive, metavar="DB", help="train until the picture is that close")
    image.add_argument(
        "--model", choices=MODELS,
        help="hash: hash grid and perceptron (default); hash-cam: that perceptron scaled and shifted by coordinate; "
        "fourier: perceptron on random Fourier features; cam: that one scaled and shifted by coordinate; "
        "neurbf: hash grid and radial kernels placed at the edges of the picture, and perceptron",
    )  # fmt: skip
    _add_architecture(image, ARCHITECTURE)
    image.add_argument("--batch", type=_positive_int, metavar="N", help="pixels per step (default 16384)")
    image.add_argument(
        "--lr", type=_positive,
        help="learning rate of the perceptron at the start (default 0.01, neurbf 0.005, cam and fourier 0.001); a "
        "hash grid has twice that, in neurbf four times; kernels twice; scale and shift twice in hash-cam, ten times "
        "in cam",
    )  # fmt: skip
    image.add_argument(
        "--compare", action="store_true", help="also time the same step in plain PyTorch and unmodulated"
    )
    _add_run(image, "picture")
    image.set_defaults(run=_fit_image)
    _add_shape(kinds)
    signal = kinds.add_parser(
        "signal",
        help="the one-dimensional experiment of CAM",
        description="Fits four networks to a sum of ten sines and prints their errors beside the published ones; half "
        "a minute of one core.",
    )
    signal.add_argument("--steps", type=_positive_int, default=1500, help="training steps (default 1500)")
    signal.set_defaults(run=_fit_signal)


def _add_shape(kinds: argparse._SubParsersAction) -> None:
    shape = kinds.add_parser(
        "shape",
        help="fit a mesh by its signed distance",
        description="Fits the signed distance of a closed mesh and writes mesh.ply, view.png, loss.png, checkpoint.pt "
        "and report.json. Ctrl-C ends the training early and keeps the work.",
    )
    shape.add_argument("path", type=Path, help="a watertight mesh in any file that trimesh reads: PLY, OBJ, STL, ...")
    _add_stop(shape)
    shape.add_argument(
        "--model", choices=SHAPE_MODELS,
        help="hash: hash grid and perceptron (default); neurbf: hash grid, radial kernels at the surface, perceptron",
    )  # fmt: skip
    _add_architecture(shape, SHAPE_ARCHITECTURE)
    shape.add_argument("--batch", type=_positive_int, metavar="N", help="points per step (default 16384)")
    shape.add_argument("--lr", type=_positive, help="learning rate at the start")
    shape.add_argument(
        "--samples", type=_positive_int, metavar="N",
        help="points whose exact distances are computed before the training (default 2^20)",
    )  # fmt: skip
    shape.add_argument(
        "--resolution", type=_positive_int, metavar="N", help="cells a side of the cube that mesh.ply is cut from (256)"
    )
    _add_run(shape, "mesh")
    shape.set_defaults(run=_fit_shape)


def add_render(subparsers: argparse._SubParsersAction) -> None:
    render = subparsers.add_parser("render", help="draw a fitted picture or shape at any size")
    render.add_argument("checkpoint", type=Path, help="checkpoint.pt of a fit")
    render.add_argument("--size", type=_size, required=True, metavar="WxH", help="width and height, such as 1920x1080")
    render.add_argument("--out", type=Path, help="file to write (default: render_WxH.png beside the checkpoint)")
    _add_device(render)
    render.set_defaults(run=_render)


def _add_stop(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    parser.add_argument("--out", type=Path, help="folder for the results (default: <name>-fit here)")
    stop = parser.add_mutually_exclusive_group()
    stop.add_argument("--steps", type=_positive_int, help="training steps (default 2000)")
    stop.add_argument("--seconds", type=_positive, help="training time")
    return stop


def _add_architecture(parser: argparse.ArgumentParser, architecture: dict[str, tuple[str, str]]) -> None:
    for option, (_, text) in architecture.items():
        least = _count if option == "hidden" else _positive_int
        parser.add_argument(f"--{option.replace('_', '-')}", type=least, metavar="N", help=text)


def _add_run(parser: argparse.ArgumentParser, noun: str) -> None:
    parser.add_argument("--seed", type=_seed, metavar="N", help="of initial values and batches (default 0)")
    _add_device(parser)
    parser.add_argument("--resume", type=Path, metavar="CHECKPOINT", help=f"go on from a checkpoint of the same {noun}")
    parser.add_argument("--quiet", action="store_true", help="print errors only")


def _add_device(parser: argparse.ArgumentParser) -> None:
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, help=f"cpu or cuda (default here: {best})")
    parser.add_argument("--backend", choices=BACKENDS, help="which kernels (default: the best that can run)")


def _fit_image(args: argparse.Namespace) -> int:
    from .image import Options, fit_image

    options = Options(**_run_options(args, ARCHITECTURE), target_psnr=args.target_psnr, compare=args.compare)
    return fit_image(args.path, options, say=_nothing if args.quiet else _print)


def _fit_shape(args: argparse.Namespace) -> int:
    from .shape import ShapeOptions, fit_shape

    given = {name: getattr(args, name) for name in ("samples", "resolution") if getattr(args, name) is not None}
    options = ShapeOptions(**_run_options(args, SHAPE_ARCHITECTURE), **given)
    return fit_shape(args.path, options, say=_nothing if args.quiet else _print)


def _run_options(args: argparse.Namespace, architecture: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """What `Options` is made from, whatever is fitted."""
    names = ("model", "steps", "seconds", "batch", "lr", "seed", "device", "backend", "resume", "quiet")
    given = {key: getattr(args, option) for option, (key, _) in architecture.items()}
    return {
        "out": args.out or Path(f"{args.path.stem or args.kind}-fit"),
        "architecture": {key: value for key, value in given.items() if value is not None},
    } | {name: getattr(args, name) for name in names}


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
