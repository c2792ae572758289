# SPDX-License-Identifier: MIT
"""SparseRowAdam's CUDA kernel, which tests/sim executes, computes what the definition says. No GPU takes part."""

from __future__ import annotations

import pytest
import torch

from camkernels import optim, reference
from conftest import DTYPES
from sim import library, toolkit
from simulated import Simulated, production
from test_optim import WIDTHS, random_state

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))
ROWS, LR, BETAS, EPS = 301, 0.01, (0.9, 0.99), 1e-8


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


def drawn(width: int, dtype: torch.dtype, share: float) -> torch.Tensor:
    """A gradient of whose numbers that share is not 0; one is NaN."""
    generator = torch.Generator().manual_seed(4)
    numbers = torch.randn(ROWS, width, generator=generator, dtype=torch.float64)
    numbers *= torch.rand(ROWS, width, generator=generator) < share
    numbers[7, -1] = torch.nan
    return numbers.to(dtype)


def run(sim: Simulated, state: list[torch.Tensor], gradient: torch.Tensor, rows: torch.Tensor | None) -> None:
    corrections = optim._corrections(BETAS, state[1].dtype, torch.device("cpu"))
    sim.adam(*state, gradient, rows, corrections, LR, *BETAS, EPS)


def check_step(
    sim: Simulated, state: tuple[torch.Tensor, ...], gradient: torch.Tensor, rows: torch.Tensor | None = None
) -> None:
    """A step as defined; rows that it does not touch keep their bits."""
    ours, expected = ([t.clone() for t in state] for _ in range(2))
    run(sim, ours, gradient, rows)
    reference.sparse_row_adam(*expected, gradient, rows, lr=LR, betas=BETAS, eps=EPS)
    dtype = gradient.dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype)
    for name, got, wanted, before in zip(("values", "first", "second", "steps"), ours, expected, state, strict=True):
        rtol = tolerance or (torch.finfo(dtype).eps if name == "values" else 1e-6)
        named = {"msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol, equal_nan=True, **named)
        untouched = expected[3] == state[3]
        assert torch.equal(got[untouched], before[untouched])


@pytest.mark.parametrize("schedule", library.SCHEDULES)
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_agrees(sim: Simulated, dtype: torch.dtype, width: int, listed: bool, schedule: str) -> None:
    state, gradient = random_state(ROWS, width, dtype), drawn(width, dtype, 0.3)
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(5))[:100] if listed else None
    gradient = gradient if rows is None else gradient[rows]
    with sim.library.schedule(schedule):
        check_step(sim, state, gradient, rows)


def test_rows_that_are_not_there_change_nothing(sim: Simulated) -> None:
    state = random_state(ROWS, 2, torch.float32)
    ours = [t.clone() for t in state]
    run(sim, ours, torch.ones(3, 2), torch.tensor([-1, ROWS, 1 << 40]))
    assert all(torch.equal(got, before) for got, before in zip(ours, state, strict=True))


@pytest.mark.parametrize("width", [1, 2, 8, 32, 64])
def test_loads(sim: Simulated, width: int) -> None:
    """A gradient's numbers once, those of touched rows again from the cache; their correction, once for each lane."""
    state, gradient = random_state(ROWS, width, torch.float32), torch.zeros(ROWS, width)
    gradient[::3] = 1
    touched, lanes = len(gradient[::3]), min(width, 32)
    sim.library.counters()
    run(sim, list(state), gradient, None)
    found = sim.library.counters()
    assert found["launches"] == 1 and found["atomics"] == 0
    assert found["loads"] == (ROWS + touched) * width + touched * 2 * lanes
