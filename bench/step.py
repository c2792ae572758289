# SPDX-License-Identifier: MIT
"""Whole training steps of `fit image` against the same in plain PyTorch: `python -m bench.step [--models hash,cam]`.

A step draws a batch of pixels, computes the field, the loss and its gradients, and moves the parameters by Adam, as
`python -m camkernels fit image` does. The other fields compute the same layers by PyTorch's own operations
(`plain_fields.py`), start from the same parameters and see the same batches; their first losses must be equal. "plain"
takes rows of a hash table by `table[index]`, as nerfstudio does; "fair", where there is a table, by `index_select`,
which is faster. Some steps of each in a row are timed in turn, in a process of its own per model and allocator regime:
in a training a step follows a step, and finds in the caches what that one left there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from camkernels import HashGrid, _gpu
from camkernels.fields import MODELS
from camkernels.fit.image import Pixels, adapt, default_config
from camkernels.fit.picture import Picture, read_picture
from camkernels.fit.start import DEFAULT_BATCH
from camkernels.fit.trainer import Settings, Stop, Trainer

from . import ROOT, machine, plain_fields, timing

SCHEMA = 2
PHOTO = ROOT / "bench" / "data" / "photo.jpg"
WARM_UPS = 3
IN_A_ROW = 10  # steps of a sample
ALLOWED = 1e-3  # relative difference of the losses of the first steps
STEPS = 1_000_000  # a run this long keeps its learning rate while it is timed
OURS = "camkernels"
GRID_FORMS = {"plain": "blend", "fair": "fair"}  # of hash_grid_eager


def trainers(name: str, picture: Picture, batch: int, device: str) -> dict[str, Trainer]:
    """Runs from the same parameters: ours, "plain" and, of a field with a hash grid, "fair"."""
    torch.manual_seed(0)
    own = MODELS[name](**default_config(name, picture)).to(device)
    adapt(own, picture, seed=0)
    settings = Settings(Stop(STEPS), batch, own.learning_rate)
    pixels = Pixels(picture, batch, torch.device(device))
    pixels.prepare(own)
    has_table = any(isinstance(layer, HashGrid) for layer in own.modules())
    forms = {side: form for side, form in GRID_FORMS.items() if has_table or side == "plain"}
    fields = {OURS: own} | {side: plain_fields.plain(own, form) for side, form in forms.items()}
    return {side: Trainer(field, pixels.loss, settings) for side, field in fields.items()}


def measure(
    name: str, picture: Picture, batch: int, device: str, threads: int, rounds: int, seconds: float
) -> dict[str, Any]:
    """{ms (quartiles of a step, by side), speedup (over each other side), losses, parameters}.

    ValueError where the losses differ.
    """
    runs = trainers(name, picture, batch, device)
    clock = timing.clock_for(threads, device)
    losses: dict[str, list[float]] = {}
    tasks = []
    for side, run in runs.items():
        losses[side] = [run.advance().item() for _ in range(WARM_UPS)]
        tasks.append(timing.Timed(side, run.advance, always=True, calls=IN_A_ROW))
    for own, *others in zip(*losses.values(), strict=True):
        if not all(abs(own - other) <= ALLOWED * abs(other) for other in others):
            raise ValueError(f"{name}: the losses of the first steps differ: {losses}")
    timing.interleave(tasks, rounds, seconds, clock)
    own, *others = tasks
    return {
        "ms": {task.name: timing.quartiles(s * 1e3 for s in task.seconds.values()) for task in tasks},
        "speedup": {other.name: timing.speedup(own.seconds, other.seconds) for other in others},
        "losses": losses,
        "parameters": sum(p.numel() for p in runs[OURS].model.parameters()),
    }


def record(options: argparse.Namespace) -> dict[str, Any]:
    """The record of one model in this process, whose environment is the regime's."""
    torch.set_num_threads(options.threads)
    (name,), (regime,) = options.models, options.regimes
    picture = read_picture(options.picture)
    timed = (options.threads, options.rounds, options.seconds)
    found = measure(name, picture, options.batch, options.device, *timed)
    return {
        "schema": SCHEMA, "kind": "step", "model": name, "batch": options.batch, "picture": options.picture.name,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "regime": regime,
        "threads": options.threads, "device": options.device, "machine": machine.facts(options.device), **found,
    }  # fmt: skip


def run_apart(name: str, regime: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The record of one model from a process of its own; None, and why on stderr, if it fails."""
    command = [sys.executable, "-m", "bench.step", "--here", "--models", name, "--regimes", regime]
    for option in ("batch", "rounds", "seconds", "threads", "device"):
        command += [f"--{option}", str(getattr(options, option))]
    command += ["--picture", str(options.picture.resolve())]
    environment = machine.environment(options.threads, machine.REGIMES[regime])
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        print(f"bench.step: {name} ended with status {done.returncode}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [found["model"], found["regime"], f"{found['ms'][OURS]['median']:.1f}"]
    for side in GRID_FORMS:
        ratio = found["speedup"].get(side)
        cells += [f"{found['ms'][side]['median']:.1f}", timing.spread(ratio)] if ratio else ["", ""]
    return f"| {' | '.join(cells)} |"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", type=lambda text: text.split(","), default=list(MODELS), help=f"of {','.join(MODELS)} (all)")
    add("--regimes", type=lambda text: text.split(","), help="allocator (both; on a GPU tuned)")
    add("--picture", type=Path, default=PHOTO, help="default: the photograph of the demonstration")
    add("--batch", type=int, default=DEFAULT_BATCH, help=f"pixels a step ({DEFAULT_BATCH})")
    add("--rounds", type=int, default=15, help=f"of {IN_A_ROW} steps of each (15)")
    add("--seconds", type=float, default=30.0, help="time for the rounds of a model in one regime (30)")
    add("--threads", type=int, default=1, help="1 is timed in CPU time, more in wall time")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--out", type=Path, metavar="FILE", help="JSON lines, appended")
    add("--here", action="store_true", help=argparse.SUPPRESS)  # in the process of its own
    options = parser.parse_args(arguments)
    options.regimes = options.regimes or (["tuned"] if options.device == "cuda" else list(machine.REGIMES))
    for what, given, known in (("model", options.models, MODELS), ("regime", options.regimes, machine.REGIMES)):
        for name in given:
            if name not in known:
                parser.error(f"no {what} is called {name!r}; there are {', '.join(known)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and (reason := _gpu.no_gpu()) is not None:
        print(f"bench.step: --device cuda: {reason}", file=sys.stderr)
        return 2
    if options.here:
        print(json.dumps(record(options)))
        return 0
    print(f"{options.picture.name}, {options.batch} pixels a step, {options.threads} thread(s), {options.device}")
    print("| model | regime | ms a step | plain PyTorch | times faster | with index_select | times faster |")
    print("|---|---|---|---|---|---|---|")
    failed = 0
    for name in options.models:
        for regime in options.regimes:
            found = run_apart(name, regime, options)
            failed += found is None
            if found is not None:
                print(row(found), flush=True)
                if options.out is not None:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    with options.out.open("a") as out:
                        out.write(json.dumps(found) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
