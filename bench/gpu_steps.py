# SPDX-License-Identifier: MIT
"""The steps of `python -m bench.gpu`: commands with a limit, and what is taken from each into the result file."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from camkernels import _ops
from camkernels import triton as triton_backend

from . import ROOT

PYTHON = (sys.executable, "-m")
TAIL = 40  # lines of a step's output that are kept
GRACE = 5.0  # seconds between asking a step to end and ending it
PROVIDERS = "cuda,triton,eager,eager_fair,compile,tinycudann"
MLP_PROVIDERS = "cuda,triton,eager,compile"


def _nothing(folder: Path) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Step:
    """A command: `limit` seconds at most, not started with fewer than `least`; gather(folder) -> items of the result.

    rehearsal: what a dry run runs instead; skip() -> why the step is left out here, or None.
    """

    name: str
    about: str
    command: tuple[str, ...]
    limit: float
    least: float
    gather: Callable[[Path], dict[str, Any]] = _nothing
    rehearsal: tuple[str, ...] = ()
    skip: Callable[[], str | None] = lambda: None
    environment: tuple[tuple[str, str], ...] = ()

    def rehearsed(self) -> Step:
        return replace(self, command=self.rehearsal)

    def shown(self) -> list[str]:
        """The command as one would type it."""
        variables = [f"{name}={value}" for name, value in self.environment]
        return [*variables, *("python" if part == sys.executable else part for part in self.command)]


# ---- running one -----------------------------------------------------------------------------------------------------


def execute(step: Step, seconds: float, folder: Path | None = None) -> dict[str, Any]:
    """{step, outcome, seconds, reason, tail}; outcome: ok, failed, or timed out. The process and its children end."""
    path = os.pathsep.join(filter(None, (str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | dict(step.environment)
    start = time.monotonic()
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    late = False
    try:
        output, _ = process.communicate(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        late, output = True, _end(process)
    except BaseException:  # Ctrl-C does not reach the other group
        _end(process)
        raise
    tail = [line.rstrip() for line in (output or "").splitlines() if line.strip()][-TAIL:]
    outcome, reason = "ok", None
    if late:
        outcome, reason = "timed out", f"it was ended after {seconds:.0f} s"
    elif process.returncode != 0:
        outcome, reason = "failed", f"status {process.returncode}: {tail[-1] if tail else 'no output'}"
    spent = round(time.monotonic() - start, 1)
    return {"step": step.name, "outcome": outcome, "seconds": spent, "reason": reason, "tail": tail}


def _end(process: subprocess.Popen) -> str:
    """Ends a process and its children, which are in a group of their own; the output so far."""
    for kind in (signal.SIGINT, signal.SIGKILL):  # interrupted, pytest still writes its report
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        try:
            return process.communicate(timeout=GRACE)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


# ---- what a step leaves ----------------------------------------------------------------------------------------------


def read_tests(report: Path) -> dict[str, Any]:
    """{tests: {passed, failed, skipped, backends: {cuda: {...}}, failures}} of pytest's XML report; {} without one.

    A test belongs to the backend that stands among its parameters.
    """
    if not report.exists():
        return {}
    total, backends, failures = dict.fromkeys(("passed", "failed", "skipped"), 0), {}, []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        total[outcome] += 1
        name = case.get("name", "")
        if match := re.search(r"\[(?:.*-)?(cuda|triton)(?:-.*)?\]$", name):
            counts = backends.setdefault(match[1], dict.fromkeys(total, 0))
            counts[outcome] += 1
        if outcome == "failed":
            found = next(child for child in case if child.tag in ("failure", "error"))
            failures.append({"test": name, "message": (found.get("message") or "")[:500]})
    return {"tests": total | {"backends": backends, "failures": failures}}


def _rates(folder: Path) -> dict[str, Any]:
    file = folder / "rates.json"
    return {"rates": json.loads(file.read_text())} if file.exists() else {}


def _records(folder: Path) -> dict[str, Any]:
    """Of all benchmarks so far."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    return {"records": [json.loads(line) for line in lines]}


# ---- the steps -------------------------------------------------------------------------------------------------------


def _no_build() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if any(map(shutil.which, (f"{home}/bin/nvcc",) if home else ("nvcc", "/usr/local/cuda/bin/nvcc"))):
        return None
    have = "the library that is there is used" if _ops.cuda_missing is None else "the backend cuda is left out"
    return f"there is no nvcc; {have}"


