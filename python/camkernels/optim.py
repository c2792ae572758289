# SPDX-License-Identifier: MIT
"""Optimizers for large tables of which a step touches few rows."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _ops, reference
from ._backends import Call, can_run
from ._checks import check_floating, check_number

__all__ = ["SparseRowAdam"]

OP = "SparseRowAdam"
OPTIONS = ("lr", "betas", "eps")
OTHERS_OPTIONS = {"weight_decay", "amsgrad", "momentum", "maximize"}  # of torch's optimizers, which would be ignored
NO_OPTIONS = {"params", "param_names", "name", "initial_lr"}  # what else a new group may have
LARGEST_BETA = 0.99999  # bounds the table of corrections

# values, exp_avg, exp_avg_sq [n, ...], step int32 [n], all changed in place; gradient [n, ...], or [k, ...] of the rows
# int64 [k], each listed once; corrections [steps, 2].
_STEP = _ops.declare(
    "sparse_row_adam(Tensor(a!) values, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) step, Tensor gradient, "
    "Tensor? rows, Tensor corrections, float lr, float beta1, float beta2, float eps) -> ()",
    lambda *arguments: None,
)


@functools.lru_cache(maxsize=4)
def _corrections(betas: tuple[float, float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[steps, 2]: 1 / (1 - b1^t) and 1 / sqrt(1 - b2^t) for t = 0, 1, ..., until both are 1 in that dtype."""
    smallest = math.log(torch.finfo(dtype).eps / 4)
    count = max([2, *(math.ceil(smallest / math.log(beta)) + 1 for beta in betas if beta > 0)])
    t = torch.arange(count, dtype=torch.float64, device="cpu")
    first, second = (1 / (1 - beta**t) for beta in betas)
    return torch.stack([first, second.sqrt()], 1).to(device, dtype)


