# SPDX-License-Identifier: MIT
"""Cases of the ops around the modulated MLP, in float32: `coordinate_modulation`, `modulate`, `hash_grid_mlp`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import hash_grid_cases, modulated_mlp_cases
from .case import Case, Floor, Inputs, Pass

LAYERS, NODES = 4, 32  # of coordinate_modulation: scales and shifts, and values along each of two axes
WIDTH = 256  # of modulate
MLP = modulated_mlp_cases.NETWORKS["instant-ngp"]  # behind the grid of hash_grid_mlp
SIZES = (14, 17, 20)


def _passes(*parameters: str) -> dict[str, Pass]:
    backward = Pass("fb-parameters", f"forward + backward ({', '.join(parameters)})", parameters)
    return {"forward": Pass("forward", "forward"), backward.name: backward}


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> Inputs:
    """Uniform in [-1, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) * 2 - 1 for name, shape in shapes.items()}


def _case(
    op: str, log2_points: int, parameters: tuple[str, ...], points: Callable[[int, int], Inputs],
    drawn: Callable[[int], Inputs], floor: Callable[[int, Pass], Floor], scratch: int, tolerances: dict[str, float],
    options: Callable[[], dict[str, Any]] = dict,
) -> Case:  # fmt: skip
    return Case(
        op=op,
        name=f"{op}/float32/n{log2_points}",
        points=1 << log2_points,
        facts={"dtype": "float32"},
        passes=_passes(*parameters),
        scratch=scratch,
        tolerances=tolerances,
        tags=frozenset({op} | {14: {"quick"}, 17: {"default"}}.get(log2_points, set())),
        options=options,
        make_parameters=drawn,
        make_points=points,
        floor=functools.partial(floor, 1 << log2_points),
    )


# ---- coordinate_modulation -------------------------------------------------------------------------------------------


def _lookup_floor(points: int, task: Pass) -> Floor:
    """The grids stay in a cache; a blend of four corners is three products and sums of a difference for each value."""
    values, sweeps = 2 * LAYERS, 1 + bool(task.wrt)
    return Floor((), 4 * (2 + values * sweeps), sweeps * values * 9)


def lookup(log2_points: int) -> Case:
    """Scale and shift of four layers from grids of 32 x 32, at uniform coordinates."""
    return _case(
        "coordinate_modulation", log2_points, ("grids",), lambda n, seed: _random({"coords": (n, 2)}, seed),
        lambda seed: _random({"grids": (LAYERS, 2, NODES, NODES)}, seed + 1), _lookup_floor, 16 * LAYERS * 4,
        {"value": 1e-5, "grids": 1e-4},
    )  # fmt: skip


# ---- modulate --------------------------------------------------------------------------------------------------------


def _row_floor(points: int, task: Pass) -> Floor:
    """A row is normalised, scaled, shifted and activated: about ten operations a number; as many rows come and go."""
    rows = 4 + (bool(task.wrt) and 1 + len(task.wrt))
    return Floor((), 4 * WIDTH * rows, (1 + bool(task.wrt)) * 10 * WIDTH)


def rows(log2_points: int) -> Case:
    """Rows of 256 numbers, normalised, with a scale and a shift for each number, relu."""
    names = ("h", "gamma", "beta")
    # where rounding takes a number to the other side of relu, its gradient comes or goes
    return _case(
        "modulate", log2_points, names, lambda n, seed: _random(dict.fromkeys(names, (n, WIDTH)), seed),
        lambda seed: {}, _row_floor, 5 * 4 * WIDTH, {"value": 1e-5} | dict.fromkeys(names, 2e-3),
        lambda: {"norm": "point", "activation": "relu"},
    )  # fmt: skip


# ---- hash_grid_mlp ---------------------------------------------------------------------------------------------------

WEIGHTS = tuple(MLP.parameters())


def _draw_encoded(seed: int) -> Inputs:
    entries = hash_grid_cases.grid_geometry(3, "tcnn").n_entries
    table: dict[str, Tensor] = _random({"table": (entries, hash_grid_cases.FEATURES)}, seed + 1)
    return table | modulated_mlp_cases.draw_parameters(MLP, torch.float32, seed)


def _encoded_floor(points: int, task: Pass) -> Floor:
    """The grid's lookups and the MLP's products; the features between them stay where they are made."""
    of_grid = Pass(task.name, task.title, ("table",) if task.wrt else ())
    grid = hash_grid_cases.hash_grid_floor(3, "tcnn", 4, points, of_grid)
    of_mlp = Pass(task.name, task.title, ("x", *WEIGHTS) if task.wrt else ())
    features = 4 * MLP.inputs * (1 + bool(task.wrt))
    memory = grid.memory - features + 4 * MLP.results * (1 + bool(task.wrt))
    return Floor(grid.lookups, memory, grid.flops + modulated_mlp_cases.flops(MLP, of_mlp))


def encoded(log2_points: int) -> Case:
    """instant-ngp's grid of 16 levels x 2 features in space and its MLP behind it, at uniform points."""
    return _case(
        "hash_grid_mlp", log2_points, ("table", *WEIGHTS),
        lambda n, seed: {"x": hash_grid_cases.uniform_points(n, 3, seed)}, _draw_encoded, _encoded_floor,
        hash_grid_cases.PLAIN_PYTORCH_BYTES[3] + modulated_mlp_cases.plain_pytorch_bytes(MLP, torch.float32),
        {"value": 1e-3} | dict.fromkeys(("table", *WEIGHTS), 1e-2),  # as the grid's, through relu
        lambda: {"geometry": hash_grid_cases.grid_geometry(3, "tcnn")} | MLP.options(),
    )  # fmt: skip


def make(kind: Callable[[int], Case]) -> Iterator[Case]:
    """A kind of case in every size."""
    yield from map(kind, SIZES)
