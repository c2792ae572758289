# SPDX-License-Identifier: MIT
"""Who is measured: a provider computes the passes of a case in its own way, and says so where it cannot.

camkernels' backends and the compiled reference serve every op, because a case names its op and its arguments. Eager
PyTorch, written anew for each op, is the baseline: add it to `EAGER`. Other libraries are tasks of their own.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

import camkernels
from camkernels import _backends, testing

from . import hash_grid_eager, modulated_mlp_eager, modulation_eager, other_libraries, radial_basis_eager
from .case import Case, Inputs, Pass, arguments

Outputs = dict[str, Tensor]  # "value", "jacobian", and the gradients by the name of their input


class Task(Protocol):
    """One provider at one pass of one case. Only `run` is timed."""

    def prepare(self, inputs: Inputs, cotangent: Tensor | None) -> None:
        """Takes the inputs of the calls to come; called again where the points change."""

    def run(self) -> Any:
        """Computes everything the pass asks for, down to memory."""

    def export(self, result: Any) -> Outputs:
        """The result of `run` as tensors laid out as camkernels' are."""


class TorchTask:
    """Task of a differentiable PyTorch function of the inputs; with `jacobian`, of one that returns (y, J)."""

    def __init__(self, function: Callable[..., Any], task: Pass):
        self.function, self.task = function, task

    def prepare(self, inputs: Inputs, cotangent: Tensor | None) -> None:
        self.inputs = {name: t.detach().requires_grad_(name in self.task.wrt) for name, t in inputs.items()}
        self.arguments, self.cotangent = arguments(self.inputs), cotangent

    def run(self) -> tuple[Any, tuple[Tensor, ...]]:
        if not self.task.wrt:
            with torch.no_grad():
                return self.function(**self.arguments), ()
        y = self.function(**self.arguments)
        return y, torch.autograd.grad(y, [self.inputs[name] for name in self.task.wrt], self.cotangent)

    def export(self, result: tuple[Any, tuple[Tensor, ...]]) -> Outputs:
        y, gradients = result
        outputs = dict(zip(("value", "jacobian"), y, strict=True)) if self.task.jacobian else {"value": y}
        outputs |= dict(zip(self.task.wrt, gradients, strict=True))
        return {name: t.detach() for name, t in outputs.items()}


@dataclass(frozen=True)
class Provider:
    """missing(case, pass, device) -> why not, or None; make(case, pass, device) -> Task.

    compiled: the first call compiles, and its time is reported apart. scratch: memory of forward + backward as a
    multiple of the case's `scratch`. slack: factor on the tolerances of the agreement check, with its reason in about.
    product: the dtype of its matrix products, where it is not the case's.
    """

    name: str
    about: str
    make: Callable[[Case, Pass, str], Task]
    missing: Callable[[Case, Pass, str], str | None]
    compiled: bool = False
    scratch: float = 0.0
    slack: float = 1.0
    product: str | None = None


# ---- camkernels ------------------------------------------------------------------------------------------------------


def _jacobian(task: Pass) -> dict[str, bool]:
    return {"return_jacobian": True} if task.jacobian else {}


def _camkernels(backend: str) -> Provider:
    def make(case: Case, task: Pass, device: str) -> Task:
        return TorchTask(case.computed_by(camkernels, backend=backend, **_jacobian(task)), task)

    def missing(case: Case, task: Pass, device: str) -> str | None:
        return _backends.can_run(backend, _backends.Call(case.op, device))

    scratch = 3.0 if backend == "reference" else 0.0
    return Provider(backend, f"camkernels, backend {backend!r}", make, missing, scratch=scratch)


def _with_bfloat16(case: Case, task: Pass, device: str) -> Task:
    function = case.computed_by(camkernels, backend="cpu")

    def run(**inputs: Any) -> Tensor:
        with testing.bfloat16(True):
            return function(**inputs)

    return TorchTask(run, task)


def _no_bfloat16(case: Case, task: Pass, device: str) -> str | None:
    if case.op != "modulated_mlp" or case.facts["dtype"] != "float32":
        return "products of float32 are those of modulated_mlp in float32"
    if device == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return "this processor has no AVX512_BF16"
    return _backends.can_run("cpu", _backends.Call(case.op, device))


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _no_compiler() -> str | None:
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:  # torch's own exceptions, private and changing
        return f"torch.compile needs a C++ compiler: {error}"
    return None


def _compile_reference(case: Case, task: Pass, device: str) -> Task:
    return TorchTask(_compile(case.computed_by(camkernels.reference, **_jacobian(task))), task)


# ---- eager PyTorch ---------------------------------------------------------------------------------------------------

