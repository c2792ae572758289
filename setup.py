# SPDX-License-Identifier: MIT
"""Builds the compiled part of camkernels; the metadata is in pyproject.toml.

    pip install --no-build-isolation .        install (isolation would hide the installed PyTorch)
    python setup.py build_ext --inplace       develop: libraries into python/camkernels, only what changed is rebuilt

Environment
    CAMKERNELS_CUDA=auto|1|0   auto: CUDA kernels if nvcc is found and PyTorch is a CUDA build; 1: nvcc alone decides,
                               so that they can be built beside a CPU PyTorch; 0: never. No GPU is looked for.
    TORCH_CUDA_ARCH_LIST       GPU architectures in PyTorch's syntax ("8.0;9.0+PTX")
    CAMKERNELS_NO_EXT=1        compile nothing: the Triton and reference backends remain
    CAMKERNELS_ISAS=baseline   only these CPU libraries (names joined by commas), for quick builds
    DEBUG=1                    -O0 -g
    MAX_JOBS CXX CXXFLAGS LDFLAGS CUDA_HOME SOURCE_DATE_EPOCH as elsewhere

Decisions
    Plain shared libraries, not Python modules: the stable ABI needs no Python.h, so one wheel (py3-none-<platform>)
        serves every Python and every PyTorch from 2.11 on, and one that cannot load is a reason, not an ImportError.
    One CPU library per instruction set, each from all of csrc/cpu, chosen at run time: -march=native makes wheels that
        crash elsewhere. A linker script hides every symbol, or the loader could give an inline function compiled for
        AVX-512 to code that must run without it.
    .cu files include no PyTorch header and go to nvcc, the .cpp files beside them to the C++ compiler; the CUDA runtime
        is linked statically. So the CUDA library builds beside a CPU PyTorch and runs under a CUDA one.
    torch is looked up, not imported: that takes seconds, and a path and a version are all that is needed.
    Compiler calls are made here: setuptools rebuilds nothing when a header changes and has no flags per library,
        torch.utils.cpp_extension refuses CUDA sources beside a CPU PyTorch, and ninja may not be installed.
    build.json beside the libraries records how they were made; `python -m camkernels info` shows it.
"""

import fcntl
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info
from setuptools.command.sdist import sdist

