# SPDX-License-Identifier: MIT
"""What the tests share: every op of the case registry, the backends that can run it here, and how it is called."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import camkernels
from camkernels import _backends, _gpu, _ops, testing
from fitting import fit_once
from pictures import save, smooth

torch.set_num_threads(1)  # calls are small: a second thread costs more than it gives; tests of threads set their own
torch.backends.cuda.matmul.fp32_precision = "ieee"  # some environments allow TF32

OPS = tuple(testing.CASES)
CASES = [case for op in OPS for case in testing.cases(op)]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HERE = "cuda" if torch.cuda.is_available() else "cpu"
WITH_JACOBIAN = [case for case in CASES if testing.has_jacobian(case.op)]
PAIRED = [cases[0] for cases in testing.PAIRED.values()]  # of each op that is two in a row
FIRST = [*(case for op in OPS for case in testing.cases(op)[:2]), *PAIRED]
MASKS = ("points", "parameters", "both")  # what requires a gradient
# Files that take minutes, the longest first: several processes that take turns then end at about the same time.
LONGEST = ("test_cuda_faults.py", "test_triton_compiled.py", "test_cuda_checked.py", "test_triton_interpreted.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic algorithms are asked for."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def device_of(backend: str) -> str:
    """Where a backend computes; the reference, which can anywhere, on the CPU."""
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def reason_against(backend: str, op: str) -> str | None:
    """Why a backend cannot run an op on this machine; None if it can."""
    device = device_of(backend)
    reason = _backends.can_run(backend, _backends.Call(op, device))
    return _gpu.no_gpu() if reason is None and device == "cuda" else reason


def backends(op: str) -> list[str]:
    """The backends that can run an op on this machine; always the reference, last."""
    return [backend for backend in _backends.BACKENDS if reason_against(backend, op) is None]


def each(cases: Sequence[testing.Case], *, reference: bool = True) -> list[Any]:
    """Parameters (case, backend) for every case and every backend that can run it here."""
    pairs = [(case, b) for case in cases for b in backends(case.op) if reference or b != "reference"]
    return [pytest.param(case, b, id=f"{case.op}-{case}-{b}") for case, b in pairs]


def some(step: int) -> list[testing.Case]:
    """Every step-th case of each op. Covers of options repeat after two and four cases: an odd step meets all."""
    return [case for op in OPS for case in testing.cases(op)[::step]]


def function_of(op: str, backend: str | None = None) -> Callable[..., Any]:
    """The public function of an op on one backend; None: the one it chooses."""
    return partial(getattr(camkernels, op), backend=backend)


def who_refuses(op: str) -> str:
    """A pattern of the names in an op's refusals: its own, that of a pair's operators or of either part's."""
    return f"({'|'.join([op, *_backends.PAIRS.get(op, ())])})"


def definition_of(op: str) -> Callable[..., Any]:
    return getattr(camkernels.reference, op)


def make(case: testing.Case, backend: str, dtype: torch.dtype = torch.float64, **options: Any) -> testing.Call:
    return case.make(dtype, device_of(backend), **options)


def require(call: testing.Call, mask: str) -> dict[str, Tensor]:
    """Fresh leaves of a call's inputs, of which those named by the mask require a gradient."""
    wanted = {name: mask in ("both", "points" if name == call.points else "parameters") for name in call.inputs}
    return {name: t.detach().clone().requires_grad_(wanted[name]) for name, t in call.inputs.items()}


def positional(function: Callable[..., Any], call: testing.Call) -> Callable[..., Any]:
    """The function of the tensors alone, in the order of call.inputs."""
    return lambda *tensors: function(**call.arguments(dict(zip(call.inputs, tensors, strict=True))))


def along(call: testing.Call) -> list[str]:
    """Names of a call's inputs and options that have the axes of its points, the points first."""
    named, leading = call.inputs | call.options, call.leading
    tensors = [name for name in call.beside if torch.is_tensor(named.get(name))]
    return [call.points, *(name for name in tensors if named[name].shape[: len(leading)] == leading)]


def rows(call: testing.Call, index: slice | Tensor) -> testing.Call:
    """The call on some of its points, counted along one axis; axes of size 1 in the points' place are left out."""
    names, leading = along(call), call.leading

    def take(name: str, value: Any) -> Any:
        if name in names:
            return value.flatten(0, len(leading) - 1)[index]
        everywhere = (
            name in call.beside and torch.is_tensor(value) and value.shape[: len(leading)] == (1,) * len(leading)
        )
        return value.reshape(value.shape[len(leading) :]) if everywhere else value

    inputs, options = ({name: take(name, v) for name, v in part.items()} for part in (call.inputs, call.options))
    return dataclasses.replace(call, inputs=inputs, options=options, axes=None if call.axes is None else 1)


def repeated(call: testing.Call, n: int) -> testing.Call:
    """The call on n points, its own again and again."""
    return rows(call, torch.arange(n) % call.leading.numel())


