# SPDX-License-Identifier: MIT
"""What surrounds the simulator: operators, AddressSanitizer, line coverage, incremental builds, where CUDA's headers
are found, and the same kernels compiled for real devices."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from camkernels import _machine_code
from sim import build, coverage, library, report, toolkit
from sim.selftests import (
    BINS,
    DIVERGENT_BARRIER,
    MIXED_OPERATIONS,
    OVERRUN,
    dot,
    histogram,
    integers,
    matmul,
    random,
    scatter,
    scatter_other,
)

pytestmark = pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator()))
needs_nvcc = pytest.mark.skipif(toolkit.why_no_nvcc() is not None, reason=str(toolkit.why_no_nvcc()))
needs_cuobjdump = pytest.mark.skipif(_machine_code.find_tool() is None, reason=_machine_code.MISSING)
needs_asan = pytest.mark.skipif(library.why_no_asan() is not None, reason=str(library.why_no_asan()))


@pytest.fixture(scope="module")
def sim() -> library.Library:
    return library.load(build.selftest())


# ---- Operators, architectures, portability, builds -----------------------------------------------------------------


def test_glue_registers_operators_beside_the_real_ones(sim: library.Library) -> None:
    a, b = random(500), random(500, seed=1)
    operator = torch.ops.camkernels_selftest_sim.dot
    torch.testing.assert_close(operator(a, b), (a @ b).view(1))
    with pytest.raises(RuntimeError, match=r"reduction\.cu:\d+: divergent __syncthreads"):
        operator(a, b, DIVERGENT_BARRIER)


def test_launches_from_several_threads_take_turns(sim: library.Library) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: dot(sim), range(16)))
    assert all(got == pytest.approx(expected, abs=1e-3) for got, expected in results)


@pytest.fixture(scope="module")
def portable() -> library.Library:
    """Threads switched by the C library instead of assembly."""
    return library.load(build.Recipe("portable", (build.SELFTEST / "reduction.cu",), portable=True))


def test_vector_reductions_exist_on_sm_90_only(sim: library.Library) -> None:
    found = {}
    for sm in (90, 80):
        with sim.architecture(sm):
            sim.counters()
            scatter(sim, 4)
        counted = sim.counters()
        found[sm] = counted["vector_reductions"], counted["atomics"]
    assert found == {90: (1000, 0), 80: (0, 4000)}


def test_architectures_are_80_and_90(sim: library.Library) -> None:
    with pytest.raises(ValueError, match="80, 86 and 90, not 75"), sim.architecture(75):
        pass
    shared = 200 << 10  # more than sm_80 has
    sim.call("selftest_launch", 1, 64, shared, torch.ones(80))
    with sim.architecture(80), pytest.raises(library.SimulationError, match="sm_80 allows 166912"):
        sim.call("selftest_launch", 1, 64, shared, torch.ones(80))


def test_bytes_are_counted(sim: library.Library) -> None:
    sim.counters()
    keys, values, table = (
        integers(0, BINS, 300),
        random(300, dtype=torch.float64),
        torch.zeros(BINS, dtype=torch.float64),
    )
    sim.call("selftest_scatter_other", keys, values, table, 300, 2)
    counted = sim.counters()
    assert (counted["bytes_loaded"], counted["atomics"], counted["threads"]) == (300 * 8, 300, 384)


def test_portable_switch(portable: library.Library) -> None:
    for schedule in library.SCHEDULES:
        with portable.schedule(schedule):
            got, expected = dot(portable)
            assert got == pytest.approx(expected, abs=1e-3)
            with pytest.raises(library.SimulationError, match="divergent"):
                dot(portable, DIVERGENT_BARRIER)


ASAN_RUN = """
import ctypes, sys
from pathlib import Path
from sim import library
sim = library.Library(Path(sys.argv[1]))
bug, shared_bytes = map(int, sys.argv[2:])
room = [(ctypes.c_float * (64 * 64))() for _ in range(3)]
keys = (ctypes.c_int * 100)(*(i % 37 for i in range(100)))
for schedule in library.SCHEDULES:
    sim.set_schedule(schedule)
    sim.call("selftest_dot", *room, 1000, bug)
    sim.call("selftest_matmul", *room, 64, 32, 32, 0, 0, 0)
    sim.call("selftest_scatter", keys, *room[:2], 100, 4, 0)
    sim.call("selftest_launch", 1, 64, shared_bytes, room[0])
    for fault in range(8, 13):  # threads abandoned in the middle leave their stacks to others
        try:
            sim.call("selftest_fault", fault, room[0])
            raise SystemExit("not found")
        except library.SimulationError:
            pass