COMPILED = os.environ.get("CAMKERNELS_NO_EXT") != "1"
DEBUG = os.environ.get("DEBUG") == "1"
OPTIMISE = ["-O0", "-g"] if DEBUG else ["-O3"]
TORCH_TARGET = (2, 11)  # the oldest PyTorch that can load what is built here
CXX_FLAGS = ["-std=c++20", *OPTIMISE, "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-Wall", "-Wextra", "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*TORCH_TARGET)]
CXX_FLAGS += ["--param=ggc-min-heapsize=400000"]  # g++ tidies its memory less often: faster, for some 200 MB a file
# by the name of the source; -O3 copies these loops for what is decided at run time, a sixth of their build for no speed
MORE_FLAGS = {"hash_grid_loops.cpp": ["-fno-unswitch-loops"]}
NVCC_FLAGS = ["-std=c++20", *OPTIMISE, "-Xcompiler=-fPIC,-fvisibility=hidden"]
SPILL_GATE = ["-Xptxas=-warn-spills,-Werror"]
CUDA_ARCHS = "8.0;9.0+PTX"
CUDA_RUNTIME = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
X86 = platform.machine() in ("x86_64", "AMD64")
ISAS = {
    # on x86 for old processors only, where what makes -O1 as fast as -O2 is enough; elsewhere it is all there is
    "baseline": ["-O1", "-ftree-vectorize", "-fstrict-aliasing"] if X86 and not DEBUG else [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
ISAS["avx512"] += ["-Wno-maybe-uninitialized"]  # g++ 12 warns of its own headers


def stop(sentence: str) -> NoReturn:
    sys.exit(f"camkernels: {sentence}")


def sources(folder: str, *endings: str) -> list[str]:
    return sorted(str(path) for ending in endings for path in Path("csrc", folder).glob(f"*{ending}"))


def output_of(*command: str) -> str:
    """What a command prints; nothing if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


class Torch(NamedTuple):
    version: str
    cuda: str | None
    folder: Path


def find_torch() -> Torch:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        stop("this build sees no PyTorch: install torch first, then run `pip install --no-build-isolation .`")
    folder = Path(spec.origin).parent
    facts = runpy.run_path(str(folder / "version.py"))
    version = str(facts["__version__"])
    if tuple(map(int, version.split(".")[:2])) < TORCH_TARGET:
        stop(f"PyTorch {version} is too old: {TORCH_TARGET[0]}.{TORCH_TARGET[1]} or later is needed.")
    return Torch(version, facts["cuda"], folder)


def find_nvcc(torch: Torch) -> str | None:
    """The nvcc to use; None: no CUDA library. CUDA_HOME, when set, is the only place looked at."""
    choice, home = os.environ.get("CAMKERNELS_CUDA", "auto"), os.environ.get("CUDA_HOME")
    if choice not in ("auto", "1", "0"):
        stop(f"CAMKERNELS_CUDA must be auto, 1 or 0, not {choice!r}.")
    if choice == "0" or (choice == "auto" and torch.cuda is None):
        return None
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, places)), None)
    if nvcc is None and choice == "1":
        stop("CAMKERNELS_CUDA=1 needs nvcc, which is neither on PATH nor in CUDA_HOME: install the CUDA toolkit.")
    return nvcc


def find_compiler() -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        stop(f"no C++ compiler, {compiler[0]} is not on PATH: install g++ 11 or later, or set CAMKERNELS_NO_EXT=1.")
    return compiler


def cpu_extensions() -> list[Extension]:
    usable = list(ISAS) if X86 else ["baseline"]
    chosen = [isa for isa in os.environ.get("CAMKERNELS_ISAS", "").split(",") if isa] or usable
    if not set(chosen) <= set(usable):
        stop(f"CAMKERNELS_ISAS={','.join(chosen)}: this machine's compiler knows {', '.join(usable)}.")
    return [Extension(f"camkernels._cpu_{isa}", sources("cpu", ".cpp")) for isa in chosen if sources("cpu", ".cpp")]


def toolkit(nvcc: str, entry: str) -> list[str]:
    """nvcc's own INCLUDES or LIBRARIES options: right for wrapper scripts and for toolkits installed as wheels too."""
    log = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    found = re.search(rf"^#\$ {entry}=(.*)$", log, re.MULTILINE)
    return shlex.split(found[1]) if found else []


def nvcc_options() -> list[str]:
    """Spills fail the build for the architectures the kernels are tuned for, not for those a user asks for."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    options = [*NVCC_FLAGS] if wanted or DEBUG else [*NVCC_FLAGS, *SPILL_GATE]
    for arch in filter(None, re.split(r"[;, ]+", wanted or CUDA_ARCHS)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            stop(f"TORCH_CUDA_ARCH_LIST entry {arch!r} is not of the form 9.0, 9.0a or 9.0+PTX.")
        number = "".join(match.groups()[:3])
        kinds = ["sm", "compute"] if match[4] else ["sm"]
        options += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return options


class Step(NamedTuple):
    """One compiler call, repeated when the command, an input or a header that was read last time has changed."""

    output: str
    command: list[str]
    inputs: list[str]
    record: str  # the file that keeps the last successful command
    headers: str = ""  # the file in which the compiler lists what it read, in make's syntax

    def fresh(self) -> bool:
        record, used = Path(self.record), [*self.inputs]
        if not (os.path.exists(self.output) and record.exists() and record.read_text() == shlex.join(self.command)):
            return False
        if self.headers:
            listed = Path(self.headers).read_text().replace("\\\n", " ").partition(":")[2]
            used += [name.replace("\\ ", " ") for name in re.split(r"(?<!\\)\s+", listed.strip())]
        made = os.stat(self.output).st_mtime_ns
        return all(os.path.exists(name) and os.stat(name).st_mtime_ns <= made for name in used)

    def run(self) -> None:
        if self.fresh():
            return
        for made in (self.output, self.record):
            os.makedirs(os.path.dirname(made), exist_ok=True)
        Path(self.record).unlink(missing_ok=True)  # an output of a compiler that is interrupted must not pass for made
        started = time.time_ns()
        done = subprocess.run(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        told = f"camkernels: {os.path.basename(self.command[0])} -> {os.path.relpath(self.output)}\n{done.stdout}"
        sys.stdout.write(told)  # at once: the threads share the terminal
        if done.returncode != 0:
            stop(f"could not make {self.output}; the command was\n{shlex.join(self.command)}")
        os.utime(self.output, ns=(started, started))  # a header saved while the compiler ran counts as changed
        Path(self.record).write_text(shlex.join(self.command))


def expected_time(step: Step) -> tuple[bool, bool, int]:
    """Greater for what compiles longer: device code, loops over all number types, much source of the same name."""
    source = Path(step.inputs[0])
    family = sum(path.stat().st_size for path in source.parent.glob(f"{source.stem}*"))
    return source.suffix == ".cu", source.stem.endswith("_loops"), family


def run_all(*stages: list[Step]) -> None:
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        for steps in stages:
            list(pool.map(Step.run, steps))


def write_facts(package: Path, libraries: dict[str, dict[str, str]], **more: str | None) -> None:
    now = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    facts = {
        "version": runpy.run_path("python/camkernels/_version.py")["__version__"],
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        "commit": (os.path.exists(".git") and output_of("git", "rev-parse", "HEAD")) or None,
        **more,
        "libraries": libraries,
    }
    (package / "build.json").write_text(json.dumps(facts, indent=2) + "\n")


class BuildLibraries(build_ext):
    """Makes all libraries at once, in the package folder of the build or, in place, of the sources."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        torch = find_torch()
        nvcc, compiler = find_nvcc(torch), find_compiler()
        if sys.platform != "linux":
            stop("the libraries are built on Linux only: set CAMKERNELS_NO_EXT=1.")
        if nvcc and sources("cuda", ".cu"):  # first, because it takes longest
            self.extensions.insert(0, Extension("camkernels._cuda", sources("cuda", ".cu", ".cpp")))
        temp, package = Path(self.build_temp), Path(self.get_ext_fullpath("camkernels.any")).parent
        temp.mkdir(parents=True, exist_ok=True)
        with open(temp / "lock", "w") as lock:  # two builds of one tree take turns
            fcntl.flock(lock, fcntl.LOCK_EX)
            (temp / "sealed.map").write_text("{ local: *; };\n")
            flags = self.make_libraries(torch, nvcc, compiler)
            for library in {*package.glob("_cpu_*.so"), *package.glob("_cuda.so")}:
                if library.stem not in flags:  # left from another build
                    library.unlink()
            release = re.search(r"release .*", output_of(nvcc, "--version")) if nvcc and "_cuda" in flags else None
            compiled_by = output_of(*compiler, "--version").partition("\n")[0]
            write_facts(package, flags, torch=torch.version, compiler=compiled_by, cuda=release and release[0])

    def make_libraries(self, torch: Torch, nvcc: str | None, compiler: list[str]) -> dict[str, dict[str, str]]:
        """Returns the flags of each library by compiler, and by name those that some sources have in addition."""
        compiling, linking, flags = [], [], {}
        for extension in self.extensions:
            name, library = extension.name.rpartition(".")[2], self.get_ext_fullpath(extension.name)
            isa, device, runtime = name.removeprefix("_cpu_"), [], []
            options = [*CXX_FLAGS, *ISAS.get(isa, []), *shlex.split(os.environ.get("CXXFLAGS", ""))]
            cxx = [*compiler, *options, f"-DCAMK_ISA={isa}", f"-isystem{torch.folder}/include"]
            files = map(os.path.basename, extension.sources)
            own = {file: shlex.join(MORE_FLAGS[file]) for file in files if file in MORE_FLAGS}
            flags[name] = {"c++": shlex.join(options)} | own
            if name == "_cuda" and nvcc:
                device = [nvcc, *nvcc_options()]
                cxx += toolkit(nvcc, "INCLUDES")
                # nothing refers to libtorch.so, but through it libtorch_cuda's symbols are found under a CUDA PyTorch
                runtime = ["-Wl,--no-as-needed", "-ltorch", *toolkit(nvcc, "LIBRARIES"), *CUDA_RUNTIME]
                flags[name]["nvcc"] = shlex.join(device[1:])
            objects = [f"{self.build_temp}/{name}/{os.path.basename(source)}.o" for source in extension.sources]
            for source, made in zip(extension.sources, objects, strict=True):
                call = [*(device if source.endswith(".cu") else cxx), *MORE_FLAGS.get(os.path.basename(source), [])]
                call += ["-Icsrc", "-c", source, "-o", made]
                call += ["-MD", "-MF", f"{made}.d"]
                compiling.append(Step(made, call, [source], f"{made}.cmd", f"{made}.d"))
            link = [*compiler, "-shared", "-o", library, *objects, f"-L{torch.folder}/lib", "-ltorch_cpu", "-lc10"]
            link += [*runtime, f"-Wl,--version-script={self.build_temp}/sealed.map", "-Wl,-z,defs"]
            link += shlex.split(os.environ.get("LDFLAGS", ""))
            linking.append(Step(library, link, objects, f"{self.build_temp}/{name}/linked.cmd"))
        compiling.sort(key=expected_time, reverse=True)  # no processor waits for a long one at the end
        run_all(compiling, linking)
        return flags


class BuildPackage(build_py):
    """Starts from an empty folder: setuptools would pack modules that are long deleted from the sources."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            write_facts(
                Path(self.build_lib, "camkernels"), {}
            )  # BuildLibraries, which comes after, writes the full one


class AskForTorch(dist_info):
    """pip reads the metadata before it builds: without this it would download PyTorch, only to fail afterwards."""

    def run(self) -> None:
        find_torch()
        super().run()


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class SourceArchive(sdist):
    """Everything needed to build, test and measure: setuptools alone leaves out headers, most tests, benchmarks."""

    def make_distribution(self) -> None:
        found = [path for top in ("csrc", "tests", "bench") for path in Path(top).rglob("*")]
        found += map(Path, ("Makefile", "CHANGELOG.md", "CONTRIBUTING.md"))
        made = (".so", ".o", ".d", ".pyc")
        self.filelist.extend(str(path) for path in sorted(found) if path.is_file() and path.suffix not in made)
        super().make_distribution()


if __name__ == "__main__":
    commands = {"build_py": BuildPackage, "sdist": SourceArchive}
    if COMPILED:
        commands |= {"build_ext": BuildLibraries, "dist_info": AskForTorch, "bdist_wheel": AnyPython}
    setup(ext_modules=cpu_extensions() if COMPILED else [], cmdclass=commands)
