# SPDX-License-Identifier: MIT
"""How well `fit shape` fits the shipped meshes: `python -m bench.shape_quality [--out FILE]`.

`python -m camkernels fit shape` with its defaults, for every mesh and model; IoU, error of the normals and seconds.
--out keeps every run with its command, a JSON record a line.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from camkernels.fields import SHAPE_MODELS

from . import ROOT
from .neurbf_quality import fit

MESHES = [ROOT / "bench" / "data" / name for name in ("spot.ply", "knot.ply")]


def row(run: dict[str, Any]) -> str:
    """A line of the table."""
    figures = f"{run['parameters']:,} | {run['iou']:.4f} | {run['normal_error_degrees']:.1f} | {run['seconds']:.0f}"
    return f"| {run['mesh']} | {run['model']} | {figures} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Fits, and prints a line of the table for each run."""
    parser = argparse.ArgumentParser(prog="python -m bench.shape_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--meshes", type=Path, nargs="+", default=MESHES, help="default: the shipped ones")
    parser.add_argument("--steps", type=int, help="training steps (default: the command's)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, appended")
    args = parser.parse_args(argv)
    steps = [] if args.steps is None else ["--steps", str(args.steps)]
    print("| mesh | model | parameters | IoU | normals, degrees | s |\n|---|---|---|---|---|---|")
    for mesh in args.meshes:
        for model in SHAPE_MODELS:
            command = [os.path.relpath(mesh), "--model", model, "--device", "cpu", *steps]
            run = {"mesh": mesh.name} | fit(command, "shape")
            print(row(run), flush=True)
            if args.out:
                with args.out.open("a") as out:
                    out.write(json.dumps(run) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
