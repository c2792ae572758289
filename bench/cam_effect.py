# SPDX-License-Identifier: MIT
"""What coordinate-aware modulation adds on a photograph: `python -m bench.cam_effect [--side 256] [--steps 2000]`.

The image network of the public CAM code against the same network without modulation (and, to tell the two apart,
without modulation but normalised), with equal steps, the same seed and parameters within 3 %. Regression trains on all
pixels; generalisation on every second one along both axes, and is judged on all. The recipe is the public code's: all
training pixels in each step, half the mean squared error, Adam with rate 0.001 and ten times that for scale and shift,
a tenth of both after half and after three quarters of the steps; PSNR of the clamped output.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from camkernels.fields import CAMImageField, FourierImageField
from camkernels.fit.image import pixel_centres
from camkernels.fit.metrics import psnr_of_mse
from camkernels.fit.picture import read_picture

from . import ROOT

PHOTO = ROOT / "bench" / "data" / "photo.jpg"
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "fourier": FourierImageField,
    "fourier, normalised": lambda: FourierImageField(norm="point"),
    "cam": CAMImageField,
}
TASKS = {"regression": 1, "generalisation": 2}  # every n-th pixel along both axes is trained on
WITHIN = 0.03  # of the parameters of the first network


def read_square(path: Path, side: int) -> Tensor:
    """The middle of a picture, scaled to side x side: [side, side, 3] in [0, 1]."""
    picture = read_picture(path)
    values = picture.to_tensor().reshape(*picture.values.shape)[..., :3]
    height, width = values.shape[:2]
    n = min(height, width)
    top, left = (height - n) // 2, (width - n) // 2
    square = values[top : top + n, left : left + n].movedim(-1, 0)[None]
    options = {"mode": "bilinear", "antialias": True, "align_corners": False}
    return nn.functional.interpolate(square, (side, side), **options)[0].movedim(0, -1).contiguous()


def train(network: str, picture: Tensor, every: int, steps: int, seed: int) -> dict[str, Any]:
    """Fits one network to every `every`-th pixel; {psnr of all pixels, parameters, seconds}."""
    torch.manual_seed(seed)
    field = NETWORKS[network]()
    optimizer = torch.optim.Adam(field.parameter_groups(field.learning_rate))
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4], gamma=0.1)
    side = len(picture)
    x = pixel_centres(torch.arange(side * side), side, side).reshape(side, side, 2)
    seen, wanted = (values[::every, ::every].reshape(-1, values.shape[-1]) for values in (x, picture))
    start = time.perf_counter()
    for _ in range(steps):
        loss = 0.5 * nn.functional.mse_loss(field(seen), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        rows = torch.stack([field(row) for row in x]).clamp(0, 1)
    parameters = sum(p.numel() for p in field.parameters())
    quality = psnr_of_mse(nn.functional.mse_loss(rows, picture).item())
    return {"psnr": quality, "parameters": parameters, "seconds": seconds}


def row(record: dict[str, Any]) -> str:
    """A line of the table."""
    figures = f"{record['parameters']:,} | {record['psnr']:.2f} | {record['gain']:+.2f} | {record['seconds']:.0f}"
    return f"| {record['task']} | {record['network']} | {figures} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains every network for every task and prints a table; the exit status, 1 if the sizes differ by too much."""
    parser = argparse.ArgumentParser(prog="python -m bench.cam_effect", description=__doc__.splitlines()[0])
    parser.add_argument("--picture", type=Path, default=PHOTO, help="default: the photograph of the demonstration")
    parser.add_argument("--side", type=int, default=256, help="pixels along each axis (default 256)")
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial values and Fourier features (default 0)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: both")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    args = parser.parse_args(argv)
    picture = read_square(args.picture, args.side)
    print(f"{args.picture.name}, {args.side} x {args.side} pixels, {args.steps} steps, seed {args.seed}")
    print("| task | network | parameters | PSNR, dB | gain, dB | s |\n|---|---|---|---|---|---|")
    records = []
    for task in args.tasks:
        base = None
        for network in NETWORKS:
            found = train(network, picture, TASKS[task], args.steps, args.seed)
            base = base or found
            records.append({"task": task, "network": network, "gain": found["psnr"] - base["psnr"]} | found)
            print(row(records[-1]), flush=True)
    if args.out:
        facts = {"picture": args.picture.name, "side": args.side, "steps": args.steps, "seed": args.seed}
        args.out.write_text(json.dumps(facts | {"rows": records}) + "\n")
    sizes = [record["parameters"] for record in records]
    return int(max(sizes) > (1 + WITHIN) * min(sizes))


if __name__ == "__main__":
    raise SystemExit(main())
