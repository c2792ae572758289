# SPDX-License-Identifier: MIT
"""Adam that leaves rows without gradient as they are."""

from __future__ import annotations

import math

from torch import Tensor


def sparse_row_adam(
    values: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    gradient: Tensor,
    rows: Tensor | None = None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """A step in place: values and both moments [n, ...], steps int32 [n]; gradient [n, ...], or [k, ...] of k rows.

    Rows are listed at most once. A row that has a number other than 0 in its gradient g does

        t <- t + 1,   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    in the dtype of the moments, others change nothing.

    >>> import torch
    >>> values, first, second = (torch.zeros(3, 2) for _ in range(3))
    >>> steps, gradient = torch.zeros(3, dtype=torch.int32), torch.tensor([[4.0, -2.0]])
    >>> sparse_row_adam(values, first, second, steps, gradient, torch.tensor([1]), lr=0.5, betas=(0.9, 0.99), eps=0.0)
    >>> values.tolist(), steps.tolist()
    ([[0.0, 0.0], [-0.5, 0.5], [0.0, 0.0]], [0, 1, 0])
    """
    numbers = gradient.reshape(len(gradient), math.prod(gradient.shape[1:]))
    used = numbers.ne(0).any(1).nonzero().flatten()
    g = gradient.index_select(0, used).to(first.dtype)
    rows = used if rows is None else rows.index_select(0, used)
    t = steps.index_select(0, rows) + 1
    m = betas[0] * first.index_select(0, rows) + (1 - betas[0]) * g
    v = betas[1] * second.index_select(0, rows) + (1 - betas[1]) * g.square()
    for state, changed in ((steps, t), (first, m), (second, v)):
        state.index_copy_(0, rows, changed)
    power = t.double().reshape(-1, *[1] * (values.ndim - 1))
    m_part, v_part = ((1 - beta**power).to(first.dtype) for beta in betas)
    p = values.index_select(0, rows).to(first.dtype) - lr * (m / m_part) / ((v / v_part).sqrt() + eps)
    values.index_copy_(0, rows, p.to(values.dtype))
