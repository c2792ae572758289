# SPDX-License-Identifier: MIT
"""Builds simulated CUDA libraries: the .cu files of csrc/cuda compiled for the host, with or without the operator glue.

A `Recipe` says what; `build(recipe)` gives the path of the shared library and compiles only what changed. Objects live
in build/sim (CAMKERNELS_SIM_BUILD overrides) beside a record of the content hashes of everything they were made from.

    python -m sim.build [plain|asan|cov|checked]     builds the production kernels (run in tests/)
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from . import toolkit

SIM = Path(__file__).resolve().parent
ROOT = SIM.parent.parent
CSRC = ROOT / "csrc"
SELFTEST = SIM / "selftest"
SIMULATOR = tuple(SIM / name for name in ("fibre.cpp", "scheduler.cpp", "memory.cpp", "faults.cpp", "runtime.cpp"))

TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # PyTorch 2.11, as in setup.py
COMMON = ("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off")
# nvcc knows no strict aliasing; unknown pragmas and attributes are its own; the assembler remarks that noinit is empty.
KERNEL = ("-x", "c++", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wa,--no-warn")
KERNEL += ("-Wno-class-memaccess", "-Wno-unused-function", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
# Undefined behaviour of kernels becomes a sentence: faults.cpp has the handlers, the sanitizer's library is not linked.
UNDEFINED = "-fsanitize=alignment,null,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow"
ADDRESS = "-fsanitize=address"
VARIANTS = {
    # -O2 takes twice as long to compile with all those checks.
    "plain": ("-O1", UNDEFINED),
    "asan": ("-O1", ADDRESS, "-fno-omit-frame-pointer"),
    "cov": ("-O0", "--coverage"),
    # Both of them for many kernels: -Og compiles in a third of the time, and what lies on a thread's stack is left to
    # the array bounds of the plain variant.
    "checked": ("-Og", ADDRESS, "-fno-omit-frame-pointer", "--param=asan-stack=0", "--coverage"),
}


class BuildError(RuntimeError):
    """A compiler refused; the message holds the command and what it said."""


@dataclass(frozen=True)
class Recipe:
    """One simulated library.

    sources: .cu files. glue: stable-ABI .cpp files that register operators (they see CAMK_NAMESPACE = `namespace` and
    CAMK_DISPATCH_KEY = CPU). variant: "plain", "cov" (see coverage.py), "asan", or "checked", which is both; these two
    serve `run_under_asan` only. portable: the ucontext switch instead of assembly.
    """

    name: str
    sources: tuple[Path, ...]
    glue: tuple[Path, ...] = ()
    variant: str = "plain"
    namespace: str = "camkernels_sim"
    defines: tuple[str, ...] = ()
    portable: bool = False


def production(variant: str = "plain", namespace: str = "camkernels_sim") -> Recipe:
    """The kernels and the glue of csrc/cuda, exactly the files a CUDA build takes."""
    sources, glue = (tuple(sorted((CSRC / "cuda").glob(f"*.{suffix}"))) for suffix in ("cu", "cpp"))
    return Recipe("camkernels", sources, glue, variant, namespace)


def selftest(variant: str = "plain") -> Recipe:
    """The simulator's own kernels behind a C interface; in the plain variant also as operators."""
    sources = (*sorted(SELFTEST.glob("*.cu")), SIM / "broken" / "faults.cu")
    glue = (SELFTEST / "glue.cpp",) if variant == "plain" else ()
    return Recipe("selftest", sources, glue, variant, "camkernels_selftest_sim")


@lru_cache(maxsize=1)
def folder() -> Path:
    """Where objects are kept: build/sim of the checkout, or a temporary folder if that cannot be written."""
    wanted = Path(os.environ.get("CAMKERNELS_SIM_BUILD", ROOT / "build" / "sim"))
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        (wanted / ".gitignore").write_text("*\n")
    except OSError:
        wanted = Path(tempfile.mkdtemp(prefix="camkernels-sim-"))
    return wanted


