# SPDX-License-Identifier: MIT
"""Modulate's Triton kernels: executed on the CPU by Triton's interpreter, in a process of its own, which
TRITON_INTERPRET asks for; and compiled for sm_80 and sm_90 without a GPU."""

import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import pytest
import torch

from camkernels import _machine_code
from camkernels._modulation import ACTIVATIONS

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
compiles = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="the interpreter, which TRITON_INTERPRET chooses, does not compile"
)


def test_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("CAMKERNELS_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "triton_interpreted_modulate.py"]
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def compiled(kernel, activation, dtype, arch, width, norm):
    """The machine code of a kernel, for frequencies per column where the activation has some; h in a dtype, arithmetic
    in float64 for fp64, else float32."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from camkernels.triton import modulate

    function = getattr(modulate, f"{kernel}_kernel")
    settings = modulate.Settings(ACTIVATIONS.index(activation), 3.0, norm, 1e-5, False)
    constants = modulate.constants(settings, width, (False, False), (False, True))
    options = modulate.options(constants["BLOCK"], torch.float64 if dtype == "fp64" else torch.float32)
    if activation != "residual_sine":
        constants["frequencies_ptr"] = None
    names = function.arg_names
    number = "*fp64" if dtype == "fp64" else "*fp32"
    types = dict.fromkeys(("gamma_ptr", "beta_ptr", "frequencies_ptr", "of_gamma_ptr", "of_beta_ptr"), number)
    types |= dict.fromkeys(("h_ptr", "y_ptr", "g_ptr", "gh_ptr"), f"*{dtype}")
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types},
    )
    code = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        (found,) = _machine_code.read(Path(file.name))
    return found


@compiles
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "activation", "dtype"),
    [*product(("value", "gradients"), ("relu", "gelu", "softplus"), ("fp32", "bf16", "fp64")),
     *product(("value", "gradients"), ("sine", "residual_sine"), ("fp32", "fp64"))],
)  # fmt: skip
def test_nothing_spills(kernel, activation, dtype, arch):
    """But that a sine has a stack, on which it reduces a large argument: 28 bytes in float32; in float64, where a
    quadrant comes with them, 48. The kernel of the value alone has as much."""
    for width, norm in ((64, True), (4096, True)):
        found = compiled(kernel, activation, dtype, arch, width, norm)
        if "sine" in activation:
            assert found.stack <= (48 if dtype == "fp64" else 32)
        else:
            assert found.stack == found.local == 0
