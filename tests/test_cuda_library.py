# SPDX-License-Identifier: MIT
"""The CUDA library beside any PyTorch, with or without a GPU: it loads, it holds the code it should, and what it cannot
compute it refuses in a sentence. Calls that could crash are made in a process of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from camkernels import _gpu, _machine_code, _ops

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = _ops.FOLDER / "_cuda.so"
OPERATORS = [f"hash_grid{end}" for end in ("", "_backward", "_backward_backward", "_jacobian", "_jacobian_backward")]
OPERATORS += [
    f"{op}{end}"
    for op in ("modulated_mlp", "modulate", "coordinate_modulation", "radial_basis")
    for end in ("", "_backward", "_backward_backward")
]
OPERATORS += ["nearest", "sparse_row_adam"]
OWN_ARCHITECTURES = {"sm_80", "sm_90", "compute_90"}

needs_library = pytest.mark.skipif(
    not LIBRARY.exists(),
    reason="_cuda.so was not built: CAMKERNELS_CUDA=1 python setup.py build_ext --inplace, with nvcc",
)


def run(script: str) -> str:
    """Standard output of a script, which must end by itself: no signal, no traceback."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    return done.stdout.strip()


# ---- the library -----------------------------------------------------------------------------------------------------


@needs_library
def test_it_loads_and_every_operator_has_a_cuda_kernel():
    assert _ops.cuda_missing is None
    assert [name for name in OPERATORS if not _ops.has_kernel(name, "cuda")] == []


needs_cuobjdump = pytest.mark.skipif(_machine_code.find_tool() is None, reason=_machine_code.MISSING)


@needs_library
@needs_cuobjdump
def test_it_holds_the_code_that_the_note_of_the_build_lists():
    noted = set(_gpu.codes(_gpu.build_facts(_ops.FOLDER)))
    assert set(_machine_code.architectures(LIBRARY)) == noted
    if "-warn-spills" in _gpu.build_facts(_ops.FOLDER)["libraries"]["_cuda"]["nvcc"]:  # else the user's own list
        assert noted == OWN_ARCHITECTURES


@pytest.fixture(scope="module")
def found():
    """The kernels of the library."""
    return _machine_code.read(LIBRARY)


@needs_library
@needs_cuobjdump
def test_the_machine_code_of_its_kernels(found):
    regular = [k for k in found if ", 0, " not in k.name]
    assert {k.arch for k in regular} == {int(c[3:]) for c in _gpu.codes(_gpu.build_facts(_ops.FOLDER)) if c[:2] == "sm"}
    assert {"table<3, 1>", "table<3, 2>", "table<3, 4>", "value<float, 3, 2>"} <= {k.name for k in regular}
    for kernel in regular:
        if kernel.name in ("table<3, 1>", "table<3, 2>", "table<3, 4>"):
            vectors = kernel.count("REDG", "F32x2") + kernel.count("REDG", "F32x4")
            assert (vectors > 0) == (kernel.arch >= 90), kernel
        if kernel.name in ("value<float, 3, 2>", "value<float, 3, 4>", "lookup<float, 2, 1>", "lookup<float, 3, 1>"):
            assert kernel.count("LDG", "128") >= 4, kernel
        if kernel.name.startswith("lookup_backward<float, 2, "):
            assert (kernel.count("REDG", "F32x4") > 0) == (kernel.arch >= 90), kernel


@needs_library
@needs_cuobjdump
def test_kernels_keep_everything_in_registers(found):
    """But for those that learn the number of axes at run time, whose arrays must be indexed; those with a sine, which
    reduces a large argument by words of 2 / pi, 7 of 4 bytes in float32, 5 of 8 in float64; the fused ones, whose calls
    save registers beside that; and second derivatives of radial_basis in float64, whose pairs a call takes."""
    of_any_axes = [k for k in found if re.match(r"(any_|lookup)\w*<(float|double), 0, ", k.name)]
    with_sine = [k for k in found if re.match(r"(forward|derivatives|modulate_\w+|radial_\w+)<", k.name)]
    apart = [k for k in with_sine if re.match(r"radial_gradients<.*Dual<double>", k.name)]
    fused = [k for k in found if k.name.startswith("fused_")]
    assert len({k.name for k in of_any_axes}) == 35 and len({k.name for k in with_sine}) == 4 + 12 + 3 * 16
    assert len({k.name for k in fused}) == 2 * 3 * 2
    for kernel in (k for k in found if k not in [*of_any_axes, *with_sine, *fused]):
        assert kernel.local == kernel.stack == 0, kernel
    assert len({k.name for k in apart}) == 4
    for kernel in with_sine:
        assert kernel.stack <= (800 if kernel in apart else 40), kernel
    for kernel in fused:
        assert kernel.stack <= 96, kernel
    assert {k.name for k in found} >= {"pack<float>", "pack<unsigned short>", "point_sums"}


