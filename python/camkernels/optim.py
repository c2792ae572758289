# SPDX-License-Identifier: MIT
"""Optimizers for large tables of which a step touches few rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._checks import check_number

__all__ = ["SparseRowAdam"]


class SparseRowAdam(Optimizer):
    """Adam, row by row: a step changes only the rows whose gradient has a number other than 0.

    Each row of a parameter [rows, ...], its first axis, has a count t of the steps that touched it. Such a step with
    gradient g does

        t <- t + 1,   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Other rows keep p, m, v and t, whereas torch.optim.Adam lets their moments fall and moves them on; for rows that
    every step touches both are the same. Gradients are dense, or sparse COO [rows, ...] with one sparse axis, of which
    rows that are listed several times are summed. Runs where the parameters are; finding the rows waits for the device.

    Raises ValueError for options out of range, parameters of no axis and gradients of more sparse axes.

    >>> table = torch.nn.Parameter(torch.zeros(4, 2))
    >>> optimizer = SparseRowAdam([table], lr=0.1)
    >>> table[1].sum().backward()
    >>> optimizer.step()
    >>> table.tolist()[:2]
    [[0.0, 0.0], [-0.10000000149011612, -0.10000000149011612]]
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-15,
    ):
        op = "SparseRowAdam"
        check_number(op, "lr", lr, least=0.0)
        check_number(op, "eps", eps, least=0.0)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{op}: betas must be at least 0 and below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps})
        for group in self.param_groups:
            if any(p.ndim == 0 for p in group["params"]):
                raise ValueError(f"{op}: parameters must have rows, got one without any axis; use torch.optim.Adam")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of every parameter with a gradient; returns the loss of the closure, as torch.optim.Adam does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        rows, gradient = _touched(parameter.grad)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        count = state["step"].index_select(0, rows).add_(1)
        first = state["exp_avg"].index_select(0, rows).lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        for name, moved in (("step", count), ("exp_avg", first), ("exp_avg_sq", second)):
            state[name].index_copy_(0, rows, moved)
        count = count.double().reshape(-1, *[1] * (parameter.ndim - 1))
        rate = (group["lr"] / (1 - beta1**count)).to(parameter.dtype)
        scale = (1 - beta2**count).rsqrt().to(parameter.dtype)
        change = rate * first / second.sqrt().mul_(scale).add_(group["eps"])
        parameter.index_add_(0, rows, change, alpha=-1)


def _touched(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(rows [n] with a number other than 0, their gradients [n, ...])."""
    if gradient.is_sparse:
        if gradient.sparse_dim() != 1:
            raise ValueError(
                f"SparseRowAdam: gradients must be dense or have one sparse axis, got {gradient.sparse_dim()}; use "
                ".to_dense()"
            )
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        used = _nonzero(values)
        return rows.index_select(0, used), values.index_select(0, used)
    rows = _nonzero(gradient)
    return rows, gradient.index_select(0, rows)


def _nonzero(rows: Tensor) -> Tensor:
    """Numbers of the rows [n, ...] that are not all 0."""
    numbers = rows.reshape(-1).nonzero().flatten()
    return torch.unique_consecutive(numbers // math.prod(rows.shape[1:]))
