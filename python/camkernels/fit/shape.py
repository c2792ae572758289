# SPDX-License-Identifier: MIT
"""Fit a shape: places in the unit cube -> signed distance to the surface of a mesh, negative inside."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import RadialBasis
from ..fields import SHAPE_MODELS
from .checkpoint import build_model, load_checkpoint, save_checkpoint
from .distance import SignedDistance
from .errors import require
from .mesh import Mesh, Placement, place, read_mesh, sample_surface, write_mesh
from .picture import write_picture
from .plots import write_loss_curve
from .sphere_tracing import draw_surface, gradient
from .start import (
    Options,
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
from .trainer import Interruption, ProgressBar, Trainer

DEFAULT_MODEL, DEFAULT_SAMPLES = "hash", 1 << 20
# Slower waves than NeuRBF's 30 to 300, which want ten times as many steps: after 600 steps on the knot of bench/data
# IoU 0.991 and normals 11 to 15 degrees off, against 0.970 and 36.
DEFAULTS = {"decoder_waves": (3.0, 30.0)}
CHUNK = 1 << 17  # points per call where the field is evaluated all over
# Shares of the samples by their standard deviation from the surface, inf for those anywhere in the cube. NeuRBF has
# 4 : 3 : 0 : 1, and 256 times as many; with 2^20 that leaves too few in between, and the field is dust there.
SHARES = {0.0: 2, 0.005: 3, 0.05: 2, math.inf: 1}
SOFTENING = 0.005  # of the loss |error| / (|distance| + SOFTENING)
EVALUATION_SEED = 1 << 40  # far from the seeds of runs
INSIDE_POINTS, SURFACE_POINTS = 1 << 17, 1 << 14  # of the measures
PICTURE_SIZE = (640, 640)
BLOCK = 8  # cells along a side of the blocks of which those far from the surface are not evaluated


class Samples:
    """Points of the unit cube with their distances on a device: random batches, and the loss of a field on them."""

    def __init__(self, x: Tensor, distances: Tensor, batch: int, device: torch.device):
        self.x, self.distances, self.batch = x.float().to(device), distances.float().to(device), batch
        self.neighbors: Tensor | None = None

    def prepare(self, model: nn.Module) -> None:
        """Finds the kernels of all points, once, for a field that has some."""
        if hasattr(model, "nearest"):
            self.neighbors = model.nearest(self.x)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Mean of |error| / (|distance| + SOFTENING) on a batch of points drawn by the generator."""
        # drawn on the CPU: the same batches on every device
        index = torch.randint(len(self.x), (self.batch,), generator=generator).to(self.x.device)
        known = () if self.neighbors is None else (self.neighbors.index_select(0, index),)
        distances = self.distances.index_select(0, index)
        error = model(self.x.index_select(0, index), *known)[:, 0] - distances
        return (error.abs() / (distances.abs() + SOFTENING)).mean()


def draw_samples(mesh: Mesh, distance: SignedDistance, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """(points [count, 3] in the unit cube, signed distances [count]) in the SHARES."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for spread, share in SHARES.items():
        size = count * share // sum(SHARES.values())
        if spread == math.inf:
            parts.append(torch.rand(count - sum(map(len, parts)), 3, generator=generator, dtype=torch.float64))
        else:
            surface = sample_surface(mesh, size, generator)[0]
            noise = torch.randn(size, 3, generator=generator, dtype=torch.float64)
            parts.append((surface + spread * noise).clamp(0, 1))
    x = torch.cat(parts)
    return x, distance(x)


# ---- what a field of distances is worth ------------------------------------------------------------------------------


@torch.no_grad()
def distances_of(model: nn.Module, x: Tensor) -> Tensor:
    """The field's distances [N] at x [N, 3], in chunks."""
    return torch.cat([model(part)[:, 0] for part in x.split(CHUNK)])


def intersection_over_union(model: nn.Module, mesh: Mesh, distance: SignedDistance, device: torch.device) -> float:
    """Of the insides of field and mesh, by points drawn uniformly from the mesh's bounding box."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    low, high = mesh.vertices.aminmax(dim=0)
    x = (low + torch.rand(INSIDE_POINTS, 3, generator=generator) * (high - low)).float()
    own, theirs = distances_of(model, x.to(device)).cpu() < 0, distance(x) < 0
    return int((own & theirs).sum()) / max(1, int((own | theirs).sum()))


@contextlib.contextmanager
def whole_derivatives(model: nn.Module) -> Iterator[None]:
    """Within, derivatives in x are those of the field: in training sums of radial kernels count as constants."""
    layers = [layer for layer in model.modules() if isinstance(layer, RadialBasis)]
    before = [layer.options["detach_normalizer"] for layer in layers]
    for layer in layers:
        layer.options["detach_normalizer"] = False
    try:
        yield
    finally:
        for layer, detached in zip(layers, before, strict=True):
            layer.options["detach_normalizer"] = detached


def normal_error(model: nn.Module, mesh: Mesh, device: torch.device) -> float:
    """Mean angle in degrees, at points drawn uniformly from the mesh's surface, between its normal and the gradient."""
    x, normals = sample_surface(mesh, SURFACE_POINTS, torch.Generator().manual_seed(EVALUATION_SEED))
    with whole_derivatives(model):
        slope = gradient(lambda part: model(part)[:, 0], x.float().to(device)).cpu().double()
    cosine = (torch.nn.functional.normalize(slope, dim=-1) * normals).sum(-1)
    return float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).mean())


