# SPDX-License-Identifier: MIT
"""NeuRBF against a hash grid of as many parameters: `python -m bench.neurbf_quality [--picture FILE] [--out FILE]`.

For every size of the hash table, `python -m camkernels fit image` fits the picture with --model hash, once for each
finest resolution, and with --model neurbf and as many --parameters as the best of those has; equal steps, batch, seed
and decoder. The table has the best hash grid beside NeuRBF; --out keeps every run with its command, a JSON record a
line.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from camkernels.__main__ import main as camkernels
from camkernels.fit.picture import read_picture

from . import ROOT

PHOTO = ROOT / "bench" / "data" / "photo.jpg"
LOG2_SIZES = (12, 14, 15, 17)
DIVISORS = (1, 2)  # of the picture's longer side: the finest resolutions that hash grids are tried with
KEPT = ("model", "parameters", "seconds", "lr", "config", "backend", "cpu_isa", "threads", "torch", "camkernels")
OF_A_JOB = {"image": ("psnr", "ssim", "preparation_seconds"), "shape": ("iou", "normal_error_degrees", "steps")}


def fit(arguments: Sequence[str], job: str = "image") -> dict[str, Any]:
    """Fits by the command; the command and what its report says. Raises RuntimeError if it fails."""
    command = ["fit", job, *arguments]
    with tempfile.TemporaryDirectory() as folder:
        status = camkernels([*command, "--out", folder, "--quiet"])
        if status:
            raise RuntimeError(f"{shlex.join(command)} ended with status {status}")
        report = json.loads((Path(folder) / "report.json").read_text())
    found = {"command": f"python -m camkernels {shlex.join(command)}"}
    return found | {key: report[key] for key in (*OF_A_JOB[job], *KEPT)}


def rivals(common: Sequence[str], log2_size: int, resolutions: Sequence[int]) -> list[dict[str, Any]]:
    """The runs of one size: hash grids of these finest resolutions, then NeuRBF as large as the best of them."""
    size = ["--log2-size", str(log2_size)]
    runs = [fit([*common, "--model", "hash", *size, "--finest", str(finest)]) for finest in resolutions]
    best = max(runs, key=lambda run: run["psnr"])
    return [*runs, fit([*common, "--model", "neurbf", "--parameters", str(best["parameters"])])]


def by_size(runs: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The runs of each size: hash grids, then NeuRBF."""
    group: list[dict[str, Any]] = []
    for run in runs:
        group.append(run)
        if run["model"] == "neurbf":
            yield group
            group = []


def row(runs: Sequence[dict[str, Any]]) -> str:
    """A line of the table: the runs of one size."""
    *grids, neurbf = runs
    best = max(grids, key=lambda run: run["psnr"])
    sides = (f"{run['parameters']:,} | {run['psnr']:.2f} | {run['ssim']:.4f} | {run['seconds']:.0f}"
             for run in (best, neurbf))  # fmt: skip
    return f"| {' | '.join(sides)} | {neurbf['psnr'] - best['psnr']:+.2f} | {neurbf['ssim'] - best['ssim']:+.4f} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Fits, and prints a line of the table per size."""
    parser = argparse.ArgumentParser(prog="python -m bench.neurbf_quality", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--picture",
        type=Path,
        default=Path(os.path.relpath(PHOTO)),
        help="default: the photograph of the demonstration",
    )
    parser.add_argument("--log2-sizes", type=int, nargs="+", default=LOG2_SIZES, help="of the hash tables")
    parser.add_argument("--divisors", type=int, nargs="+", default=DIVISORS, help="longer side by finest resolution")
    for name, value in (("steps", 1000), ("batch", 1 << 14), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--out", type=Path, help="file for the runs, a JSON record a line")
    args = parser.parse_args(argv)
    side = max(read_picture(args.picture).size)
    common = [str(args.picture), "--steps", str(args.steps), "--batch", str(args.batch), "--seed", str(args.seed)]
    common += ["--hidden", "2", "--device", "cpu"]
    if args.out:
        args.out.write_text("")
    print(f"{args.picture}, {args.steps} steps of {args.batch} pixels, seed {args.seed}\n")
    print("| hash grid: parameters | PSNR, dB | SSIM | s | NeuRBF: parameters | PSNR | SSIM | s | dB | SSIM |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for log2_size in args.log2_sizes:
        runs = rivals(common, log2_size, [max(2, side // divisor) for divisor in args.divisors])
        print(row(runs), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.writelines(json.dumps(run) + "\n" for run in runs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
