# SPDX-License-Identifier: MIT
"""The Triton kernels, executed on the CPU by Triton's interpreter, and what the backend says where it cannot run.

The interpreter is chosen by TRITON_INTERPRET when kernels are decorated, so its tests (triton_interpreted*.py) run in
processes of their own: two share the registered cases, the others have one op each.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import camkernels
from camkernels import _backends, triton

HERE = Path(__file__).parent
PROCESSES = {
    "half": ("triton_interpreted.py", "-k", "half0"),
    "other half": ("triton_interpreted.py", "-k", "not half0"),
    "lookup": ("triton_interpreted_lookup.py",),
    "mlp": ("triton_interpreted_mlp.py",),
    "radial basis": ("triton_interpreted_radial.py",),
}
needs_triton = pytest.mark.skipif(triton.MISSING is not None, reason=str(triton.MISSING))


@pytest.fixture(scope="module")
def processes():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("CAMKERNELS_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = {
        name: subprocess.Popen([*command, str(HERE / file), *rest], env=environment, cwd=HERE.parent, **pipes)
        for name, (file, *rest) in PROCESSES.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@needs_triton
@pytest.mark.parametrize("name", PROCESSES)
def test_in_the_interpreter(processes, name):
    output, _ = processes[name].communicate(timeout=580)
    assert processes[name].returncode == 0, output[-6000:]
    assert " passed" in output and "skipped" not in output, output[-2000:]


# ---- reasons ---------------------------------------------------------------------------------------------------------


@needs_triton
def test_tensors_on_the_cpu_are_a_reason():
    reason = _backends.can_run("triton", _backends.Call("hash_grid", "cpu"))
    assert reason == "the tensors are on cpu, backend 'triton' computes on cuda"
    geometry = camkernels.GridGeometry.build(2, 2, 2, 8)
    with pytest.raises(RuntimeError, match=r"hash_grid: backend 'triton' cannot run: the tensors are on cpu.*avail"):
        camkernels.hash_grid(torch.rand(3, 2), torch.rand(geometry.n_entries, 2), geometry, backend="triton")


def test_a_missing_triton_is_a_reason():
    program = (
        "import sys; sys.modules['triton'] = None; import importlib.util as u; u.find_spec = lambda name: None;"
        "from camkernels import _backends; print(_backends.can_run('triton', _backends.Call('hash_grid', 'cuda')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'Triton is not installed; install it with pip install "camkernels[triton]"'


def test_an_op_without_kernels_is_a_reason():
    reason = _backends.can_run("triton", _backends.Call("no_such_op", "cuda"))
    assert reason == "no_such_op has no Triton kernels yet"


@needs_triton
def test_cuda_tensors_are_taken_and_preferred_to_the_reference(monkeypatch):
    call = _backends.Call("hash_grid", "cuda")
    assert _backends.can_run("triton", call) is None
    real = _backends.can_run
    monkeypatch.setattr(_backends, "can_run", lambda b, c: "not built" if b == "cuda" else real(b, c))
    assert _backends.choose(call, None) == "triton"


def test_importing_the_package_does_not_import_the_kernels():
    program = "import sys, camkernels; sys.exit('camkernels.triton.hash_grid' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
