# SPDX-License-Identifier: MIT
"""What a call of radial_basis asks for: its options, and whether its tensors fit together and them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._checks import check_choice, check_floating, check_number, check_same_device, check_shape, check_size

KINDS = (
    "nlin", "ivq", "ivmq", "ivd", "ivc", "gauss", "sgauss2", "nsgauss2", "markov", "expsin", "qd", "mqd", "phs1",
    "phs3", "vep", "cos",
)  # fmt: skip
SHAPES = ("isotropic", "diagonal", "full", "projected", "symmetric")
MOST_DIMS = 4


def shape_width(shape: str, dims: int) -> int:
    """How many numbers describe the shape of one kernel."""
    widths = {"isotropic": 1, "diagonal": dims, "symmetric": dims * (dims + 1) // 2}
    return widths.get(shape, dims * dims)


def ignores_shape(kind: str, shape: str) -> bool:
    """Whether a kernel function does not read its shape: the public code's isotropic phs1, and cos."""
    return kind == "cos" or (kind, shape) == ("phs1", "isotropic")


@dataclass(frozen=True)
class Basis:
    """The options of a radial_basis."""

    kind: str = "ivq"
    shape: str = "full"
    normalize: bool = True
    detach_normalizer: bool = True
    eps: float = 1e-8
    frequencies: Tensor | None = None
    keep: int = 0
    phase: Tensor | None = None

    def check_options(self, op: str, features: int) -> None:
        """Whether the options alone make sense for kernels of so many features."""
        check_choice(op, "kind", self.kind, KINDS)
        check_choice(op, "shape", self.shape, SHAPES)
        for name in ("normalize", "detach_normalizer"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{op}: {name} must be True or False, got {getattr(self, name)!r}")
        check_number(op, "eps", self.eps, least=0.0)
        check_size(op, "keep", self.keep, least=0)
        if self.keep > features:
            raise ValueError(f"{op}: keep must be at most the number of features, {features}, got {self.keep}")
        waves = features - self.keep
        for name in ("frequencies", "phase"):
            tensor = getattr(self, name)
            if tensor is not None:
                check_floating(op, name, tensor)
                check_shape(op, name, tensor, [waves], f"{features} features, of which keep={self.keep} have no sine")
        if self.frequencies is None and self.phase is not None:
            raise ValueError(f"{op}: phase must be None where there are no frequencies; give frequencies [{waves}] too")
        if self.frequencies is not None and self.frequencies.requires_grad:
            raise ValueError(
                f"{op}: frequencies must be constants, got a tensor that requires a gradient; use .detach()"
            )

    def check(
        self, op: str, x: Tensor, centers: Tensor, shapes: Tensor, features: Tensor, neighbors: Tensor | None
    ) -> None:
        """Whether the tensors of a call fit together and the options; values only where they can be looked at."""
        for name, tensor in (("x", x), ("centers", centers), ("shapes", shapes), ("features", features)):
            check_floating(op, name, tensor)
        dims = x.shape[-1] if x.ndim else 0
        if not 1 <= dims <= MOST_DIMS:
            raise ValueError(f"{op}: x must have shape [..., d] with d from 1 to {MOST_DIMS}, got {list(x.shape)}")
        check_shape(op, "centers", centers, ["n", dims], f"x has {dims} coordinates")
        count = centers.shape[0]
        if count == 0:
            raise ValueError(f"{op}: centers must hold at least one kernel, got {list(centers.shape)}")
        check_shape(op, "features", features, [count, "F"], f"there are {count} centers")
        self.check_options(op, features.shape[1])
        width = shape_width(self.shape, dims)
        check_shape(op, "shapes", shapes, [count, width], f"shape={self.shape!r} of {count} centers in {dims} axes")
        if neighbors is not None:
            _check_neighbors(op, neighbors, x.shape[:-1], count)
        check_same_device(
            op, x=x, centers=centers, shapes=shapes, features=features, neighbors=neighbors,
            frequencies=self.frequencies, phase=self.phase,
        )  # fmt: skip
        if self.shape in ("isotropic", "diagonal") and can_look_at(shapes) and (shapes < 0).any():
            raise ValueError(
                f"{op}: shapes must not be negative for shape={self.shape!r}, got {shapes.min().item():g}; use "
                "shape='full' for a form that is not positive"
            )


def _check_neighbors(op: str, neighbors: Tensor, leading: Sequence[int], count: int) -> None:
    if not isinstance(neighbors, Tensor):
        raise TypeError(f"{op}: neighbors must be a torch.Tensor or None, got {type(neighbors).__name__}")
    if neighbors.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: neighbors must be int32 or int64, got {neighbors.dtype}; see camkernels.nearest")
    check_shape(op, "neighbors", neighbors, [*leading, "K"], f"x has leading axes {list(leading)}")
    if neighbors.shape[-1] == 0:
        raise ValueError(f"{op}: neighbors must name at least one kernel per point, got {list(neighbors.shape)}")
    if neighbors.numel() and can_look_at(neighbors):
        least, most = (int(v) for v in neighbors.aminmax())
        if least < 0 or most >= count:
            raise ValueError(
                f"{op}: neighbors must be from 0 to {count - 1}, there are {count} centers, got {least} to {most}"
            )


def has_values(tensor: Tensor) -> bool:
    """Whether there are values to read: not where a trace or a transform has a tensor that stands for others."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return not (tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor))


def can_look_at(tensor: Tensor) -> bool:
    """Whether a check may read values: those of a GPU, because it would wait for the device, if CAMKERNELS_CHECK=1."""
    return has_values(tensor) and (tensor.device.type == "cpu" or os.environ.get("CAMKERNELS_CHECK") == "1")
