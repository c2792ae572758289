# SPDX-License-Identifier: MIT
"""The MLPs of the Triton backend in Triton's interpreter: many points, wide layers, the grid with an MLP behind it.

The registered cases are in triton_interpreted.py; run as that file."""

import os

import pytest
import torch

import triton_interpreter
from camkernels import testing
from camkernels.triton import modulated_mlp as kernels
from conftest import DTYPES, definition_of, function_of, require
from mlp_cases import FUSED, MLPS, agree, stays_finite_inside, taken
from test_operators import Recorder

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
triton_interpreter.repair()

FEW = [MLPS[2], FUSED[1], FUSED[2]]


def functions_of(case):
    return function_of(case.op, "triton"), definition_of(case.op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", taken(MLPS, "triton") + FUSED, ids=lambda case: f"{case.op}-{case}")
def test_value_and_gradients(case, dtype):
    agree(case, *functions_of(case), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_beyond_the_range_of_float16_stay_finite_inside(dtype):
    stays_finite_inside(function_of("modulated_mlp", "triton"), dtype)


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_second_order_by_the_reference_formula(case):
    agree(case, *functions_of(case), dtype=torch.float32, order=2)


def test_parameters_of_another_dtype_than_the_table(dtype=torch.bfloat16):
    call = FUSED[1].make(torch.float32)
    changed = {name: t.to(dtype) for name, t in call.inputs.items() if name not in ("x", "table")}
    call.inputs.update(changed)
    results = [testing.evaluate(f, call) for f in functions_of(FUSED[1])]
    testing.compare(FUSED[1], call, *results, dtype=dtype)


def test_several_launches_add_up(monkeypatch):
    """What a launch leaves in memory is limited; sums go on in the next one."""
    monkeypatch.setattr(kernels, "ROW_BYTES", 0)
    for case in (MLPS[1], MLPS[2], FUSED[6]):
        agree(case, *functions_of(case), dtype=torch.float32)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("mask", ["points", "parameters"])
def test_some_gradients_alone(case, mask):
    call = case.make()
    found = []
    for function in functions_of(case):
        inputs = require(call, mask)
        y = function(**call.arguments(inputs))
        found.append(torch.autograd.grad(y.square().sum(), [t for t in inputs.values() if t.requires_grad]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_repeated_bit_by_bit(case):
    """All but the table's gradient is summed in a fixed order."""
    results = [testing.evaluate(functions_of(case)[0], case.make()) for _ in range(2)]
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_table_s_gradient_is_not_deterministic():
    call = FUSED[0].make()
    function = functions_of(FUSED[0])[0]
    torch.use_deterministic_algorithms(True)
    try:
        for mask, refused in (("points", False), ("parameters", True)):
            inputs = require(call, mask)
            total = function(**call.arguments(inputs)).sum()
            wanted = [t for t in inputs.values() if t.requires_grad]
            if not refused:
                torch.autograd.grad(total, wanted)
                continue
            with pytest.raises(RuntimeError, match="hash_grid_mlp_backward of backend 'triton' does not have a determ"):
                torch.autograd.grad(total, wanted)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_compiled(case):
    torch._dynamo.reset()  # what differs between cases would become a symbol, of which messages cannot be made
    call = case.make()
    function = functions_of(case)[0]

    def loss(*tensors):
        return function(**call.arguments(dict(zip(call.inputs, tensors, strict=True)))).square().sum()

    results = []
    for f in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = list(require(call, "both").values())
        results.append(torch.autograd.grad(f(*inputs), inputs))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_opcheck(case):
    with Recorder() as recorder:
        testing.evaluate(functions_of(case)[0], case.make(), order=2)
    assert len(recorder.calls) == 3
    for operator, arguments in recorder.calls.items():
        assert operator._schema.name.startswith(f"camkernels::triton_{case.op}")
        torch.library.opcheck(operator, arguments[0])


@pytest.mark.parametrize(("allowed", "precision"), [(False, "tf32x3"), (True, "tf32")])
def test_float32_is_exact_unless_tf32_is_allowed(allowed, precision):
    assert kernels.precision_of(torch.float32, allowed) == precision
    assert kernels.precision_of(torch.float64, allowed) == "ieee"


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("case", [MLPS[0], FUSED[0]], ids=str)
def test_kernels_learn_whether_tf32_is_allowed(case, allowed, monkeypatch):
    told, precision_of = [], kernels.precision_of
    monkeypatch.setattr(kernels, "precision_of", lambda number, tf32: told.append(tf32) or precision_of(number, tf32))
    with testing.tf32(allowed):
        testing.evaluate(functions_of(case)[0], case.make())
    assert told == [allowed, allowed]  # value, gradients