@contextmanager
def locked() -> Iterator[None]:
    """One process at a time builds; others wait and then find the work done."""
    with open(folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def dependencies(makefile: Path) -> list[str]:
    text = makefile.read_text().replace("\\\n", " ").split(":", 1)[1]
    return [word.replace("\\ ", " ") for word in re.findall(r"(?:\\ |\S)+", text)]


def up_to_date(output: Path) -> bool:
    """Whether everything `output` was made from still has the content it had."""
    record = output.with_suffix(output.suffix + ".json")
    if not (output.is_file() and record.is_file()):
        return False
    return all(_digest(Path(name)) == digest for name, digest in json.loads(record.read_text()).items())


def record(output: Path, dependencies: Sequence[str | Path]) -> None:
    known = {str(Path(name).resolve()): _digest(Path(name)) for name in dependencies}
    output.with_suffix(output.suffix + ".json").write_text(json.dumps(known, indent=1))


def run(command: Sequence[str | Path], what: str) -> str:
    """Runs a compiler; gives its output or raises BuildError."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[:6000]
        raise BuildError(f"{what} failed ({done.returncode}):\n{' '.join(map(str, command))}\n{said}")
    return done.stdout + done.stderr


def compile_object(command: Sequence[str | Path], source: Path) -> Path:
    """`command` completed by source and output, unless the object of the same command and contents exists."""
    key = hashlib.sha256("\0".join(map(str, (*command, source))).encode()).hexdigest()[:12]
    output = folder() / "objects" / f"{source.stem}-{key}.o"
    if not up_to_date(output):
        makefile = output.with_suffix(".d")
        run((*command, "-MMD", "-MF", makefile, "-c", source, "-o", output), f"compiling {source.name}")
        record(output, dependencies(makefile))
    return output


def _commands(recipe: Recipe) -> list[tuple[tuple[str | Path, ...], Path]]:
    """(compiler command, source) of every object of the library."""
    found = toolkit.toolkit()
    if (reason := toolkit.why_no_simulator()) or found is None:
        raise BuildError(str(reason))
    headers = [f"-isystem{path}" for path in found.includes]
    defines = [f"-D{name}" for name in recipe.defines] + ["-DCAMK_SIMULATE"]
    if recipe.portable:
        defines.append("-DCAMK_SIM_UCONTEXT")
    base = (str(toolkit.compiler()), *COMMON, *defines, *headers, f"-I{CSRC}", f"-I{SIM}")
    variant = VARIANTS[recipe.variant]
    # Only kernels are counted and checked for undefined behaviour; the simulator itself is always optimised.
    own = [flag for flag in variant if flag == ADDRESS]
    jobs = [((*base, "-O2", "-Wall", *own), source) for source in SIMULATOR]
    for source in recipe.sources:
        tree = f"-I{source.parent.parent}"  # before csrc: a changed copy of it includes its own files
        jobs.append(((base[0], tree, *base[1:], *KERNEL, *variant, "-include", SIM / "simulator.h"), source))
    if recipe.glue:
        torch = _torch_folder() / "include"
        macros = (TORCH_TARGET, f"-DCAMK_NAMESPACE={recipe.namespace}", "-DCAMK_DISPATCH_KEY=CPU")
        system = (f"-isystem{torch}", f"-isystem{torch / 'torch' / 'csrc' / 'api' / 'include'}")
        jobs += [((*base, "-O1", "-Wall", *own, *macros, *system), source) for source in recipe.glue]
    return jobs


def _torch_folder() -> Path:
    import torch

    return Path(torch.__file__).parent


def build(recipe: Recipe) -> Path:
    """The shared library of `recipe`, compiled as far as needed. Raises BuildError."""
    key = hashlib.sha256(repr(recipe).encode()).hexdigest()[:8]
    library = folder() / f"{recipe.name}-{recipe.variant}-{key}.so"
    (folder() / "objects").mkdir(exist_ok=True)
    with locked():
        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(max_workers=workers) as pool:
            objects = list(pool.map(lambda job: compile_object(*job), _commands(recipe)))
        if not up_to_date(library) or set(made_from(library)) != set(objects):
            _link(recipe, objects, library)
    return library


def made_from(output: Path) -> list[Path]:
    """The files `output` was made from, as recorded."""
    return [Path(name) for name in json.loads(Path(f"{output}.json").read_text())]


def _link(recipe: Recipe, objects: list[Path], library: Path) -> None:
    flags = ["-shared", "-Wl,-Bsymbolic", f"-Wl,-T,{SIM / 'shared.ld'}"]
    libraries: list[str] = []
    variant = VARIANTS[recipe.variant]
    if ADDRESS in variant:
        flags.append(ADDRESS)
    else:
        flags.append("-Wl,--no-undefined")  # under AddressSanitizer the preloaded run time defines the rest
    if "--coverage" in variant:
        flags += ["--coverage", "-Wl,-u,__gcov_dump", "-Wl,-u,__gcov_reset"]
    if recipe.glue:
        torch = _torch_folder() / "lib"
        libraries = [f"-L{torch}", f"-Wl,-rpath,{torch}", "-ltorch_cpu", "-lc10"]
    fresh = library.with_suffix(".new")  # a library in use keeps its file
    run((str(toolkit.compiler()), *flags, *objects, *libraries, "-o", fresh), f"linking {library.name}")
    fresh.replace(library)
    record(library, objects)


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the kernels of csrc/cuda for the CPU simulator.")
    parser.add_argument("variant", nargs="?", default="plain", choices=sorted(VARIANTS))
    print(build(production(parser.parse_args().variant)))


if __name__ == "__main__":
    main()