@needs_library
@needs_cuobjdump
def test_products_of_float32_are_made_by_tensor_cores(found):
    names = ("forward", "derivatives", "weight_sums")
    products = [k for k in found if k.name in [f"{name}<float>" for name in names]]
    assert len(products) == 2 * len(names)
    for kernel in products:
        assert kernel.count("HMMA") > 0 and kernel.count("LDS", "128") > 0, kernel
    assert all(k.count("DFMA") > 0 for k in found if k.name in [f"{name}<double>" for name in names])
    fused = [k for k in found if k.name.startswith("fused_")]
    assert len(fused) == 2 * 12
    for kernel in fused:
        assert kernel.count("HMMA") > 0 and kernel.count("LDGSTS") > 0 and kernel.count("LDS", "128") > 0, kernel
    for kernel in (k for k in found if k.name == "point_sums"):
        assert kernel.count("HMMA") > 0 and kernel.count("LDGSTS") > 0, kernel


@needs_library
@needs_cuobjdump
def test_squares_of_a_search_are_rounded_before_they_are_added(found):
    """Fused, they would make mirrored centres unequal."""
    searches = [k for k in found if k.name.startswith("nearest_centers<")]
    assert len(searches) == 2 * 2 * 4 * 2  # architectures, dtypes, axes, where lists are kept
    for kernel in searches:
        assert kernel.count("DMUL") > 0 and kernel.count("DADD") > 0 and kernel.count("DFMA") == 0, kernel


@pytest.fixture(scope="module")
def command():
    """The module bench.kernels, where it is."""
    if not (ROOT / "bench" / "kernels.py").exists():
        pytest.skip("the bench folder is not here")
    sys.path.insert(0, str(ROOT))
    from bench import kernels

    return kernels


@needs_library
@needs_cuobjdump
def test_the_command_that_shows_kernels(command, capsys):
    assert command.main(["--name", "<3, ", "--arch", "90"]) == 0
    shown = capsys.readouterr().out
    assert "table<3, 2>: REDG " in shown and "vectors)" in shown and "of them use local memory" in shown
    assert command.main(["--name", "value<float, 3, 2>", "--json"]) == 0
    assert {k["arch"] for k in json.loads(capsys.readouterr().out)} >= {80, 90}


def test_reading_kernels_says_what_is_missing(command, tmp_path, capsys, monkeypatch):
    assert command.main([str(tmp_path / "none.so")]) == 2
    assert "none.so does not exist: CAMKERNELS_CUDA=1" in capsys.readouterr().err
    monkeypatch.setattr(_machine_code, "find_tool", lambda: None)
    assert command.main([__file__]) == 2
    assert "there is no cuobjdump: install the CUDA toolkit or Triton" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="there is no cuobjdump"):
        _machine_code.read(Path(__file__))


@needs_library
def test_it_needs_no_driver_and_no_cuda_library_to_load():
    listed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    needed = [line.rpartition("[")[2].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line]
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if name.startswith(("libcuda", "libcudart", "libtorch_cuda", "libpython"))]


# ---- calls that need a GPU, without one ------------------------------------------------------------------------------