@dataclass(frozen=True)
class Layer:
    """A layer of the package in a small size: build(**options) -> module; inputs(*leading) -> its first argument.

    draws: what it draws from torch's generator on construction, as a list of tensors."""

    name: str
    op: str
    build: Callable[..., torch.nn.Module]
    width: int  # of the last axis of the inputs
    parameters: tuple[str, ...]
    draws: Callable[[torch.nn.Module], list[Tensor]]
    extra_state: bool = True

    def inputs(self, *leading: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(*leading, self.width, generator=generator, dtype=dtype)

    def __str__(self) -> str:
        return self.name


def _hash_grid_layer(**options: Any) -> torch.nn.Module:
    sizes = {"dims": 3, "n_levels": 4, "log2_hashmap_size": 9, "finest_resolution": 40, "init_scale": 1.0}
    return camkernels.HashGrid(**sizes | options)


def _hash_grid_draws(module: torch.nn.Module) -> list[Tensor]:
    return [torch.empty_like(module.table).uniform_(-1.0, 1.0)]


def _mlp_layer(**options: Any) -> torch.nn.Module:
    return camkernels.ModulatedMLP(3, 2, **{"width": 16, "activation": "silu", "norm": "point"} | options)


def _mlp_draws(module: torch.nn.Module) -> list[Tensor]:
    layers = [torch.nn.Linear(*size) for size in ((3, 16), (16, 16), (16, 2))]
    return [p for layer in layers for p in layer.parameters()]


def _plane_layer(**options: Any) -> torch.nn.Module:
    sizes = {"hidden_layers": 2, "resolution": (4, 5), "channels": 3, "combine": "plane_product"}
    return camkernels.CoordinateModulation(**sizes | options)


def _plane_draws(module: torch.nn.Module) -> list[Tensor]:
    gamma, beta = module.grids.unbind(1)
    return [torch.stack([torch.ones_like(gamma), torch.empty_like(beta).uniform_(-0.5, 0.5)], 1)]


class ModulatedPoints(torch.nn.Module):
    """Modulate, which has no parameters, of points alone: its scale and shift are the module's."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.modulate = camkernels.Modulate(norm="point", activation="silu")
        self.gamma, self.beta = (torch.nn.Parameter(torch.rand(8, dtype=dtype)) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        return self.modulate(h.to(self.gamma.dtype), self.gamma, self.beta)  # the result is of the dtype of h


def _modulate_draws(module: torch.nn.Module) -> list[Tensor]:
    return [torch.rand(8), torch.rand(8)]


BASIS_PARAMETERS = ("centers", "shapes", "features")


def _basis_layer(**options: Any) -> torch.nn.Module:
    module = camkernels.RadialBasis(
        30, 2, 4, **{"neighbors": 9, "kind": "gauss", "trainable": BASIS_PARAMETERS} | options
    )
    module.features.data *= 1e3  # which are small at first
    return module


def _basis_draws(module: torch.nn.Module) -> list[Tensor]:
    centers = torch.empty_like(module.centers).uniform_(-1, 1)
    return [centers, module.shapes, torch.empty_like(module.features).uniform_(-1e-4, 1e-4) * 1e3]


MLP_PARAMETERS = tuple(f"layers.{i}.{name}" for i in range(3) for name in ("weight", "bias"))
LAYERS = (
    Layer("HashGrid", "hash_grid", _hash_grid_layer, 3, ("table",), _hash_grid_draws),
    Layer("ModulatedMLP", "modulated_mlp", _mlp_layer, 3, MLP_PARAMETERS, _mlp_draws, extra_state=False),
    Layer("Modulate", "modulate", ModulatedPoints, 8, ("gamma", "beta"), _modulate_draws, extra_state=False),
    Layer("CoordinateModulation", "coordinate_modulation", _plane_layer, 3, ("grids",), _plane_draws),
    Layer("RadialBasis", "radial_basis", _basis_layer, 2, BASIS_PARAMETERS, _basis_draws),
)


# ---- the probe module: csrc/math without a tensor --------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
PROBE_FLAGS = {  # as setup.py compiles the kernels
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-DCAMK_PROBE_LANES_ONLY"],
}


def build_probe(isa: str) -> Any:
    """csrc/probe.cpp compiled for an instruction set, imported; kept under build/ as long as no source changes."""
    if isa not in _ops.usable_isas():
        pytest.skip(f"this machine does not run {isa}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler on the PATH")
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed (extra: test)")
    sources = sorted([*(ROOT / "csrc/math").glob("*.h"), *(ROOT / "csrc/cpu").glob("*.h"), ROOT / "csrc/probe.cpp"])
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-Wall", "-Wextra", "-Werror", f"-DCAMK_PROBE=probe_{isa}", *PROBE_FLAGS[isa]]
    content = "".join(path.read_text() for path in sources) + repr((compiler, flags, sys.version, pybind11.__version__))
    folder = ROOT / "build/probe" / hashlib.sha256(content.encode()).hexdigest()[:16]
    target = folder / f"probe_{isa}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial_file = target.with_suffix(f".{os.getpid()}")
        includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        command = [compiler, *flags, *includes, str(ROOT / "csrc/probe.cpp"), "-o", str(partial_file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        partial_file.replace(target)  # two runs at once each get a whole file
    spec = importlib.util.spec_from_file_location(f"probe_{isa}", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def probe() -> Any:
    return build_probe("baseline")


@pytest.fixture(scope="session", params=PROBE_FLAGS)
def lanes_probe(request: pytest.FixtureRequest) -> Any:
    """The probe of the lanes and number types, for each instruction set."""
    return build_probe(request.param)


# ---- the main job ----------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small picture."""
    return save(smooth(), tmp_path / "photo.png")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished fit, made once for a file of tests; not to be written to."""
    return fit_once(tmp_path_factory.mktemp("fitted"))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