def extract_surface(model: nn.Module, resolution: int, device: torch.device) -> Mesh | None:
    """Where the field is 0 in the unit cube, by marching cubes over `resolution` cells a side; None if nowhere."""
    measure = require("skimage.measure")
    volume = _volume(model, -(-resolution // BLOCK), device)
    cell = 1 / (len(volume) - 1)
    try:
        vertices, triangles, *_ = measure.marching_cubes(volume, 0.0, spacing=(cell,) * 3)
    except ValueError:  # no value above 0, or none below
        return None
    return Mesh(torch.from_numpy(vertices.astype(np.float64)), torch.from_numpy(triangles.astype(np.int64)))


def _volume(model: nn.Module, blocks: int, device: torch.device) -> np.ndarray:
    """The field at the nodes of blocks * BLOCK cells a side; in a block that the surface is far from, at its middle."""
    nodes = blocks * BLOCK + 1
    volume = torch.ones(nodes, nodes, nodes)  # where nothing is written, at the far faces, outside
    middles = (torch.cartesian_prod(*[torch.arange(blocks)] * 3) + 0.5) / blocks
    values = distances_of(model, middles.to(device)).cpu()
    coarse = values.reshape(blocks, 1, blocks, 1, blocks, 1).expand(*(blocks, BLOCK) * 3)
    volume[:-1, :-1, :-1] = coarse.reshape([nodes - 1] * 3)
    near = values.abs() < math.sqrt(3) / blocks  # twice the block's half-diagonal: distances are not exact
    corners = (middles[near] * blocks - 0.5).round().long() * BLOCK
    inner = torch.cartesian_prod(*[torch.arange(BLOCK + 1)] * 3)
    for part in corners.split(max(1, CHUNK // len(inner))):
        node = (part.unsqueeze(1) + inner).flatten(0, 1)
        volume[node.unbind(1)] = distances_of(model, (node / (nodes - 1)).to(device)).cpu()
    return volume.numpy()


# ---- the job ---------------------------------------------------------------------------------------------------------


@dataclass
class ShapeOptions(Options):
    """What the command line asks for a shape."""

    samples: int | None = None
    resolution: int = 256


def fit_shape(path: Path, options: ShapeOptions, say: Callable[[str], None] = print) -> int:
    """Fits the mesh and writes everything; the exit status: 0, or 130 after Ctrl-C."""
    for module in ("trimesh", "skimage.measure", "PIL.Image", "tqdm", "matplotlib.figure"):
        require(module)  # now rather than after the training
    given = read_mesh(path)
    mesh, placement = place(given)
    device = check_device(options.device)
    saved = load_checkpoint(options.resume) if options.resume else None
    count = options.samples or (saved["task"].get("samples") if saved else None) or DEFAULT_SAMPLES
    task = _task(given, placement, count)
    if saved is None:
        name = options.model or DEFAULT_MODEL
        settings = settings_of(options, None, SHAPE_MODELS[name].learning_rate)
        model = new_model(SHAPE_MODELS, name, DEFAULTS, options, settings.seed)
    else:
        check_same_task(options, saved, task, "mesh")
        settings, name = settings_of(options, saved), saved["model"]
        model = build_model(options.resume, saved, options.backend)
    backend = check_backend(model.ops, options.backend, device)
    check_folder(options.out)
    say(f"{path}: {given.describe()}")
    for note in given.notes:
        say(f"note: {note}")
    say(f"drawing {count:,} points and their distances to the surface")
    distance = SignedDistance(mesh.vertices, mesh.triangles)
    samples = Samples(*draw_samples(mesh, distance, count, settings.seed), settings.batch, device)
    model.to(device)
    if saved is None:
        _adapt(model, samples, settings.seed, options.quiet, say)
    samples.prepare(model)
    trainer = Trainer(model, samples.loss, settings)
    load_training(trainer, options, saved)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"model {name}: {parameters:,} parameters, {settings.stop.describe()}, on {device} with backend {backend}")
    job = _Job(path, mesh, placement, distance, name, task, trainer, device, backend, options, say)
    with Interruption() as interruption:
        return job.run(interruption)


def _task(mesh: Mesh, placement: Placement, samples: int) -> dict[str, Any]:
    return {
        "kind": "shape",
        "vertices": len(mesh.vertices),
        "triangles": len(mesh.triangles),
        "center": list(placement.center),
        "scale": placement.scale,
        "samples": samples,
        "digest": mesh.digest(),
    }


def _adapt(model: nn.Module, samples: Samples, seed: int, quiet: bool, say: Callable[[str], None]) -> None:
    """Puts the kernels of a field that has some where the samples have the surface; the same under the same seed."""
    if not hasattr(model, "adapt"):
        return
    tqdm = require("tqdm").tqdm
    generator = torch.Generator().manual_seed(seed)
    with placing("ask for fewer kernels or more --samples"):
        model.adapt(
            samples.x, samples.distances, generator=generator,
            progress=lambda rounds: tqdm(rounds, desc="placing kernels", disable=quiet),
        )  # fmt: skip


@dataclass
class _Job:
    """From the first step to the last file."""

    path: Path
    mesh: Mesh
    placement: Placement
    distance: SignedDistance
    name: str
    task: dict[str, Any]
    trainer: Trainer
    device: torch.device
    backend: str
    options: ShapeOptions
    say: Callable[[str], None]

    def run(self, interruption: Interruption) -> int:
        bar = ProgressBar(self.trainer, lambda loss: f"loss {loss:.4f}", self.options.quiet)
        try:
            ended = self.trainer.run(interruption, bar.show)
        finally:
            bar.close()
        self._write(ended)
        if ended == "interrupted" or interruption.asked:
            again = f"--resume {self.options.out / 'checkpoint.pt'}"
            self.say(f"stopped by Ctrl-C at step {self.trainer.step}; the work is kept, {again} goes on")
            return 130
        return 0

    def _write(self, ended: str) -> None:
        out, model = self.options.out, self.trainer.model
        content = {"model": self.name, "config": model.config, "task": self.task} | self.trainer.state()
        save_checkpoint(out / "checkpoint.pt", content)
        files = ["checkpoint.pt", "report.json", "loss.png", "view.png"]
        write_loss_curve(self.trainer.losses, out / "loss.png", "mean of |error| / (|distance| + 0.005)")
        write_picture(draw_shape(model, *PICTURE_SIZE, self.device), out / "view.png")
        surface = extract_surface(model, self.options.resolution, self.device)
        if surface is None:
            self.say("note: the field is nowhere 0 yet, there is no mesh to write; train longer")
        else:
            vertices = self.placement.from_unit(surface.vertices)
            write_mesh(Mesh(vertices, surface.triangles), out / "mesh.ply")
            files.append("mesh.ply")
        report = self._report(ended, surface)
        write_report(report, out / "report.json")
        speed = f"{report['points_per_second'] / 1e6:.2f} M points/s"
        self.say(
            f"IoU {report['iou']:.4f}, normals {report['normal_error_degrees']:.2f} degrees off after "
            f"{report['steps']} steps, {report['seconds']:.1f} s, {speed}"
        )
        self.say(f"written to {out}: {', '.join(files)}")

    def _report(self, ended: str, surface: Mesh | None) -> dict[str, Any]:
        model = self.trainer.model
        return {
            "task": "shape",
            "source": str(self.path),
            "vertices": self.task["vertices"],
            "triangles": self.task["triangles"],
            "samples": self.task["samples"],
            "model": self.name,
            "config": model.config,
            "iou": intersection_over_union(model, self.mesh, self.distance, self.device),
            "normal_error_degrees": normal_error(model, self.mesh, self.device),
            "mesh_triangles": 0 if surface is None else len(surface.triangles),
            "resolution": self.options.resolution,
            "ended": ended,
        } | run_report(self.trainer, self.device, self.backend)


def draw_shape(model: nn.Module, width: int, height: int, device: torch.device) -> np.ndarray:
    """A view of the field's surface, uint8 [height, width, 3]."""
    with whole_derivatives(model):
        return draw_surface(lambda x: model(x)[:, 0], width, height, device)