PREPARE = """
    import torch, camkernels
    from torch._C import DispatchKey, DispatchKeySet
    from camkernels import hash_grid as function
    import sys
    module = sys.modules["camkernels.hash_grid"]
    geometry = camkernels.GridGeometry.build(3, 4, 2, 8, finest_resolution=40)
    x, table = torch.rand(5, 3), torch.rand(geometry.n_entries, 2)
    y, j = torch.rand(5, 8), torch.rand(5, 8, 3)
    settings = module._settings(geometry, "linear", 4)
    w, g = torch.rand(2, 3), torch.rand(5, 2)
    h, gamma, beta, groups = torch.rand(4, 2, 3), torch.rand(2, 2, 1), torch.rand(1, 1, 3), (1, 1.0, True, 1e-5, False)
    mlp, all5 = ([1], [1.0], [False], False, False, 1e-5, False, False, False, False), [True] * 5
    u, grids, ct = torch.rand(5, 2), torch.rand(3, 2, 4, 4), torch.rand(5, 3, 2)
    lookup = (False, True, False, False)
    near, f = (torch.rand(4, 3), torch.ones(4, 1), torch.rand(4, 2)), torch.rand(5, 2)
    rest, basis = (None, torch.zeros(5, 2).int(), None), (1, 0, True, True, 1e-8, 0, False)
    cells = camkernels._neighbor_cells.build(torch.rand(9, 3))
    steps, corrections = torch.zeros(5).int(), torch.ones(4, 2)
    adam = (f, *torch.zeros(2, 5, 2), steps, torch.ones(5, 2), None, corrections)

    def on_cuda(name, *arguments):  # the CUDA kernel itself, past every check of Python
        operator = getattr(torch.ops.camkernels, name).default
        try:
            operator.redispatch(DispatchKeySet(DispatchKey.CUDA), *arguments)
        except Exception as error:
            print(type(error).__name__ + ": " + str(error).splitlines()[0])
        else:
            print("no error")
"""


@needs_library
def test_every_kernel_refuses_cpu_tensors_in_a_sentence():
    told = run(
        PREPARE
        + """
    on_cuda("hash_grid", x, table, None, *settings)
    on_cuda("hash_grid_jacobian", x, table, None, *settings)
    on_cuda("hash_grid_backward", y, x, table, None, *settings, [True, True])
    on_cuda("hash_grid_jacobian_backward", y, j, x, table, None, *settings, [True, True])
    on_cuda("hash_grid_backward_backward", x, table, y, x, table, None, *settings, [True, True, True])
    on_cuda("modulated_mlp", x, [w], [], None, None, *mlp)
    on_cuda("modulated_mlp_backward", g, x, [w], [], None, None, g, *mlp, [True, True, False, False])
    on_cuda("modulated_mlp_backward_backward", x, [], [], None, g, x, [w], [], None, None, g, *mlp, all5)
    on_cuda("modulate", h, gamma, beta, None, *groups)
    on_cuda("modulate_backward", h, h, gamma, beta, None, *groups, [True] * 3)
    on_cuda("modulate_backward_backward", h, None, beta, h, h, gamma, beta, None, *groups, [True] * 4)
    on_cuda("coordinate_modulation", u, grids, *lookup)
    on_cuda("coordinate_modulation_backward", ct, u, grids, *lookup, [True, True])
    on_cuda("coordinate_modulation_backward_backward", u, grids, ct, u, grids, *lookup, [True, True, True])
    on_cuda("radial_basis", x, *near, *rest, *basis)
    on_cuda("radial_basis_backward", f, x, *near, *rest, *basis, [True] * 4 + [False])
    on_cuda("radial_basis_backward_backward", x, *near, None, f, x, *near, *rest, *basis, [True] * 5 + [False])
    on_cuda("nearest", x, *cells, 4)
    on_cuda("sparse_row_adam", *adam, 0.1, 0.9, 0.99, 1e-8)
    """
    ).splitlines()
    assert len(told) == len(OPERATORS)
    for line in told:
        wanted = "camkernels: the CUDA kernels need a PyTorch built with CUDA, and tensors on a GPU"
        assert line == f"RuntimeError: {wanted}"


BAD = {
    "x must be float32 or float64": "x.half(), table, None",
    "x must be float64 beside a float64 table": "x, table.double(), None",
    "table must be float16, bfloat16, float32 or float64": "x, table.int(), None",
    "x and table must have 2 dimensions": "x, table.flatten(), None",
    "the table does not fit the geometry": "x, table[1:], None",
    "hash_grid: level_counts": "x, table, torch.ones(5)",
    "x must be contiguous": "x.t().contiguous().t(), table, None",
}


BAD_MLP = {
    "x must have 2 dimensions": "x.flatten(), [w], [], None, None",
    "x must be contiguous": "x.t().contiguous().t(), [w], [], None, None",
    "weights, biases and settings must be of one length": "x, [w, w], [], None, None",
    "weights[0] must have shape [out, 3]": "x, [w.t().contiguous()], [], None, None",
    "weights must be float16, bfloat16, float32 or float64": "x, [w.int()], [], None, None",
    "dtype or size of biases": "x, [w], [w], None, None",
    "modulation must have shape [groups, hidden, 2] or": "x, [w], [], torch.rand(5, 2, 2), None",
    "modulation of another width": "x, [w], [], torch.rand(5, 1, 2, 3), None",
    "modulation must divide the points into equal groups": "x, [w], [], torch.rand(2, 1, 2), None",
    "x and modulation must be in the dtype of hidden values": "x.half(), [w], [], None, None",
    "frequencies must be in the dtype of hidden values": "x, [w], [], None, torch.ones(2).half()",
}


