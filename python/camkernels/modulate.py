# SPDX-License-Identifier: MIT
"""Scale, shift and activation: the function `modulate` and the layer `Modulate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference, triton
from ._autograd import Argument, Operator
from ._backends import BACKENDS, Call, choose, define, round_to_autocast
from ._checks import check_choice, check_floating, check_number
from ._layers import KeepsFrequencies, as_frequencies
from ._modulation import ACTIVATIONS, NORMS, check_modulate, compute_dtype, per_group

__all__ = ["Modulate", "modulate"]

# ---- operators -------------------------------------------------------------------------------------------------------
# C: float64 where a tensor is, else float32. h [G, A, B]: a group is what is normalised together, its rows of B numbers
# are what channels run along. gamma and beta [M, A or 1, B or 1] in C; M divides G, group i has item i // (G // M).
# frequencies in C, [B], or one per group: that of group i is i modulo their number. activation: as in
# csrc/math/activation.h.

_TENSORS = (
    Argument("h", points=True),
    Argument("gamma", points=True),
    Argument("beta", points=True),
    Argument("frequencies", "Tensor?", differentiable=False),
)
_SETTINGS = "int activation, float omega, bool norm, float eps, bool frequency_per_group"


def _meta(h: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _declare(prefix: str) -> Operator:
    op = Operator(f"{prefix}modulate", _TENSORS, _SETTINGS, [Argument("y", points=True)], _meta)
    op.differentiate().differentiate()
    return op


_COMPILED = _declare("")  # "cpu" and "cuda": the dispatcher tells them apart
_TRITON = _declare("triton_")
for _name, _function in (("", "value"), ("_backward", "backward"), ("_backward_backward", "backward_backward")):
    triton.implement(f"triton_modulate{_name}", "modulate", _function)


def _kernels(
    operator: Operator, h: Tensor, gamma: Tensor, beta: Tensor, norm: str | None, eps: float, activation: str | None,
    omega: float, frequencies: Tensor | None,
) -> Tensor:  # fmt: skip
    """modulate by one of the operators."""
    dtype, axes = compute_dtype(h, gamma, beta), 2 if norm in ("ray", "frame") else 1
    frequencies = frequencies.to(dtype) if activation == "residual_sine" else None
    leading, group = h.shape[:-axes], h.shape[-axes:]
    padded = [t.to(dtype).reshape(*[1] * (axes - t.ndim), *t.shape) for t in (gamma, beta)]
    items = [per_group(t, leading, axes) for t in padded]
    alike = all(t.shape[1:] == group or math.prod(t.shape[1:]) == 1 for t in items)
    if axes == 1 or (alike and (norm == "frame" or frequencies is None)):  # what lies in the group does not tell rows
        group = (1, math.prod(group))
        items = [t.flatten(1).unsqueeze(1) for t in items]
    settings = (ACTIVATIONS.index(activation), float(omega), norm is not None, float(eps), norm == "frame")
    return operator(h.reshape(-1, *group), *items, frequencies, settings=settings).reshape(h.shape)


# ---- function --------------------------------------------------------------------------------------------------------


def modulate(
    h: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    norm: str | None = None,
    eps: float = 1e-5,
    activation: str | None = "relu",
    omega: float = 1.0,
    frequencies: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = act(gamma * norm(h) + beta), the middle of a modulated layer, also where the linear part is a convolution.

    gamma and beta broadcast to h as in PyTorch: [..., 1] per point, [..., C] per channel, [N, C, 1, 1] for frames.
    norm: None, "point" (last axis), "ray" (last two axes together), "frame" (H and W of h [N, C, H, W]). The result has
    h's shape and dtype, or autocast's. Activations, dtypes and exact definition: `camkernels.reference.modulate`;
    backend and errors as in `modulated_mlp`.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024; Perez et al., "FiLM", 2018.

    >>> modulate(torch.randn(2, 3, 4, 4), torch.rand(2, 3, 1, 1), torch.zeros(3, 1, 1), norm="frame").shape
    torch.Size([2, 3, 4, 4])
    """
    op = "modulate"
    check_floating(op, "h", h)
    options = {"norm": norm, "eps": eps, "activation": activation, "omega": omega, "frequencies": frequencies}
    chosen = choose(Call(op, h.device.type, h.device.index), backend)
    if chosen == "reference":
        y = define(reference.modulate, h, gamma, beta, **options)
    else:
        check_modulate(op, h, gamma, beta, **options)
        y = _kernels(_TRITON if chosen == "triton" else _COMPILED, h, gamma, beta, **options)
    return round_to_autocast(y)


# ---- layer -----------------------------------------------------------------------------------------------------------


class Modulate(KeepsFrequencies):
    """act(gamma * norm(h) + beta) as a layer without parameters; arguments, shapes and errors: `modulate`.

    >>> Modulate(norm="ray", eps=1e-6)(torch.randn(4, 6, 8), torch.rand(4, 1, 1), torch.zeros(4, 1, 1)).shape
    torch.Size([4, 6, 8])
    """

    def __init__(
        self,
        norm: str | None = None,
        eps: float = 1e-5,
        activation: str | None = "relu",
        omega: float = 1.0,
        frequencies: Tensor | Sequence[float] | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        check_choice("Modulate", "norm", norm, NORMS)
        check_choice("Modulate", "activation", activation, ACTIVATIONS)
        check_choice("Modulate", "backend", backend, (None, *BACKENDS))
        check_number("Modulate", "eps", eps, least=0.0)
        check_number("Modulate", "omega", omega)
        self.options = {"norm": norm, "eps": eps, "activation": activation, "omega": omega}
        self.backend = backend
        if activation == "residual_sine" and frequencies is None:
            raise ValueError("Modulate: frequencies must be given for 'residual_sine', one per channel")
        constants = None if frequencies is None else as_frequencies("Modulate", frequencies)
        self.register_buffer("frequencies", constants, persistent=False)

    def forward(self, h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """h, gamma and beta that broadcast to it -> h's shape."""
        return modulate(h, gamma, beta, **self.options, frequencies=self.frequencies, backend=self.backend)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