# Op -> module with FORMS and make(options, device, form) -> function of the inputs. Forms: "blend", the baseline, which
# every op has; "sum", another way to write it; "fair", the baseline with the fastest operations PyTorch has.
EAGER: dict[str, Any] = {
    "hash_grid": hash_grid_eager,
    "modulated_mlp": modulated_mlp_eager,
    "radial_basis": radial_basis_eager,
    "coordinate_modulation": modulation_eager.coordinate_modulation,
    "modulate": modulation_eager.modulate,
    "hash_grid_mlp": modulation_eager.hash_grid_mlp,
}


def with_jacobian(function: Callable[..., Tensor], points: str = "x") -> Callable[..., tuple[Tensor, Tensor]]:
    """(y, J [n, outputs, dims]) by forward-mode differentiation, one direction per axis: what PyTorch offers."""

    def both(**inputs: Tensor) -> tuple[Tensor, Tensor]:
        x = inputs.pop(points)

        def of_points(p: Tensor) -> Tensor:
            return function(**{points: p}, **inputs)

        columns = []
        for axis in range(x.shape[-1]):
            direction = pad(torch.ones_like(x[..., :1]), (axis, x.shape[-1] - 1 - axis))
            y, column = torch.func.jvp(of_points, (x,), (direction,))
            columns.append(column)
        return y, torch.stack(columns, -1)

    return both


def _eager(case: Case, task: Pass, device: str, form: str = "blend", compiled: bool = False) -> Task:
    function = EAGER[case.op].make(case.options(), device, form)
    if task.jacobian:
        function = with_jacobian(function)
    return TorchTask(_compile(function) if compiled else function, task)


def _no_eager(case: Case, task: Pass, device: str, form: str = "blend") -> str | None:
    if case.op not in EAGER:
        return f"{case.op} has no eager baseline"
    return None if form in EAGER[case.op].FORMS else f"the eager baseline of {case.op} has one form only"


def _eager_provider(name: str, about: str, form: str) -> Provider:
    make, missing = (functools.partial(function, form=form) for function in (_eager, _no_eager))
    return Provider(name, about, make, missing, scratch=1.0)


# ---- registry --------------------------------------------------------------------------------------------------------


def _library(name: str, about: str, slack: float) -> Provider:
    """A library that may not be installed: `other_libraries` has <name>_missing and a task class <Name>Task."""
    task_class = getattr(other_libraries, f"{name.capitalize()}Task")
    refuses = getattr(other_libraries, f"{name}_missing")

    def missing(case: Case, task: Pass, device: str) -> str | None:
        reason = refuses(case, task, device)
        if reason is not None:
            return reason
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:  # tinycudann: no CUDA device; drjit: no LLVM
            return f"{name} cannot be imported: {error}"
        return None

    return Provider(name, about, task_class, missing, slack=slack)


PROVIDERS: tuple[Provider, ...] = (
    *(_camkernels(backend) for backend in _backends.BACKENDS),
    Provider(
        "cpu_bfloat16",
        "backend 'cpu' where PyTorch allows products of bfloat16, whose errors are those of that dtype",
        _with_bfloat16,
        _no_bfloat16,
        slack=300.0,
        product="bfloat16",
    ),
    _eager_provider("eager", "eager PyTorch, the baseline", "blend"),
    _eager_provider("eager_fair", "eager PyTorch, the hash grid with index_select for table[index]", "fair"),
    _eager_provider("eager_sum", "eager PyTorch, the hash grid as a sum over corners", "sum"),
    Provider(
        "compile",
        "torch.compile of eager",
        functools.partial(_eager, compiled=True),
        lambda *of: _no_eager(*of) or _no_compiler(),
        compiled=True,
        scratch=0.5,
    ),
    Provider(
        "compile_reference",
        "torch.compile of camkernels.reference",
        _compile_reference,
        lambda *of: _no_compiler(),
        compiled=True,
        scratch=1.0,
    ),
    _library("tinycudann", "tiny-cuda-nn's PyTorch binding; rounds the table to float16", 10.0),
    _library("drjit", "Dr.Jit's hash grid, LLVM; level scales differ in the last digits of float32", 10.0),
)
BASELINES = ("eager", "compile")  # join every round
COMPARED = (*BASELINES, "eager_sum")  # speed-ups over these are recorded


def select(names: str | None = None) -> list[Provider]:
    """Providers by comma-separated names, all by default. ValueError for an unknown one."""
    if names is None:
        return list(PROVIDERS)
    known = {provider.name: provider for provider in PROVIDERS}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise ValueError(f"no provider is called {name!r}; there are {', '.join(known)}")
    return [known[name] for name in known if name in wanted]


def find(name: str) -> Provider:
    """The provider of that name."""
    return next(provider for provider in PROVIDERS if provider.name == name)