BAD_GROUPS = {
    "h must have 3 dimensions, the last two not empty": "h[0], gamma, beta, None",
    "gamma must divide the groups of h into equal parts": "h, torch.rand(3, 1, 1), beta, None",
    "beta must broadcast to the groups of h": "h, gamma, torch.rand(1, 1, 2), None",
}
BAD_LOOKUP = {
    "coords must be float32 or float64": "u.half(), grids",
    "coords must be float64 beside float64 grids": "u, grids.double()",
    "grids must be float16, bfloat16, float32 or float64": "u, grids.int()",
    "coords must be contiguous": "u.t().contiguous().t(), grids",
    "coords must have 2 dimensions, of which the second is 1 to 7": "u.flatten(), grids",
    "the grids do not fit the coordinates": "u, grids[0]",
}
BAD_BASIS = {
    "x must have shape [points, d] with d from 1 to 4": "x[0], *near, *rest",
    "x must be float32 or float64": "x.half(), *near, *rest",
    "x must be float64 beside float64 features": "x, *near[:2], near[2].double(), *rest",
    "dtype or shape of centers": "x, near[0][1:], *near[1:], *rest",
    "dtype or shape of shapes": "x, near[0], torch.ones(4, 3), near[2], *rest",
    "features must be float16, bfloat16, float32 or float64": "x, *near[:2], near[2].int(), *rest",
    "dtype or shape of neighbors": "x, *near, None, torch.zeros(4, 2).int(), None",
    "dtype or shape of frequencies": "x, *near, None, None, torch.ones(3)",
    "centers must be contiguous": "x, torch.rand(3, 4).t(), *near[1:], *rest",
}


BAD_SEARCH = {
    "x and centers must have one d": "u, *cells, 4",
    "x and centers must be float32, or float64": "x.double(), *cells, 4",
    "k must be from 1 to the number of centers": "x, *cells, 10",
    "dtype or size of starts": "x, *cells[:2], cells.starts[1:], *cells[3:], 4",
}
BAD_STEP = {
    "step must be int32, one for each row": "*adam[:3], steps[1:], *adam[4:]",
    "size or dtype of the moments": "f, *torch.zeros(2, 4, 2), *adam[3:]",
    "the gradient must have the dtype of the parameter": "*adam[:4], torch.ones(5, 2).half(), None, corrections",
    "rows must be int64": "*adam[:5], torch.arange(5).int(), corrections",
}


@needs_library
@pytest.mark.parametrize(
    ("op", "settings", "bad"),
    [
        ("hash_grid", "settings", BAD),
        ("modulated_mlp", "mlp", BAD_MLP),
        ("modulate", "groups", BAD_GROUPS),
        ("coordinate_modulation", "lookup", BAD_LOOKUP),
        ("radial_basis", "basis", BAD_BASIS),
        ("nearest", "()", BAD_SEARCH),
        ("sparse_row_adam", "(0.1, 0.9, 0.99, 1e-8)", BAD_STEP),
    ],
    ids=["grid", "mlp", "groups", "lookup", "basis", "search", "step"],
)
def test_bad_arguments_of_the_kernels_are_sentences(op, settings, bad):
    calls = "".join(f"    on_cuda('{op}', {arguments}, *{settings})\n" for arguments in bad.values())
    for sentence, line in zip(bad, run(PREPARE + calls).splitlines(), strict=True):
        named = "SparseRowAdam" if op == "sparse_row_adam" else op
        assert line.startswith(f"RuntimeError: {named}: ") and sentence in line, line


def test_cuda_is_not_forced_onto_cpu_tensors():
    told = run("""
    import torch, camkernels
    geometry = camkernels.GridGeometry.build(3, 4, 2, 8, finest_resolution=40)
    for backend in ("cuda", "triton"):
        try:
            camkernels.hash_grid(torch.rand(5, 3), torch.rand(geometry.n_entries, 2), geometry, backend=backend)
        except RuntimeError as error:
            print(error)
    """).splitlines()
    assert len(told) == 2
    for backend, line in zip(("cuda", "triton"), told, strict=True):
        assert line.startswith(f"hash_grid: backend '{backend}' cannot run: ") and "available: " in line
    assert "the tensors are on cpu" in told[0]