print("clean")
"""


@needs_asan
@pytest.mark.parametrize(
    ("bug", "shared_bytes", "finding"),
    [
        (0, 256, ""),
        (OVERRUN, 256, r"(?s)global-buffer-overflow.*reduction\.cu:\d+"),
        (0, 192, r"(?s)heap-buffer-overflow.*faults\.cu:\d+"),
    ],
    ids=["clean", "static shared overrun", "dynamic shared too small"],
)
def test_address_sanitizer(bug: int, shared_bytes: int, finding: str) -> None:
    built = build.build(build.selftest("asan"))
    done = library.run_under_asan(ASAN_RUN, str(built), str(bug), str(shared_bytes))
    assert (done.stdout.strip() == "clean") == (not finding), done.stderr[:3000]
    assert re.search(finding, done.stderr), done.stderr[:3000]


@pytest.mark.skipif(coverage.gcov() is None, reason="line coverage needs gcov beside g++")
def test_line_coverage() -> None:
    kernels = library.load(build.Recipe("coverage", (build.SELFTEST / "reduction.cu",), variant="cov"))
    coverage.reset(kernels)
    dot(kernels)
    (found,) = [file for file in coverage.measure(kernels) if file.path.name == "reduction.cu"]
    source = found.path.read_text().splitlines()
    missed = {source[number - 1].strip() for number in found.uncovered}
    assert {"sum += static_cast<float>(__ballot_sync(~0u, 1));", "if (lane < 20) __syncthreads();"} <= missed
    assert 80 < found.percent < 100 and "reduction.cu" in str(found)
    for bug in (MIXED_OPERATIONS, DIVERGENT_BARRIER):
        with pytest.raises(library.SimulationError):
            dot(kernels, bug)
    assert [file.percent for file in coverage.measure(kernels) if file.path.name == "reduction.cu"] == [100.0]


@pytest.mark.skipif(coverage.gcov() is None, reason="line coverage needs gcov beside g++")
def test_every_function_of_the_wrapper_header_runs() -> None:
    """The lines that stand for PTX, of which the kernels of the package use some."""
    kernels = library.load(build.Recipe("wrappers", tuple(sorted(build.SELFTEST.glob("*.cu"))), variant="cov"))
    coverage.reset(kernels)
    dot(kernels)
    for kind in range(3):
        matmul(kernels, kind)
        scatter_other(kernels, kind)
        histogram(kernels, kind)
    for features in (1, 2, 4, 8):
        scatter(kernels, features)
    (found,) = [file for file in coverage.measure(kernels) if file.path.name == "device.cuh"]
    assert found.percent >= 95, str(found)


def test_builds_are_incremental() -> None:
    recipe = build.selftest()
    before = build.build(recipe).stat().st_mtime_ns
    assert build.build(recipe).stat().st_mtime_ns == before
    atomics = next(path for path in build.made_from(build.build(recipe)) if path.name.startswith("atomics"))
    depends = {path.name for path in build.made_from(atomics)}
    assert {"atomics.cu", "device.cuh", "simulator.h", "warp.h"} <= depends
    assert not build.up_to_date(Path("/nonexistent/file.o"))


def test_compiler_errors_reach_the_reader(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("__global__ void k() { undeclared(); }")
    with pytest.raises(build.BuildError, match=r"(?s)compiling wrong\.cu failed.*undeclared"):
        build.build(build.Recipe("wrong", (wrong,)))


# ---- Real devices: compiled, not run -------------------------------------------------------------------------------


@needs_nvcc
@needs_cuobjdump
def test_kernels_compile_for_devices_without_spills() -> None:
    kernels = report.compile_kernels(sorted(build.SELFTEST.glob("*.cu")))
    assert {k.arch for k in kernels} == {80, 90}
    assert all(k.registers > 0 and k.spills == 0 and k.stack == 0 for k in kernels)
    shared = {k.name: k.shared for k in kernels if k.arch == 80}
    assert shared["histogram<float>"] == 4 * BINS and shared["dot<0>"] == 16
    assert "matmul<__half, 0>" in report.table(kernels)
    four = {k.arch: k for k in kernels if k.name == "scatter<4>"}
    assert four[90].count("REDG", "ADD", "F32x4") == 1 and four[80].count("RED", "ADD", "F32") == 4
    matmuls = [k for k in kernels if k.name.startswith("matmul<__half")]
    assert matmuls and all(k.count("HMMA") and k.count("LDSM") and k.count("LDGSTS") for k in matmuls)


@needs_nvcc
@needs_cuobjdump
def test_spills_are_errors() -> None:
    spilling = [build.SIM / "broken" / "spill.cu"]
    with pytest.raises(report.SpillError, match=r"spill on sm_90: \d+ bytes stored"):
        report.compile_kernels(spilling)
    assert all(k.spills > 0 for k in report.compile_kernels(spilling, may_spill=lambda name: name.startswith("spill")))


CUDA_LIBRARY = """
import sys, torch
torch.ops.load_library(sys.argv[1])
assert torch._C._dispatch_has_kernel_for_dispatch_key("camkernels_selftest::dot", "CUDA")
assert not torch._C._dispatch_has_kernel_for_dispatch_key("camkernels_selftest::dot", "CPU")
torch.ops.load_library(sys.argv[2])
a = torch.ones(100)
assert torch.ops.camkernels_selftest_sim.dot(a, a).item() == 100
print("both loaded")
"""


@needs_nvcc
def test_same_glue_and_kernels_as_a_cuda_library(tmp_path: Path) -> None:
    """Built for devices, the operators register under CUDA, also in a PyTorch without it, beside the simulated ones."""
    found = toolkit.toolkit()
    assert found is not None and found.nvcc is not None
    runtime = next((path for path in found.includes[0].parent.rglob("libcudart_static.a")), None)
    if runtime is None:
        pytest.skip("linking needs libcudart_static.a of the CUDA toolkit")
    root = Path(torch.__file__).parent
    kernels, glue, built = tmp_path / "kernels.o", tmp_path / "glue.o", tmp_path / "libcuda_selftest.so"
    include = [f"-I{build.CSRC}", f"-I{build.SIM}"]
    nvcc = [found.nvcc, "-c", "-std=c++20", "-arch=sm_80", "-Xcompiler", "-fPIC", *include]
    build.run([*nvcc, build.SELFTEST / "reduction.cu", "-o", kernels], "nvcc")
    folders = (*found.includes, root / "include", root / "include" / "torch" / "csrc" / "api" / "include")
    headers = [f"-isystem{path}" for path in folders]
    gxx = [str(toolkit.compiler()), "-std=c++20", "-fPIC"]
    build.run([*gxx, "-c", build.TORCH_TARGET, *headers, build.SELFTEST / "glue.cpp", "-o", glue], "glue")
    libraries = [runtime, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl", "-lrt", "-lpthread"]
    build.run([*gxx, "-shared", glue, kernels, *libraries, "-o", built], "linking")
    command = [sys.executable, "-c", CUDA_LIBRARY, str(built), str(build.build(build.selftest()))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "both loaded", done.stderr


# ---- Where CUDA's headers are found --------------------------------------------------------------------------------


def link_headers(real: toolkit.Toolkit, include: Path, crt: Path | None = None) -> Path:
    """A folder of links to the real headers; `crt` in a place of its own if given."""
    include.mkdir(parents=True)
    (crt or include).mkdir(parents=True, exist_ok=True)
    for entry in real.includes[0].iterdir():
        (((crt or include) if entry.name == "crt" else include) / entry.name).symlink_to(entry)
    return include


def test_headers_are_found_in_every_usual_layout(tmp_path: Path) -> None:
    real = toolkit.toolkit()
    assert real is not None
    nothing = {"PATH": "", "CAMKERNELS_USUAL_CUDA": str(tmp_path / "none")}
    assert toolkit.find(nothing, tmp_path / "empty") is None

    home = link_headers(real, tmp_path / "home" / "include").parent
    found = toolkit.find({**nothing, "CUDA_HOME": str(home)}, tmp_path / "empty")
    assert found == toolkit.Toolkit((home / "include",), None, "CUDA_HOME")

    wrapper = tmp_path / "bin" / "nvcc"  # what is on PATH may be a script: only nvcc itself knows its folder
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={home}' >&2\n")
    wrapper.chmod(0o755)
    found = toolkit.find({**nothing, "PATH": str(wrapper.parent)}, tmp_path / "empty")
    assert found == toolkit.Toolkit((home / "include",), wrapper, "nvcc on PATH")

    one = link_headers(real, tmp_path / "one" / "nvidia" / "cu13" / "include")
    found = toolkit.find(nothing, tmp_path / "one")
    assert found is not None and found.includes == (one,) and "pip wheels" in found.origin

    triton = link_headers(real, tmp_path / "triton_only" / "triton" / "backends" / "nvidia" / "include")
    found = toolkit.find(nothing, tmp_path / "triton_only")
    assert found is not None and found.includes == (triton,) and found.nvcc is None


def test_split_pip_wheels_compile(tmp_path: Path) -> None:
    """CUDA 12 spreads the headers over several wheels; a kernel must compile with them."""
    real = toolkit.toolkit()
    assert real is not None
    wheels = tmp_path / "nvidia"
    link_headers(real, wheels / "cuda_runtime" / "include", crt=wheels / "cuda_nvcc" / "include")
    nothing = {"PATH": "", "CAMKERNELS_USUAL_CUDA": str(tmp_path / "none")}
    found = toolkit.find(nothing, tmp_path)
    assert found is not None and len(found.includes) == 2
    headers = [f"-isystem{path}" for path in found.includes]
    command = [str(toolkit.compiler()), *build.COMMON, *build.KERNEL, "-fsyntax-only", *headers, f"-I{build.CSRC}"]
    command += [f"-I{build.SIM}", "-include", build.SIM / "simulator.h", build.SELFTEST / "cooperation.cu"]
    build.run(command, "headers of split wheels")


def test_absence_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "toolkit", lambda: None)
    assert "set CUDA_HOME" in str(toolkit.why_no_simulator())
    assert "no GPU is needed" in str(toolkit.why_no_nvcc())
    with pytest.raises(build.BuildError, match="set CUDA_HOME"):
        build.build(build.selftest())
    monkeypatch.setattr(toolkit, "compiler", lambda: None)
    assert "needs g++" in str(toolkit.why_no_simulator())
