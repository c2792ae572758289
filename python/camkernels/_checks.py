# SPDX-License-Identifier: MIT
"""Argument checks that every op shares. A message names op, argument, what was expected and given, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """TypeError unless the tensor is dense and float64, float32, bfloat16 or float16."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}; use torch.as_tensor")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}; convert with .to_dense() or pad it")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}; convert with .float()"
        )


def check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    """TypeError unless dtype is one of the four floating-point types."""
    if dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be torch.float32, float64, bfloat16 or float16, got {dtype}")


def check_finite(op: str, name: str, points: Tensor) -> None:
    """ValueError unless all coordinates of points [..., d] are finite."""
    broken = ~points.detach().isfinite().all(-1)
    if broken.any():
        raise ValueError(
            f"{op}: {name} must be finite, got {int(broken.sum())} points with NaN or infinite coordinates; leave them "
            "out"
        )


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int | str], remedy: str) -> None:
    """ValueError unless the shape fits; a string stands for any size, a leading "..." for any number of axes."""
    wanted = list(expected)
    given = list(tensor.shape)
    if wanted and wanted[0] == "...":
        wanted = wanted[1:]
        given = given[len(given) - len(wanted) :] if len(given) >= len(wanted) else []
    fits = len(given) == len(wanted) and all(isinstance(w, str) or w == g for w, g in zip(wanted, given, strict=True))
    if not fits:
        shape = ", ".join(str(w) for w in expected)
        raise ValueError(f"{op}: {name} must have shape [{shape}], got {list(tensor.shape)}; {remedy}")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """ValueError unless all tensors are on one device; nothing is moved silently."""
    given = [(name, t.device) for name, t in tensors.items() if t is not None]
    if any(device != given[0][1] for _, device in given):
        places = ", ".join(f"{name} on {device}" for name, device in given)
        raise ValueError(f"{op}: all tensors must be on one device, got {places}; move them with .to(device)")


def check_flag(op: str, name: str, value: object) -> None:
    """TypeError unless value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_size(op: str, name: str, value: object, least: int = 1) -> None:
    """TypeError unless value is an int, ValueError unless it is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{op}: {name} must be an int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}")


def check_sizes(op: str, name: str, values: object) -> tuple[int, ...]:
    """The values, one int or several; TypeError for others, ValueError where one is below 1."""
    if not isinstance(values, (Integral, Iterable)) or isinstance(values, (bool, str, Tensor)):
        raise TypeError(f"{op}: {name} must be an int or a list of them, got {values!r} ({type(values).__name__})")
    sizes = (values,) if isinstance(values, Integral) else tuple(values)
    for size in sizes:
        check_size(op, name, size)
    return sizes


def check_choice(op: str, name: str, value: object, choices: Iterable[str | None]) -> None:
    """ValueError unless value is one of the choices."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(op: str, name: str, value: Any, least: float = -math.inf) -> None:
    """TypeError unless the value is a number, ValueError unless it is finite and at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}; give a float")
    if not (-math.inf < value < math.inf and value >= least):  # torch.compile cannot trace isfinite of a free number
        bound = "" if least == -math.inf else f" and at least {least:g}"
        raise ValueError(f"{op}: {name} must be finite{bound}, got {value!r}")
