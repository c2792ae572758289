# SPDX-License-Identifier: MIT
"""What is built and shipped: libraries, wheels, the source archive; and one sentence where something is missing.

How setup.py behaves is tested on a miniature project of a few C++ lines, what is shipped on a copy of the real sources.
The copy takes the compiled objects along, so that the libraries of a tree that was just built are only linked again.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CPU_LIBRARIES = {"_cpu_baseline.so", "_cpu_avx2.so", "_cpu_avx512.so"}
BUILD_VARIABLES = ("CAMKERNELS_", "CUDA_HOME", "CXX", "LDFLAGS", "TORCH_CUDA_ARCH_LIST", "DEBUG", "PYTHONPATH")
SETUP_WITHOUT_TORCH = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
BUILD_WHEEL = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the libraries are built on Linux only")
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the AVX libraries exist on x86-64 only")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def python(tree: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter in `tree`; of the build's own variables only those given here are set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(BUILD_VARIABLES)}
    environment = kept | {"CAMKERNELS_CUDA": "0"} | variables
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)


def build(tree: Path, **variables: str) -> list[str]:
    """Builds in place; returns what had to be made."""
    done = python(tree, "setup.py", "-q", "build_ext", "--inplace", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(line.rpartition("/")[2] for line in done.stdout.splitlines() if " -> " in line)


def printed(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def built(tree: Path) -> set[str]:
    return {path.name for path in (tree / "python" / "camkernels").glob("*.so")}


def facts(tree: Path) -> dict:
    return json.loads((tree / "python" / "camkernels" / "build.json").read_text())


def wheel(tree: Path, out: Path, **variables: str) -> zipfile.ZipFile:
    done = python(tree, "-c", BUILD_WHEEL, str(out), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = out.glob("*.whl")
    return zipfile.ZipFile(made)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert len(lines) == 1 and lines[0].startswith("camkernels: "), done.stderr
    for fragment in fragments:
        assert fragment in lines[0]


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """The real setup.py and pyproject.toml around a package and libraries of a few lines."""
    files = {
        "README.md": "A miniature.\n",
        "csrc/cpu/a.cpp": '#include "math/one.h"\nint a() { return one(); }\n',
        "csrc/cpu/b.cpp": "int b() { return 2; }\n",
        "csrc/math/one.h": "inline int one() { return 1; }\n",
        "python/camkernels/__init__.py": "",
        "python/camkernels/py.typed": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "python/camkernels/_version.py"):
        shutil.copy2(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """A copy of the repository with the compiled objects, without what else was built."""
    wanted = ["setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"]
    wanted += ["csrc", "python", "tests", "bench", *(f"build/{path.name}" for path in (ROOT / "build").glob("temp.*"))]
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "build.json", "*.egg-info")
    for name in wanted:
        source, target = ROOT / name, tmp_path / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=unwanted)
        elif source.exists():
            shutil.copy2(source, target)
    return tmp_path


# ---- building in place -----------------------------------------------------------------------------------------------


@needs_x86
def test_one_library_per_instruction_set(mini: Path) -> None:
    build(mini)
    assert built(mini) == CPU_LIBRARIES
    flags = {name: entry["c++"].split() for name, entry in facts(mini)["libraries"].items()}
    assert "-mavx2" in flags["_cpu_avx2"] and "-mavx512f" in flags["_cpu_avx512"]
    assert not any(flag.startswith("-m") for flag in flags["_cpu_baseline"])
    optimised = {name: [flag for flag in entry if flag.startswith("-O")][-1] for name, entry in flags.items()}
    assert optimised == {"_cpu_baseline": "-O1", "_cpu_avx2": "-O3", "_cpu_avx512": "-O3"}
    assert not any("native" in flag or "fast-math" in flag for entry in flags.values() for flag in entry)
    assert facts(mini)["torch"] == torch.__version__ and facts(mini)["cuda"] is None


def test_flags_of_single_sources_are_recorded(mini: Path) -> None:
    (mini / "csrc/cpu/hash_grid_loops.cpp").write_text("int c() { return 3; }\n")
    build(mini, CAMKERNELS_ISAS="baseline")
    recorded = facts(mini)["libraries"]["_cpu_baseline"]
    assert set(recorded) == {"c++", "hash_grid_loops.cpp"}
    (command,) = (mini / "build").glob("temp.*/_cpu_baseline/hash_grid_loops.cpp.o.cmd")
    used = command.read_text()
    assert recorded["hash_grid_loops.cpp"] in used and "-fno-unswitch-loops" in recorded["hash_grid_loops.cpp"]
    assert recorded["hash_grid_loops.cpp"] not in (command.parent / "a.cpp.o.cmd").read_text()


def test_only_what_changed_is_rebuilt(mini: Path) -> None:
    only = {"CAMKERNELS_ISAS": "baseline"}
    assert build(mini, **only) == ["_cpu_baseline.so", "a.cpp.o", "b.cpp.o"]
    assert build(mini, **only) == []
    (mini / "csrc/math/one.h").write_text("inline int one() { return 3; }\n")
    assert build(mini, **only) == ["_cpu_baseline.so", "a.cpp.o"]
    (mini / "csrc/math/one.h").unlink()
    (mini / "csrc/cpu/a.cpp").write_text("int a() { return 4; }\n")
    assert build(mini, **only) == ["_cpu_baseline.so", "a.cpp.o"]
    assert build(mini, **only, CXXFLAGS="-O1") == ["_cpu_baseline.so", "a.cpp.o", "b.cpp.o"]
    (mini / "csrc/cpu/b.cpp").unlink()
    assert build(mini, **only, CXXFLAGS="-O1") == ["_cpu_baseline.so"]
    assert build(mini, **only, DEBUG="1") == ["_cpu_baseline.so", "a.cpp.o"]
    assert "-O0 -g" in facts(mini)["libraries"]["_cpu_baseline"]["c++"]


@needs_x86
def test_libraries_of_an_earlier_build_do_not_stay(mini: Path) -> None:
    build(mini, CAMKERNELS_ISAS="baseline,avx2")
    assert built(mini) == {"_cpu_baseline.so", "_cpu_avx2.so"}
    build(mini, CAMKERNELS_ISAS="baseline")
    assert built(mini) == {"_cpu_baseline.so"}


def test_a_compiler_error_shows_the_error_and_the_command(mini: Path) -> None:
    (mini / "csrc/cpu/a.cpp").write_text("int a() { return missing; }\n")
    done = python(mini, "setup.py", "build_ext", "--inplace", CAMKERNELS_ISAS="baseline")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "missing" in done.stdout and "-c csrc/cpu/a.cpp" in done.stderr


def test_what_an_interrupted_compiler_left_is_made_anew(mini: Path) -> None:
    compiler = mini / "compiler"  # ends in the middle of its output while there is a file `interrupt`
    compiler.write_text(
        '#!/bin/sh\nwhile [ -e interrupt ] && [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2" && exit 1; shift; done\n'
        'exec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    only = {"CAMKERNELS_ISAS": "baseline", "CXX": str(compiler)}
    build(mini, **only)
    (mini / "csrc/cpu/a.cpp").write_text('#include "math/one.h"\nint a() { return one() + 1; }\n')
    (mini / "interrupt").touch()
    assert python(mini, "setup.py", "-q", "build_ext", "--inplace", **only).returncode == 1
    (mini / "interrupt").unlink()
    assert build(mini, **only) == ["_cpu_baseline.so", "a.cpp.o"]


@needs_nvcc
def test_cuda_library_is_built_without_gpu_and_without_cuda_torch(mini: Path) -> None:
    (mini / "csrc/cuda").mkdir()
    (mini / "csrc/cuda/k.cu").write_text("__global__ void k() {}\nvoid run() { k<<<1, 1>>>(); }\n")
    (mini / "csrc/cuda/k.cpp").write_text("#include <cuda_runtime_api.h>\nvoid run();\nvoid go() { run(); }\n")
    only = {"CAMKERNELS_ISAS": "baseline", "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    build(mini, **only)
    assert built(mini) == {"_cpu_baseline.so"}
    made = build(mini, **only, CAMKERNELS_CUDA="1")
    assert made == ["_cuda.so", "k.cpp.o", "k.cu.o"]
    assert build(mini, **only, CAMKERNELS_CUDA="1") == []
    options = facts(mini)["libraries"]["_cuda"]["nvcc"]
    assert [o.rpartition("code=")[2] for o in options.split() if "gencode" in o] == ["sm_80", "sm_90", "compute_90"]
    torch.ops.load_library(str(mini / "python/camkernels/_cuda.so"))
    if torch.version.cuda is None:
        build(mini, **only, CAMKERNELS_CUDA="auto")
        assert built(mini) == {"_cpu_baseline.so"}
    done = python(mini, "setup.py", "-q", "build_ext", CAMKERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST="Hopper")
    assert_one_sentence(done, "'Hopper'", "9.0+PTX")


# ---- one sentence where something is missing -------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["dist_info", "build_ext"])
def test_without_torch(mini: Path, command: str) -> None:
    done = python(mini, "-c", SETUP_WITHOUT_TORCH, "-q", command)
    assert_one_sentence(done, "PyTorch", "pip install --no-build-isolation .")


def test_with_an_old_torch(mini: Path) -> None:
    (mini / "torch").mkdir()
    (mini / "torch/__init__.py").write_text("")
    (mini / "torch/version.py").write_text('__version__ = "2.4.1"\ncuda = None\n')
    assert_one_sentence(python(mini, "setup.py", "-q", "build_ext"), "2.4.1", "2.11 or later")


def test_libraries_that_cannot_be_loaded(tmp_path: Path) -> None:
    package = tmp_path / "camkernels"
    shutil.copytree(ROOT / "python/camkernels", package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in CPU_LIBRARIES:
        (package / name).write_text("no library")
    program = "import camkernels as c, torch; print(c._ops.cpu_missing); print(c.HashGrid(2)(torch.rand(5, 2)).shape)"
    done = python(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    reason, shape = done.stdout.splitlines()
    assert "_cpu_baseline.so cannot be loaded: " in reason and shape == "torch.Size([5, 32])"


def test_cuda_demanded_without_nvcc(mini: Path, tmp_path: Path) -> None:
    done = python(mini, "setup.py", "-q", "build_ext", CAMKERNELS_CUDA="1", PATH="", CUDA_HOME=str(tmp_path))
    assert_one_sentence(done, "CAMKERNELS_CUDA=1", "nvcc")


def test_without_compiler(mini: Path) -> None:
    assert_one_sentence(python(mini, "setup.py", "-q", "build_ext", PATH=""), "C++ compiler", "g++")
    assert_one_sentence(python(mini, "setup.py", "-q", "build_ext", CXX="no-such-compiler"), "no-such-compiler")


def test_unknown_choices(mini: Path) -> None:
    assert_one_sentence(python(mini, "setup.py", "-q", "build_ext", CAMKERNELS_CUDA="yes"), "'yes'")
    assert_one_sentence(python(mini, "setup.py", "-q", "build_ext", CAMKERNELS_ISAS="sse9"), "sse9", "baseline")


# ---- what is shipped -------------------------------------------------------------------------------------------------


def test_wheel_leaves_deleted_modules_and_libraries_out(mini: Path) -> None:
    only = {"CAMKERNELS_ISAS": "baseline"}
    (mini / "python/camkernels/gone.py").write_text("")
    assert "camkernels/gone.py" in wheel(mini, mini / "first", **only).namelist()
    (mini / "python/camkernels/gone.py").unlink()
    (mini / "python/camkernels/_cuda.so").write_text("left from a build in place")
    names = wheel(mini, mini / "second", **only).namelist()
    assert "camkernels/gone.py" not in names and "camkernels/_cuda.so" not in names


@needs_x86
@pytest.mark.slow
def test_wheel_serves_every_python(real: Path, tmp_path: Path) -> None:
    archive = wheel(real, tmp_path / "out")
    names = set(archive.namelist())
    assert archive.filename and archive.filename.endswith("-py3-none-linux_x86_64.whl")
    assert {f"camkernels/{name}" for name in CPU_LIBRARIES | {"py.typed", "build.json", "_version.py"}} <= names
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h", ".cuh", ".o", ".pyc", ".cmd"))]
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"camkernels"}
    told = json.loads(archive.read("camkernels/build.json"))
    assert {f"{name}.so" for name in told["libraries"]} == CPU_LIBRARIES
    archive.extractall(tmp_path / "site")
    for name in CPU_LIBRARIES:
        library = str(tmp_path / "site" / "camkernels" / name)
        assert printed("nm", "-D", "--defined-only", library) == "", "every symbol is meant to be hidden"
        undefined = [line.split()[-1] for line in printed("nm", "-D", "--undefined-only", library).splitlines()]
        assert undefined and not [symbol for symbol in undefined if symbol.startswith(("Py", "_Py"))]
        needed = printed("readelf", "-d", library)
        assert "[libtorch_cpu.so]" in needed
        assert not [other for other in ("libpython", "libtorch_python", "libtorch_cuda") if other in needed]
    program = "import camkernels as c, torch; c.HashGrid(2, backend='cpu')(torch.rand(5, 2)).sum().backward(); print(c)"
    done = python(tmp_path / "out", "-c", program, PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 0 and str(tmp_path / "site") in done.stdout, done.stderr


def test_pure_wheel_imports(real: Path, tmp_path: Path) -> None:
    archive = wheel(real, tmp_path / "out", CAMKERNELS_NO_EXT="1")
    assert archive.filename and archive.filename.endswith("-py3-none-any.whl")
    assert not [name for name in archive.namelist() if name.endswith(".so")]
    assert json.loads(archive.read("camkernels/build.json"))["libraries"] == {}
    site = tmp_path / "site"
    archive.extractall(site)
    done = python(tmp_path / "out", "-c", "import camkernels; print(camkernels.__file__)", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == site / "camkernels"


def test_source_archive(real: Path, tmp_path: Path) -> None:
    for left in ("csrc/cpu/x.o", "python/camkernels/_cpu_baseline.so", "python/camkernels/build.json"):
        (real / left).write_text("built")
    done = python(real, "-c", SETUP_WITHOUT_TORCH, "-q", "sdist", "-d", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "out").glob("camkernels-*.tar.gz")
    with tarfile.open(found) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    made = (".so", ".o", ".pyc", "build.json")
    assert not [name for name in names if name.endswith(made) or name.startswith("build/")]
    wanted = [path for top in ("csrc", "tests", "python") for path in (real / top).rglob("*")]
    wanted = [path for path in wanted if path.suffix in (".h", ".cuh", ".cpp", ".cu", ".py", ".typed")]
    assert {str(path.relative_to(real)) for path in wanted} <= names
    assert {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE"} <= names
