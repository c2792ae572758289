# SPDX-License-Identifier: MIT
"""Calls into the self-test kernels, compared with float64; shared by the tests of the simulator."""

from __future__ import annotations

import torch

from .library import Library

TYPES = (torch.float16, torch.bfloat16, torch.float32)  # the last as tf32
BINS = 37
# Order of `enum Bug` in selftest/reduction.cu and selftest/matmul.cu.
NO_BARRIER, DIVERGENT_BARRIER, WRONG_MASK, OVERRUN, MIXED_OPERATIONS = range(1, 6)
NO_WAIT, NO_FILL_BARRIER = 1, 2


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


def dot(sim: Library, bug: int = 0, n: int = 3000) -> tuple[float, float]:
    """(by the kernel, in float64)"""
    a, b, out = random(n), random(n, seed=1), torch.zeros(1)
    sim.call("selftest_dot", a, b, out, n, bug)
    return out.item(), (a.double() @ b.double()).item()


def matmul(sim: Library, kind: int = 0, bug: int = 0, size: tuple[int, int, int] = (64, 48, 96)) -> torch.Tensor:
    """Largest difference from float64."""
    m, n, k = size
    a, b = random(m, k, dtype=TYPES[kind]), random(k, n, dtype=TYPES[kind], seed=1)
    c = torch.full((m, n), float("nan"))
    sim.call("selftest_matmul", a, b, c, m, n, k, kind, bug, 0)
    if TYPES[kind] is torch.float32:
        a, b = round_to_tf32(a), round_to_tf32(b)
    return (c.double() - a.double() @ b.double()).abs().max()


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def scatter(sim: Library, features: int, shift: int = 0, n: int = 1000) -> None:
    keys, values = integers(0, BINS, n), random(n, features)
    table = torch.zeros(BINS * features + shift)
    sim.call("selftest_scatter", keys, values, table, n, features, shift)
    expected = torch.zeros(BINS, features, dtype=torch.float64).index_add_(0, keys, values.double())
    torch.testing.assert_close(table[shift:].view(BINS, features).double(), expected, atol=1e-4, rtol=0)


def histogram(sim: Library, kind: int) -> None:
    """kind: int, unsigned, 64-bit, float, double."""
    keys = integers(0, BINS, 2000)
    bins = torch.zeros(BINS, dtype=(torch.int32, torch.int32, torch.int64, torch.float32, torch.float64)[kind])
    sim.call("selftest_histogram", keys, bins, len(keys), kind)
    assert torch.equal(bins.long(), torch.bincount(keys, minlength=BINS))


def scatter_other(sim: Library, kind: int) -> None:
    """kind: half2, bfloat162, double."""
    n, columns = 300, 1 if kind == 2 else 2
    keys = integers(0, BINS, n)
    values = random(n, columns, dtype=torch.float64 if kind == 2 else torch.float32)
    table = torch.zeros(BINS, columns, dtype=(torch.float16, torch.bfloat16, torch.float64)[kind])
    sim.call("selftest_scatter_other", keys, values, table, n, kind)
    expected = torch.zeros(BINS, columns, dtype=torch.float64).index_add_(0, keys, values.double())
    tolerance = (0.03, 0.3, 1e-12)[kind]  # about ten roundings of sums up to 10
    torch.testing.assert_close(table.double(), expected, atol=tolerance, rtol=0)
