# SPDX-License-Identifier: MIT
"""What a case is: one op on one kind of input; a pass is one way of calling it; a floor is its work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import Tensor

from camkernels.testing import Call

Inputs = dict[str, Tensor]


def arguments(inputs: Inputs) -> dict[str, Any]:
    """Keyword arguments of an op: weights.0, weights.1 ... become one list."""
    return Call(inputs, {}).arguments()


@dataclass(frozen=True)
class Pass:
    """One way of calling an op. wrt: inputs whose gradients are computed (none: forward only, under no_grad)."""

    name: str
    title: str
    wrt: tuple[str, ...] = ()
    jacobian: bool = False


@dataclass(frozen=True)
class Floor:
    """Work per point that no implementation avoids.

    lookups: (bytes of the memory they fall in, count) of random accesses to one table row; memory: bytes that must come
    from or go to main memory in order; flops: multiplications and additions of the formula, each counted as one;
    product: where they are those of matrix products, the dtype, for which a GPU has a rate of its own.
    """

    lookups: tuple[tuple[int, float], ...]
    memory: float
    flops: float
    product: str | None = None


@dataclass(frozen=True)
class Case:
    """A reproducible input of an op. Points are drawn apart from parameters, so that they can change between calls.

    facts are plain values for the records; options the arguments of the op that are not tensors; scratch the bytes per
    point that plain PyTorch holds in forward + backward, from which a run too large for the machine is foreseen;
    tolerances the relative errors allowed by the name of an output or input; recomputes: CAMKERNELS_RECOMPUTE decides
    what the op keeps. Inputs named weights.0, weights.1 ... are one list of the op. composed: where the op is called
    with others around it, what is computed, of the package whose functions are called, the inputs and the options.
    """

    op: str
    name: str
    points: int
    facts: Mapping[str, Any]
    passes: Mapping[str, Pass]
    scratch: int
    tolerances: Mapping[str, float]
    recomputes: bool = False
    composed: Callable[..., Tensor] | None = field(default=None, repr=False, compare=False)
    tags: frozenset[str] = frozenset()
    options: Callable[[], dict[str, Any]] = field(default=dict, repr=False, compare=False)
    make_parameters: Callable[[int], Inputs] = field(default=None, repr=False, compare=False)
    make_points: Callable[[int, int], Inputs] = field(default=None, repr=False, compare=False)
    floor: Callable[[Pass], Floor] = field(default=None, repr=False, compare=False)

    def computed_by(self, package: ModuleType, **options: Any) -> Callable[..., Any]:
        """What is measured, a function of the inputs: by camkernels, with a backend, or by camkernels.reference."""
        made = getattr(package, self.op) if self.composed is None else functools.partial(self.composed, package)
        return functools.partial(made, **self.options(), **options)

    def inputs(self, seed: int = 0, device: str = "cpu") -> Inputs:
        """Points and parameters under a seed, drawn on the CPU so that every device gets the same."""
        drawn = self.make_points(self.points, seed) | self.make_parameters(seed)
        return {name: tensor.to(device) for name, tensor in drawn.items()}

    def new_points(self, seed: int, device: str = "cpu") -> Inputs:
        """Other points of the same kind."""
        return {name: tensor.to(device) for name, tensor in self.make_points(self.points, seed).items()}
