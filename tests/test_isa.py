# SPDX-License-Identifier: MIT
"""The library of every instruction set computes the same; one that the machine lacks is a reason, not a crash."""

import json
import os
import subprocess
import sys

import pytest

import camkernels
from camkernels import _ops

ISAS = ("baseline", "avx2", "avx512")

COMPARE = """
import json
from functools import partial
import torch
import camkernels
from camkernels import _backends, _ops, testing

torch.set_num_threads(1)
compared = 0
for dtype in testing.TOLERANCES:
    for op in (op for op in testing.CASES if _backends.can_run("cpu", _backends.Call(op, "cpu")) is None):
        function, definition = partial(getattr(camkernels, op), backend="cpu"), getattr(camkernels.reference, op)
        for case in testing.cases(op)[::2]:
            for options in ({"order": 2}, *([{"jacobian": True}] if testing.has_jacobian(op) else [])):
                testing.check(case, function, definition, dtype=dtype, **options)
            compared += 1
print(json.dumps({"isa": _ops.cpu_isa, "compared": compared}))
"""

REPORT = """
import json
import torch
import camkernels
from camkernels import _backends, _ops

call = _backends.Call("hash_grid", "cpu")
layer = camkernels.HashGrid(dims=2, n_levels=2, log2_hashmap_size=8)
shape = list(layer(torch.rand(3, 2)).shape)
found = {"isa": _ops.cpu_isa, "reason": _backends.can_run("cpu", call), "chosen": _backends.choose(call, None)}
print(json.dumps(found | {"shape": shape}))
"""


def run(program, isa):
    environment = os.environ | {"CAMKERNELS_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def require_library(isa):
    if isa not in _ops.usable_isas():
        pytest.skip(f"the processor does not execute {isa}: it has {', '.join(_ops.usable_isas())}")
    if not (_ops.FOLDER / f"_cpu_{isa}.so").exists():
        pytest.skip(f"_cpu_{isa}.so was not built")


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees_with_the_definition(isa):
    require_library(isa)
    found = run(COMPARE, isa)
    assert found["isa"] == isa and found["compared"] > 100


@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_can_be_forced(isa):
    require_library(isa)
    assert run(REPORT, isa) == {"isa": isa, "reason": None, "chosen": "cpu", "shape": [3, 4]}


@pytest.mark.parametrize("isa", [*[isa for isa in ISAS if isa not in _ops.usable_isas()], "mmx"])
def test_one_that_the_machine_lacks_is_a_reason_and_the_reference_serves(isa):
    found = run(REPORT, isa)
    usable = ", ".join(_ops.usable_isas())
    assert found == {
        "isa": None,
        "reason": f"CAMKERNELS_CPU_ISA={isa} is not one of {usable}, which this machine runs",
        "chosen": "reference",
        "shape": [3, 4],
    }


def test_info_names_the_reason():
    environment = os.environ | {"CAMKERNELS_CPU_ISA": "mmx"}
    command = [sys.executable, "-m", "camkernels", "info"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "CAMKERNELS_CPU_ISA=mmx is not one of" in done.stdout


def test_the_best_built_library_is_loaded():
    if os.environ.get("CAMKERNELS_CPU_ISA"):
        pytest.skip("CAMKERNELS_CPU_ISA forces one")
    built = [isa for isa in _ops.usable_isas() if (_ops.FOLDER / f"_cpu_{isa}.so").exists()]
    assert _ops.cpu_isa == (built[0] if built else None)
    assert camkernels.__version__
