# SPDX-License-Identifier: MIT
"""Scale, shift and activation: the function `modulate` and the layer `Modulate`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import reference
from ._backends import BACKENDS, Call, choose, define, round_to_autocast
from ._checks import check_choice, check_floating, check_number
from ._modulation import ACTIVATIONS, NORMS

__all__ = ["Modulate", "modulate"]


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
    check_floating("modulate", "h", h)
    choose(Call("modulate", h.device.type, h.device.index), backend)
    options = {"norm": norm, "eps": eps, "activation": activation, "omega": omega, "frequencies": frequencies}
    return round_to_autocast(define(reference.modulate, h, gamma, beta, **options))


class Modulate(nn.Module):
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
        constants = None if frequencies is None else torch.as_tensor(frequencies)
        self.register_buffer("frequencies", constants, persistent=False)

    def forward(self, h: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """h, gamma and beta that broadcast to it -> h's shape."""
        return modulate(h, gamma, beta, **self.options, frequencies=self.frequencies, backend=self.backend)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
