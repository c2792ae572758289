# SPDX-License-Identifier: MIT
"""What the tests share: every op of the case registry, the backends that can run it here, and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import camkernels
from camkernels import _backends, testing

OPS = tuple(testing.CASES)
CASES = [case for op in OPS for case in testing.cases(op)]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HERE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = ("points", "parameters", "both")  # what requires a gradient


def device_of(backend: str) -> str:
    """Where a backend computes; the reference, which can anywhere, on the CPU."""
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def reason_against(backend: str, op: str) -> str | None:
    """Why a backend cannot run an op on this machine; None if it can."""
    device = device_of(backend)
    if device == "cuda" and HERE != "cuda":
        return "PyTorch finds no CUDA device"
    return _backends.can_run(backend, _backends.Call(op, device))


def backends(op: str) -> list[str]:
    """The backends that can run an op on this machine; always the reference, last."""
    return [backend for backend in _backends.BACKENDS if reason_against(backend, op) is None]


def each(cases: Sequence[testing.Case], *, reference: bool = True) -> list[Any]:
    """Parameters (case, backend) for every case and every backend that can run it here."""
    pairs = [(case, b) for case in cases for b in backends(case.op) if reference or b != "reference"]
    return [pytest.param(case, b, id=f"{case.op}-{case}-{b}") for case, b in pairs]


def function_of(op: str, backend: str | None = None) -> Callable[..., Any]:
    """The public function of an op on one backend; None: the one it chooses."""
    return partial(getattr(camkernels, op), backend=backend)


def definition_of(op: str) -> Callable[..., Any]:
    return getattr(camkernels.reference, op)


def make(case: testing.Case, backend: str, dtype: torch.dtype = torch.float64, **options: Any) -> testing.Call:
    return case.make(dtype, device_of(backend), **options)


def require(call: testing.Call, mask: str) -> dict[str, Tensor]:
    """Fresh leaves of a call's inputs, of which those named by the mask require a gradient."""
    wanted = {name: mask in ("both", "points" if name == call.points else "parameters") for name in call.inputs}
    return {name: t.detach().clone().requires_grad_(wanted[name]) for name, t in call.inputs.items()}


def positional(function: Callable[..., Any], call: testing.Call) -> Callable[..., Any]:
    """The function of the tensors alone, in the order of call.inputs."""
    return lambda *tensors: function(**dict(zip(call.inputs, tensors, strict=True)), **call.options)


@dataclass(frozen=True)
class Layer:
    """A layer of the package in a small size: build(**options) -> module; inputs(*leading) -> its first argument."""

    name: str
    build: Callable[..., torch.nn.Module]
    width: int  # of the last axis of the inputs
    parameters: tuple[str, ...]

    def inputs(self, *leading: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(*leading, self.width, generator=generator, dtype=dtype)

    def __str__(self) -> str:
        return self.name


def _hash_grid_layer(**options: Any) -> torch.nn.Module:
    sizes = {"dims": 3, "n_levels": 4, "log2_hashmap_size": 9, "finest_resolution": 40, "init_scale": 1.0}
    return camkernels.HashGrid(**sizes | options)


LAYERS = (Layer("HashGrid", _hash_grid_layer, 3, ("table",)),)