class SparseRowAdam(Optimizer):
    """Adam, row by row: a step changes only the rows whose gradient has a number other than 0.

    Each row of a parameter [rows, ...], its first axis, has a count t of the steps that touched it. Such a step with
    gradient g does

        t <- t + 1,   m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Other rows keep p, m, v and t, whereas torch.optim.Adam lets their moments fall and moves them on; for rows that
    every step touches both are the same. NaN is a number other than 0. Gradients are dense, or sparse COO [rows, ...]
    with one sparse axis, of which rows that are listed several times are summed. The state of a parameter is `step`
    int32 [rows], `exp_avg` and `exp_avg_sq`, these in float32, or in float64 for a float64 parameter, which is also
    what is computed in.

    Runs where the parameters are: one pass of a kernel on the CPU and on CUDA; `camkernels.reference` where there is
    none, or with CAMKERNELS_BACKEND=reference in the environment. betas are at most 0.99999, which bounds the table of
    corrections that the kernels read.

    Raises ValueError for options out of range or unknown, such as weight_decay, parameters of no axis and gradients of
    more sparse axes, TypeError for options of another type and parameters that are not floating-point.

    >>> table = torch.nn.Parameter(torch.zeros(4, 2))
    >>> optimizer = SparseRowAdam([table], lr=0.1)
    >>> table[1].sum().backward()
    >>> optimizer.step()
    >>> table.tolist()[:2]
    [[0.0, 0.0], [-0.10000000149011612, -0.10000000149011612]]
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-15,
    ):
        if not isinstance(params, Iterable):
            raise TypeError(
                f"{OP}: params must be tensors or groups of them, got {params!r}; give module.parameters() or a list"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; the errors are those of the class."""
        if isinstance(param_group, dict):  # else torch says what it wants
            _check_keys(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            for parameter in group["params"]:
                check_floating(OP, "parameters", parameter)
                if parameter.ndim == 0:
                    raise ValueError(f"{OP}: parameters must have rows, got one without any axis; use torch.optim.Adam")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of every parameter with a gradient; returns the loss of the closure, as torch.optim.Adam does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_group(group)  # which a loaded state or a schedule may have changed
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            like = {"dtype": _moment_dtype(parameter), "memory_format": torch.contiguous_format}
            state["step"] = torch.zeros(len(parameter), dtype=torch.int32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter, **like) for _ in range(2))
        gradient, rows = _listed(parameter.grad)
        moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
        options = {"lr": group["lr"], "betas": tuple(group["betas"]), "eps": group["eps"]}
        if not _has_kernel(parameter.device):
            reference.sparse_row_adam(parameter, *moments, gradient, rows, **options)
            return
        values = parameter.contiguous()
        corrections = _corrections(options["betas"], moments[0].dtype, parameter.device)
        _STEP(values, *moments, gradient.contiguous(), rows, corrections, group["lr"], *options["betas"], group["eps"])
        if values is not parameter:
            parameter.copy_(values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's; moments keep their dtype, which torch's own would round to the parameter's.

        Raises ValueError, and changes nothing, for the state of another optimizer or of other parameters.
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            raise ValueError(
                f"{OP}: state_dict must be what state_dict() of this optimizer gives, got {type(state_dict).__name__} "
                "without state and param_groups"
            )
        own, given = (
            list(chain.from_iterable(group["params"] for group in groups))
            for groups in (self.param_groups, state_dict["param_groups"])
        )
        for group in state_dict["param_groups"]:
            _check_group(group)
        for parameter, number in zip(own, given, strict=False):  # other numbers of parameters torch refuses
            _check_state(parameter, state_dict["state"].get(number, {}))
        super().load_state_dict(state_dict)
        for parameter, number in zip(own, given, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                dtype = torch.int32 if name == "step" else _moment_dtype(parameter)
                self.state[parameter][name] = value.to(parameter.device, dtype).contiguous()


def _check_options(group: dict[str, Any]) -> None:
    check_number(OP, "lr", group["lr"], least=0.0)
    check_number(OP, "eps", group["eps"], least=0.0)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
        raise ValueError(f"{OP}: betas must be two numbers, got {betas!r}; give a tuple such as (0.9, 0.99)")
    for i, beta in enumerate(betas):
        check_number(OP, f"betas[{i}]", beta)
    if not all(0 <= beta <= LARGEST_BETA for beta in betas):
        raise ValueError(
            f"{OP}: betas must be at least 0 and at most {LARGEST_BETA}, got {betas}; for slower averages use "
            "torch.optim.Adam"
        )


def _check_keys(group: dict[str, Any]) -> None:
    """ValueError unless a new group has parameters, and options of this optimizer alone."""
    if "params" not in group:
        raise ValueError(f"{OP}: a group of parameters must have 'params', got {', '.join(group) or 'none'}")
    unknown = sorted(group.keys() - NO_OPTIONS.union(OPTIONS))
    if unknown:
        raise ValueError(
            f"{OP}: a group of parameters has {', '.join(unknown)}; its options are {', '.join(OPTIONS)}, set keys of "
            "your own in param_groups afterwards"
        )


def _check_group(group: dict[str, Any]) -> None:
    """ValueError unless this optimizer has saved such a group of options."""
    others = sorted(OTHERS_OPTIONS & group.keys())
    missing = sorted(set(OPTIONS) - group.keys())
    if others or missing:
        lists = {"has": others, "lacks": missing}
        found = " and ".join(f"{verb} {', '.join(names)}" for verb, names in lists.items() if names)
        raise ValueError(f"{OP}: a group of parameters {found}; its options are {', '.join(OPTIONS)}")
    _check_options(group)


def _check_state(parameter: Tensor, state: dict[str, Any]) -> None:
    """ValueError unless the state is empty or of this optimizer and such a parameter."""
    wanted = {"step": parameter.shape[:1], "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    found = {name: getattr(value, "shape", None) for name, value in state.items()}
    if state and found != wanted:
        sizes = [{name: list(shape or ()) for name, shape in shapes.items()} for shapes in (wanted, found)]
        raise ValueError(
            f"{OP}: the state of a parameter must have the shapes {sizes[0]}, got {sizes[1]}; load one that this "
            "optimizer saved"
        )


def _has_kernel(device: torch.device) -> bool:
    if os.environ.get("CAMKERNELS_BACKEND") == "reference" or device.type not in ("cpu", "cuda"):
        return False
    return can_run(device.type, Call("sparse_row_adam", device.type, device.index)) is None


def _moment_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _listed(gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    """(gradients [k, ...], their rows [k]) of a sparse gradient, (itself, None) of a dense one."""
    if not gradient.is_sparse:
        return gradient, None
    if gradient.sparse_dim() != 1:
        raise ValueError(
            f"{OP}: gradients must be dense or have one sparse axis, got {gradient.sparse_dim()}; use .to_dense()"
        )
    gradient = gradient.coalesce()
    return gradient.values(), gradient.indices()[0].contiguous()
