# SPDX-License-Identifier: MIT
"""The CUDA kernels of every op, executed by the simulator in tests/sim, agree with the definition on the cases of the
registry. What is particular to an op stands in the file of that op. No GPU takes part."""

from __future__ import annotations

import pytest
import torch

from camkernels import testing
from sim import library, toolkit
from simulated import OPS, Simulated, production

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))


def every(step: int) -> list[testing.Case]:
    """Every so many cases of each op."""
    return [case for op in OPS for case in testing.cases(op)[::step]]


@pytest.fixture(scope="module")
def sim() -> Simulated:
    return production()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", every(1), ids=str)
def test_every_case_in_three_schedules(sim: Simulated, case: testing.Case, dtype: torch.dtype) -> None:
    sim.check(case, dtype, library.SCHEDULES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", every(2), ids=str)
def test_half_precision(sim: Simulated, case: testing.Case, dtype: torch.dtype) -> None:
    sim.check(case, dtype)


@pytest.mark.parametrize("case", every(4), ids=str)
def test_sm_80(sim: Simulated, case: testing.Case) -> None:
    with sim.library.architecture(80):
        sim.check(case, torch.float32)
