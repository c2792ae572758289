# SPDX-License-Identifier: MIT
"""Cases of the modulated MLP: networks of known methods, all weights and inputs in one dtype."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .case import Case, Floor, Inputs, Pass


@dataclass(frozen=True)
class Network:
    """`layers` hidden layers of `width` and a linear one of `outputs`, or None: without that layer.

    modulation: None, or given per "layer" or "channel", or in "grids", per layer, at the coordinates of the points.
    """

    inputs: int
    width: int
    layers: int
    outputs: int | None
    norm: str | None = None
    modulation: str | None = None
    activation: str = "relu"
    omega: float = 1.0
    skips: tuple[int, ...] = ()
    bias: bool = True

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of each linear layer."""
        outs = [self.width] * self.layers + ([] if self.outputs is None else [self.outputs])
        ins = [self.inputs] + [self.width + self.inputs * (i in self.skips) for i in range(self.layers)]
        return list(zip(outs, ins, strict=False))

    @property
    def results(self) -> int:
        """Numbers of a point's output."""
        return self.shapes[-1][0]

    @property
    def modulation_shape(self) -> tuple[int, ...]:
        """Of what a point is given; () without modulation."""
        given = {None: (), "layer": (self.layers, 2), "channel": (self.layers, 2, self.width), "grids": (2,)}
        return given[self.modulation]

    def options(self) -> dict[str, Any]:
        found = {"norm": self.norm, "activation": self.activation, "omega": self.omega, "skips": self.skips}
        return found | {"output_layer": self.outputs is not None}

    def parameters(self) -> list[str]:
        """Names of the inputs that a training step differentiates."""
        layers = range(len(self.shapes))
        names = [f"weights.{i}" for i in layers] + [f"biases.{i}" for i in layers if self.bias]
        return names + {None: [], "grids": ["grids"]}.get(self.modulation, ["modulation"])


NETWORKS = {
    "wide": Network(512, 256, 3, 3, norm="point", modulation="layer"),  # CAM's image network
    "narrow": Network(32, 64, 4, 4, norm="point", modulation="layer"),  # behind a hash grid
    "instant-ngp": Network(32, 64, 2, 16, bias=False),
    "nerf": Network(63, 256, 8, 4, skips=(4,)),
    "siren": Network(2, 256, 4, 3, activation="sine", omega=30.0),
    "wide-cam": Network(512, 256, 3, None, norm="point", modulation="grids"),
    "narrow-cam": Network(32, 64, 4, None, norm="point", modulation="grids"),
    "film": Network(32, 64, 4, 4, modulation="channel"),
}
GATE = ("wide", "narrow", "wide-cam", "narrow-cam")
NODES = 32  # of a grid, along each of its two axes
SIZES = (10, 14, 17, 20)
# The derivative of relu jumps: where rounding takes one unit in a million to the other side, a gradient differs by its
# root, a thousandth. In half precision plain PyTorch rounds the values of every layer, camkernels those of the last.
TOLERANCES = {
    torch.float32: {"value": 1e-4, "gradient": 2e-3},
    torch.bfloat16: {"value": 3e-2, "gradient": 3e-1},
    torch.float16: {"value": 4e-3, "gradient": 1e-1},
}


# ---- inputs ----------------------------------------------------------------------------------------------------------


def draw_parameters(network: Network, dtype: torch.dtype, seed: int) -> Inputs:
    """Weights as Kaiming's or SIREN's, so that values stay of order 1; biases as torch.nn.Linear's."""
    generator = torch.Generator().manual_seed(seed + 1)

    def uniform(bound: float, *shape: int) -> Tensor:
        return ((torch.rand(shape, generator=generator) * 2 - 1) * bound).to(dtype)

    def bound(layer: int, fan_in: int) -> float:
        if network.activation == "sine":
            return 1 / fan_in if layer == 0 else math.sqrt(6 / fan_in) / network.omega
        return math.sqrt((6 if layer < network.layers else 3) / fan_in)

    drawn = {f"weights.{i}": uniform(bound(i, fan_in), out, fan_in) for i, (out, fan_in) in enumerate(network.shapes)}
    if network.bias:
        drawn |= {f"biases.{i}": uniform(fan_in**-0.5, out) for i, (out, fan_in) in enumerate(network.shapes)}
    if network.modulation == "grids":
        drawn["grids"] = uniform(0.25, network.layers, 2, NODES, NODES)
        drawn["grids"][:, 0] += 1
    return drawn


