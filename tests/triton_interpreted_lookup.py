# SPDX-License-Identifier: MIT
"""coordinate_modulation on the Triton backend in Triton's interpreter: run by test_triton_interpreted.py."""

import os
from dataclasses import replace

import pytest
import torch

import triton_interpreter
from camkernels import testing
from conftest import DTYPES, definition_of, function_of, require
from simulated import lookup_call
from test_operators import Recorder

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
triton_interpreter.repair()

OP = "coordinate_modulation"
CASES = testing.cases(OP)
TRITON, REFERENCE = function_of(OP, "triton"), definition_of(OP)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(case, dtype):
    testing.check(case, TRITON, REFERENCE, dtype=dtype, order=1)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_second_order_by_the_reference_formula(case):
    for dtype in (torch.float64, torch.float32):
        testing.check(case, TRITON, REFERENCE, dtype=dtype, order=2)
