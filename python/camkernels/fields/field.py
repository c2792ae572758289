# SPDX-License-Identifier: MIT
"""What the fields share: learning rates for the modulation grids, and the parameter names of the public codes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GRIDS = {"grids", "affine", "affines", "mod_grid", "gamma", "beta"}  # names of modulation grids, ours and public ones


def parameter_groups(module: nn.Module, lr: float, factor: float = 10.0) -> list[dict[str, Any]]:
    """Parameters for an optimizer: `lr` for the network, `factor` times that for its modulation grids.

    A grid is known by a part of its name: that of our layers, or of the drop-in classes and of the public codes.

    >>> from camkernels.fields import CAMImageField
    >>> [group["lr"] for group in parameter_groups(CAMImageField(), 1e-3)]
    [0.001, 0.01]
    """
    grids, others = [], []
    for name, parameter in module.named_parameters():
        (grids if GRIDS & set(name.split(".")) else others).append(parameter)
    groups = [{"params": others, "lr": lr}, {"params": grids, "lr": factor * lr}]
    return [group for group in groups if group["params"]]


def half_cosine(done: float, final: float = 0.01) -> float:
    """Factor of the learning rates when a share of the run is done: half a cosine, from 1 to `final`.

    >>> [round(half_cosine(done), 3) for done in (0.0, 0.5, 1.0)]
    [1.0, 0.505, 0.01]
    """
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


class Field(nn.Module):
    """A model of a public code, assembled from our layers.

    config: its arguments, plain numbers and strings, from which a checkpoint builds it again. A subclass names in
    `official_views` which part of its tensors the public code calls what.
    """

    config: dict[str, Any]
    learning_rate = 1e-3  # at which the public code starts
    grid_factor = 1.0  # times that rate for the modulation grids

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer, with the learning rates of the public code's recipe."""
        return parameter_groups(self, lr, self.grid_factor)

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by our names, as state_dict() gives them -> views of them by the public code's names and shapes."""
        raise NotImplementedError

    def load_official(self, state: Mapping[str, Any]) -> None:
        """Takes over the parameters of the public code's model: its state_dict, or a tree of arrays of flax.

        Raises ValueError, and changes nothing, if a name is missing or unknown or a shape is another.
        """
        given = dict(_flatten(state))
        views = self.official_views(self.state_dict())
        _check_names(type(self).__name__, list(views), list(given))
        for name, view in views.items():
            if tuple(given[name].shape) != tuple(view.shape):
                raise ValueError(
                    f"{type(self).__name__}.load_official: {name} must have shape {list(view.shape)}, got "
                    f"{list(given[name].shape)}; build the field with the arguments of that model"
                )
        with torch.no_grad():
            for name, view in views.items():
                view.copy_(given[name])


def _flatten(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and tensors; the names of a tree are joined by dots."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _check_names(op: str, wanted: list[str], given: list[str]) -> None:
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    if missing or unknown:
        lists = {"lacks": missing, "has the unknown": unknown}
        found = " and ".join(f"{verb} {_abridged(names)}" for verb, names in lists.items() if names)
        raise ValueError(f"{op}.load_official: the state {found}; build the field with the arguments of that model")


def _abridged(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def linear_views(own: Mapping[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    """Weight and bias of a linear layer or a convolution."""
    return {f"{theirs}.{kind}": own[f"{ours}.{kind}"] for kind in ("weight", "bias")}