def _benchmark(
    folder: Path,
    name: str,
    about: str,
    limit: float,
    case: str,
    passes: str = "forward,fb-table",
    providers: str = PROVIDERS,
) -> Step:
    """Cases of bench.run; the rounds get a quarter of the limit, torch.compile and the comparison the rest."""
    arguments = ("--device", "cuda", "--cases", case, "--passes", passes, "--providers", providers)
    seconds = limit / 4 / len(case.split(","))
    out = ("--seconds", f"{seconds:g}", "--rounds", "10", "--out", str(folder / f"{name}.jsonl"))
    return Step(name, about, (*PYTHON, "bench.run", *arguments, *out), limit, 20, _records)


def _perceptron(folder: Path, name: str, about: str, network: str, size: str, half: str) -> Step:
    """A network in float32 and in half precision."""
    case = ",".join(f"modulated_mlp/{network}/{dtype}/{size}" for dtype in ("float32", half))
    return _benchmark(folder, name, about, 80, case, "forward,fb-parameters", MLP_PROVIDERS)


def marked() -> list[str]:
    """Test files with tests for a GPU, so that no other need be imported."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    pattern = re.compile(r"^(?:pytestmark = .*|@| *pytest\.param\(.*)pytest\.mark\.cuda\b", re.MULTILINE)
    return [str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text())]


def all_steps(folder: Path = Path("FOLDER")) -> list[Step]:
    """In the order in which they are worth having; `folder` is where they leave their results."""
    report = folder / "tests.xml"
    pytest = (*PYTHON, "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider")
    benchmark, perceptron = (functools.partial(make, folder) for make in (_benchmark, _perceptron))
    grid = "hash_grid/{}/tcnn/{}/float32/{}".format
    return [
        Step(
            "build", "the CUDA library, where it is not up to date",
            (sys.executable, "setup.py", "-q", "build_ext", "--inplace"), 270, 20,
            skip=_no_build, environment=(("CAMKERNELS_CUDA", "1"),),
        ),
        Step(
            "triton-cache", "Triton's kernels for the tests, compiled in several processes",
            (*PYTHON, "bench.triton_cache"), 110, 20, skip=lambda: triton_backend.MISSING,
        ),
        Step(
            "tests", "every test that needs a GPU",
            (*pytest, f"--junitxml={report}", *marked()), 150, 60, lambda _: read_tests(report),
            rehearsal=(*pytest, "--collect-only", *marked()),
        ),
        Step("check", "every backend against the reference", (*PYTHON, "camkernels", "check"), 100, 20),
        Step(
            "rates", "what the GPU can do at most",
            (*PYTHON, "bench.gpu_rates", "--out", str(folder / "rates.json")), 45, 20, _rates,
        ),
        benchmark("grid-3d", "2^20 random points", 80, grid("3d", "uniform", "n20"), "forward,fb-table,fb-both"),
        benchmark("grid-3d-sorted", "the same in Morton order", 45, grid("3d", "coherent", "n20")),
        benchmark("grid-3d-small", "2^14 points", 45, grid("3d", "uniform", "n14")),
        benchmark("grid-2d", "2^20 random points in 2-D", 45, grid("2d", "uniform", "n20")),
        perceptron("mlp-narrow", "2^20 points, 64 wide, modulated", "narrow", "n20", "bfloat16"),
        perceptron("mlp-wide", "2^17 points, 256 wide, modulated", "wide", "n17", "bfloat16"),
        perceptron("mlp-ngp", "2^20 points, 64 wide", "instant-ngp", "n20", "float16"),
        benchmark(
            "radial-basis", "2^20 points, 4 and 10 kernels each", 60,
            "radial_basis/2d-k4-f32-20k/float32/n20,radial_basis/2d-k10-f64-100k/float32/n20",
            "forward,fb-features,fb-all", MLP_PROVIDERS,
        ),
        Step(
            "nearest", "nearest centres of 10^6 points beside SciPy's tree on all cores",
            (*PYTHON, "bench.nearest", "--device", "cuda", "--points", "1000000", "--seconds", "6"), 45, 20,
            skip=lambda: None if find_spec("scipy") else "SciPy is not installed",
        ),
    ]  # fmt: skip


def select(names: str | None, folder: Path) -> list[Step]:
    """Steps by comma-separated names, all by default. ValueError for an unknown one."""
    steps = all_steps(folder)
    if names is None:
        return steps
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [step.name for step in steps]
    for name in wanted:
        if name not in known:
            raise ValueError(f"no step is called {name!r}; there are {', '.join(known)}")
    return [step for step in steps if step.name in wanted]
