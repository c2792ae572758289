# SPDX-License-Identifier: MIT
"""A second device, played: tensors that say they are on "meta" and compute on the CPU, and a record of what they do.

    with Elsewhere() as calls:
        y = function(moved(x))

It shows what a function asks of the device where its tensors are, on a machine that has none. No GPU takes part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
ATEN = torch.ops.aten
# The host waits for a number, or for the size of a result.
READS = (ATEN._local_scalar_dense.default, ATEN.equal.default, ATEN.unique_consecutive.default, ATEN.nonzero.default)


class Moved(Tensor):
    """A tensor elsewhere; `there` is where its numbers really are."""

    there: Tensor

    @staticmethod
    def __new__(cls, there: Tensor) -> Moved:
        strides, offset = there.stride(), there.storage_offset()
        options = {"strides": strides, "storage_offset": offset, "dtype": there.dtype, "device": DEVICE}
        tensor = Tensor._make_wrapper_subclass(cls, there.shape, **options)
        tensor.there = there
        return tensor

    def tolist(self) -> Any:  # PyTorch refuses it to subclasses
        Elsewhere.entered.reads += 1
        return self.there.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} on a tensor elsewhere, outside of `with Elsewhere()`")


def moved(t: Tensor) -> Tensor:
    return Moved(t)


class Elsewhere(TorchDispatchMode):
    """Runs operators where their tensors are. An operator that mixes devices, or copies from one to the other, is an
    AssertionError; reads: how often the host read numbers; names: of all operators."""

    entered: Elsewhere

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.names: list[str] = []

    def __enter__(self) -> Elsewhere:
        Elsewhere.entered = self
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = {isinstance(t, Moved) for t in tensors}
        if kwargs.get("device") is not None:
            places.add(kwargs["device"] == DEVICE)
            kwargs["device"] = torch.device("cpu")
        assert len(places) < 2, f"{function} mixes devices or copies from one to the other"
        self.names.append(str(function))
        self.reads += function in READS
        there = {id(t.there): t for t in tensors if isinstance(t, Moved)}
        args, kwargs = tree_map(lambda t: t.there if isinstance(t, Moved) else t, (args, kwargs))
        found = function(*args, **kwargs)
        if places != {True}:
            return found
        return tree_map(lambda t: there.get(id(t)) or Moved(t) if isinstance(t, Tensor) else t, found)
