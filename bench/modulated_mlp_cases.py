# SPDX-License-Identifier: MIT
"""Cases of the modulated MLP: networks of known methods, all weights and inputs in one dtype."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import Case, Floor, Inputs, Pass


@dataclass(frozen=True)
class Network:
    """`layers` hidden layers of `width` and a linear layer; modulation: None, or per "layer" or "channel"."""

    inputs: int
    width: int
    layers: int
    outputs: int
    norm: str | None = None
    modulation: str | None = None
    activation: str = "relu"
    omega: float = 1.0
    skips: tuple[int, ...] = ()
    bias: bool = True

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of each linear layer."""
        outs = [self.width] * self.layers + [self.outputs]
        ins = [self.inputs] + [self.width + self.inputs * (i in self.skips) for i in range(self.layers)]
        return list(zip(outs, ins, strict=True))

    @property
    def modulation_shape(self) -> tuple[int, ...]:
        """Of one point; () without modulation."""
        return {None: (), "layer": (self.layers, 2), "channel": (self.layers, 2, self.width)}[self.modulation]

    def options(self) -> dict[str, Any]:
        return {"norm": self.norm, "activation": self.activation, "omega": self.omega, "skips": self.skips}

    def parameters(self) -> list[str]:
        """Names of the inputs that a training step differentiates."""
        layers = range(len(self.shapes))
        names = [f"weights.{i}" for i in layers] + [f"biases.{i}" for i in layers if self.bias]
        return names + ["modulation"] * (self.modulation is not None)


NETWORKS = {
    "wide": Network(512, 256, 3, 3, norm="point", modulation="layer"),  # CAM's image network
    "narrow": Network(32, 64, 4, 4, norm="point", modulation="layer"),  # behind a hash grid
    "instant-ngp": Network(32, 64, 2, 16, bias=False),
    "nerf": Network(63, 256, 8, 4, skips=(4,)),
    "siren": Network(2, 256, 4, 3, activation="sine", omega=30.0),
    "film": Network(32, 64, 4, 4, modulation="channel"),
}
GATE = ("wide", "narrow")
SIZES = (14, 17, 20)
# The derivative of relu jumps, so that a gradient differs more than the value it comes from. In half precision plain
# PyTorch rounds the values of every layer, camkernels those of the last.
TOLERANCES = {
    torch.float32: {"value": 1e-4, "gradient": 1e-3},
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
    return drawn


def draw_points(network: Network, dtype: torch.dtype, points: int, seed: int) -> Inputs:
    """x uniform in [-1, 1), gamma in [0.75, 1.25), beta in [-0.25, 0.25)."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {"x": (torch.rand(points, network.inputs, generator=generator) * 2 - 1).to(dtype)}
    if network.modulation is not None:
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
    shared = sum(out * (fan_in + network.bias) for out, fan_in in network.shapes) / points
    numbers = network.inputs + modulation + shared + network.outputs
    if task.wrt:
        numbers += network.outputs + modulation + shared + network.inputs * ("x" in task.wrt)
    return Floor((), numbers * dtype.itemsize, flops(network, task), str(dtype).removeprefix("torch."))


def plain_pytorch_bytes(network: Network, dtype: torch.dtype) -> int:
    """Per point, forward + backward of the eager provider: what it keeps, and the gradients on their way."""
    kept = 2 + bool(network.norm) + bool(network.modulation)
    hidden = kept * network.layers * network.width + len(network.skips) * (network.width + network.inputs)
    passing = 4 * max(network.width, network.inputs) + 2 * math.prod(network.modulation_shape)
    return (hidden + passing) * dtype.itemsize


# ---- cases -----------------------------------------------------------------------------------------------------------


def _passes(network: Network) -> dict[str, Pass]:
    parameters = tuple(network.parameters())
    found = (
        Pass("forward", "forward"),
        Pass("fb-parameters", "forward + backward (weights, biases, modulation)", parameters),
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
