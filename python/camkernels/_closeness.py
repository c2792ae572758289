# SPDX-License-Identifier: MIT
"""How close two tensors are, and what is said where they are not; public as part of `camkernels.testing`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def spread(expected: Tensor) -> float:
    """s = min(max|b|, 20 * median of the non-zero |b|) over the finite items: what "small" means in this tensor."""
    size = expected.detach().double().abs()
    size = size[size.isfinite() & (size > 0)]
    return float(min(size.max(), 20 * size.median())) if len(size) else 0.0


def share_of(actual: Tensor, expected: Tensor, rtol: float, atol: float, s: float | Tensor | None = None) -> Tensor:
    """|a - b| as a share of what is allowed; infinite where one is NaN, or infinite, and the other is not the same."""
    a, b = actual.detach().double(), expected.detach().double()
    allowed = atol + rtol * (b.abs() + (spread(b) if s is None else s))
    share = (a - b).abs() / allowed
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, torch.where(a.isfinite() & b.isfinite(), share, torch.inf))


def assert_close(
    actual: Tensor, expected: Tensor, *, rtol: float, atol: float, name: str = "result", least: float | Tensor = 0.0
) -> None:
    """|a - b| <= atol + rtol * (|b| + max(spread(b), least)); NaN where b is NaN, the same infinity; equal shape, dtype
    and device. least [like b]: size of the terms of a sum, whose rounding remains where they cancel.
    """
    for what in ("shape", "dtype", "device"):
        a, b = getattr(actual, what), getattr(expected, what)
        assert a == b, f"{name}: {what} is {a}, expected {b}"
    share = share_of(
        actual, expected, rtol, atol, torch.as_tensor(least, device=expected.device).clamp(min=spread(expected))
    )
    if (share > 1).any():
        raise AssertionError(describe(name, actual, expected, share))


def describe(name: str, actual: Tensor, expected: Tensor, share: Tensor) -> str:
    worst = int(share.argmax())
    where = tuple(int(i) for i in np.unravel_index(worst, share.shape))
    a, b = actual.detach().reshape(-1)[worst].item(), expected.detach().reshape(-1)[worst].item()
    return (
        f"{name}: {int((share > 1).sum())} of {share.numel()} items differ; worst at {where}: "
        f"got {a!r}, expected {b!r}, {share.max().item():.3g} times the tolerance"
    )