def draw_points(network: Network, dtype: torch.dtype, points: int, seed: int) -> Inputs:
    """x and coordinates uniform in [-1, 1), gamma in [0.75, 1.25), beta in [-0.25, 0.25)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {"x": (torch.rand(points, network.inputs, generator=generator) * 2 - 1).to(dtype)}
    if network.modulation == "grids":
        drawn["coords"] = (torch.rand(points, 2, generator=generator) * 2 - 1).to(dtype)
    elif network.modulation is not None:
        least = torch.tensor([0.75, -0.25]).reshape(2, *[1] * (len(network.modulation_shape) - 2))
        rows = torch.rand(points, *network.modulation_shape, generator=generator)
        drawn["modulation"] = rows.div_(2).add_(least).to(dtype)
    return drawn


# ---- work ------------------------------------------------------------------------------------------------------------


def flops(network: Network, task: Pass) -> float:
    """Multiplications and additions of the matrix products for one point.

    A backward pass has two more per layer, one for the gradient of the weights and one for that of the layer's input,
    of which the columns that x comes in by are needed only where the gradient of x is.
    """
    forward = backward = 0.0
    for i, (out, fan_in) in enumerate(network.shapes):
        from_x = network.inputs if i == 0 or i - 1 in network.skips else 0
        forward += 2 * out * fan_in
        backward += 2 * out * (2 * fan_in - (0 if "x" in task.wrt else from_x))
    return forward + backward if task.wrt else forward


def floor(network: Network, dtype: torch.dtype, points: int, task: Pass) -> Floor:
    """Inputs are read once, and each gradient that is asked for is written; hidden values stay where they are made."""
    modulation = math.prod(network.modulation_shape) if network.modulation else 0
    shared = sum(out * (fan_in + network.bias) for out, fan_in in network.shapes)
    shared += network.layers * 2 * NODES**2 * (network.modulation == "grids")
    numbers = network.inputs + modulation + shared / points + network.results
    if task.wrt:
        numbers += network.results + modulation * ("modulation" in task.wrt) + shared / points
        numbers += network.inputs * ("x" in task.wrt)
    return Floor((), numbers * dtype.itemsize, flops(network, task), str(dtype).removeprefix("torch."))


def plain_pytorch_bytes(network: Network, dtype: torch.dtype) -> int:
    """Per point, forward + backward of the eager provider: what it keeps, and the gradients on their way."""
    kept = 2 + bool(network.norm) + bool(network.modulation)
    hidden = kept * network.layers * network.width + len(network.skips) * (network.width + network.inputs)
    passing = 4 * max(network.width, network.inputs) + 4 * network.layers + 2 * math.prod(network.modulation_shape)
    return (hidden + passing) * dtype.itemsize


# ---- what is computed ------------------------------------------------------------------------------------------------


def modulated_by_grids(
    package: ModuleType, *, coords: Tensor, grids: Tensor, backend: str | None = None, **arguments: Any
) -> Tensor:
    """Coordinate-Aware Modulation: what the grids hold at the coordinates scales and shifts every hidden layer."""
    chosen = {} if backend is None else {"backend": backend}
    modulation = package.coordinate_modulation(coords, grids, **chosen)
    return package.modulated_mlp(modulation=modulation, **chosen, **arguments)


# ---- cases -----------------------------------------------------------------------------------------------------------


def _passes(network: Network) -> dict[str, Pass]:
    parameters = tuple(network.parameters())
    found = (
        Pass("forward", "forward"),
        Pass("fb-parameters", "forward + backward (weights, biases, modulation or its grids)", parameters),
        Pass("fb-all", "forward + backward (the same and x)", ("x", *parameters)),
    )
    return {task.name: task for task in found}


def _case(name: str, dtype: torch.dtype, log2_points: int) -> Case:
    network, points, kind = NETWORKS[name], 1 << log2_points, str(dtype).removeprefix("torch.")
    tags = {"modulated_mlp", name}
    if dtype == torch.float32:
        tags |= {14: {"quick"}, 17: {"default", "gate"} if name in GATE else {"default"}}.get(log2_points, set())
    allowed = TOLERANCES[dtype]
    return Case(
        op="modulated_mlp",
        name=f"modulated_mlp/{name}/{kind}/n{log2_points}",
        points=points,
        facts={"network": name, "dtype": kind, "inputs": network.inputs, "width": network.width}
        | {"hidden_layers": network.layers, "outputs": network.outputs, "modulation": network.modulation}
        | network.options(),
        passes=_passes(network),
        scratch=plain_pytorch_bytes(network, dtype),
        tolerances={"value": allowed["value"]} | dict.fromkeys(("x", *network.parameters()), allowed["gradient"]),
        recomputes=True,
        composed=modulated_by_grids if network.modulation == "grids" else None,
        tags=frozenset(tags),
        options=network.options,
        make_parameters=functools.partial(draw_parameters, network, dtype),
        make_points=functools.partial(draw_points, network, dtype),
        floor=functools.partial(floor, network, dtype, points),
    )


def make() -> Iterator[Case]:
    for name in NETWORKS:
        for dtype in TOLERANCES:
            for log2_points in SIZES:
                yield _case(name, dtype, log2_points)
