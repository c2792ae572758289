# SPDX-License-Identifier: MIT
"""Tasks of libraries that are measured where they are installed: tiny-cuda-nn (CUDA) and Dr.Jit (LLVM).

Both are imported when a task is made. Each gets the same table, moved into its own layout, before the clock starts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .case import Case, Inputs, Pass


def _wrong_case(library: str, case: Case, task: Pass, dtype: str) -> str | None:
    """What both lack."""
    if case.op != "hash_grid":
        return f"{library} has no {case.op}"
    if case.facts["convention"] != "tcnn":
        return f"{library} has the tcnn layout only"
    if task.jacobian:
        return f"{library} gives no Jacobian"
    if case.facts["dtype"] != dtype:
        return f"{library} is measured with {dtype} tables"
    return None


# ---- tiny-cuda-nn ----------------------------------------------------------------------------------------------------


def tinycudann_missing(case: Case, task: Pass, device: str) -> str | None:
    return "tinycudann runs on cuda" if device != "cuda" else _wrong_case("tinycudann", case, task, "float32")


class TinycudannTask:
    """`tinycudann.Encoding`: its parameters are the table, level by level, as in the tcnn convention."""

    def __init__(self, case: Case, task: Pass, device: str):
        import tinycudann

        geometry = case.options()["geometry"]
        config = {
            "otype": "HashGrid",
            "n_levels": geometry.n_levels,
            "n_features_per_level": geometry.n_features_per_level,
            "log2_hashmap_size": geometry.log2_hashmap_size,
            "base_resolution": geometry.base_resolution,
            "per_level_scale": geometry.per_level_scale,
        }
        self.encoding, self.task = tinycudann.Encoding(geometry.dims, config), task

    def prepare(self, inputs: Inputs, cotangent: Tensor | None) -> None:
        with torch.no_grad():
            self.encoding.params.copy_(inputs["table"].reshape(-1))
        self.encoding.params.requires_grad_("table" in self.task.wrt)
        self.shape = inputs["table"].shape
        self.x = inputs["x"].detach().requires_grad_("x" in self.task.wrt)
        self.cotangent = cotangent

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.task.wrt:
            with torch.no_grad():
                return self.encoding(self.x), ()
        y = self.encoding(self.x)
        leaves = {"x": self.x, "table": self.encoding.params}
        return y, torch.autograd.grad(y, [leaves[name] for name in self.task.wrt], self.cotangent.to(y.dtype))

    def export(self, result: tuple[Tensor, tuple[Tensor, ...]]) -> dict[str, Tensor]:
        y, gradients = result
        outputs = {"value": y.detach().float()} | dict(zip(self.task.wrt, gradients, strict=True))
        return outputs | ({"table": outputs["table"].reshape(self.shape)} if "table" in outputs else {})


# ---- Dr.Jit ----------------------------------------------------------------------------------------------------------


def drjit_missing(case: Case, task: Pass, device: str) -> str | None:
    if device != "cpu":
        return "drjit is measured on cpu"
    if "x" in task.wrt:
        return "drjit is measured forward and with the gradient of the table"
    return _wrong_case("drjit", case, task, "float32")


class DrjitTask:
    """`drjit.hashgrid.HashGridEncoding`. The table is copied level by level."""

    def __init__(self, case: Case, task: Pass, device: str):
        import drjit
        from drjit.hashgrid import HashGridEncoding
        from drjit.llvm.ad import ArrayXf, Float

        self.dr, self.task, self.geometry = drjit, task, case.options()["geometry"]
        self.Float, self.ArrayXf = Float, ArrayXf
        drjit.set_thread_count(torch.get_num_threads() - 1)  # workers beside the calling thread
        self.encoding = HashGridEncoding(
            Float,
            self.geometry.dims,
            n_levels=self.geometry.n_levels,
            n_features_per_level=self.geometry.n_features_per_level,
            hashmap_size=1 << self.geometry.log2_hashmap_size,
            base_resolution=self.geometry.base_resolution,
            per_level_scale=self.geometry.per_level_scale,
            torchngp_compat=True,
        )
        self.rows = self._shared_rows()

    def _shared_rows(self) -> Tensor:
        """Rows of camkernels' table in the order of Dr.Jit's, whose versions round level sizes differently."""
        for multiple in (8, 4, 2, 1):
            rows = []
            for level, start in enumerate(self.geometry.offsets[:-1]):
                vertices = math.prod(self.geometry.resolutions[level])
                size = min(self.geometry.sizes[level], -(-vertices // multiple) * multiple)
                rows.append(start + torch.arange(size))
            order = torch.cat(rows)
            if order.numel() * self.geometry.n_features_per_level == self.encoding.n_params:
                return order
        raise RuntimeError(f"this version of drjit lays out its {self.encoding.n_params} parameters in an unknown way")

    def prepare(self, inputs: Inputs, cotangent: Tensor | None) -> None:
        table = inputs["table"][self.rows].reshape(-1)
        self.encoding.set_params(self.Float(table.numpy()))
        self.x = self.ArrayXf(inputs["x"].T.contiguous().numpy())
        self.shape = inputs["table"].shape
        if self.task.wrt:
            self.cotangent = [self.Float(column.contiguous().numpy()) for column in cotangent.T]

    def run(self) -> Any:
        dr = self.dr
        if not self.task.wrt:
            y = list(self.encoding(self.x))
            dr.eval(y)
            dr.sync_thread()
            return y, None
        dr.enable_grad(self.encoding.data)
        dr.clear_grad(self.encoding.data)
        y = list(self.encoding(self.x))
        dr.eval(y)  # a training step needs the value as well
        for column, weight in zip(y, self.cotangent, strict=True):
            dr.set_grad(column, weight)
        dr.enqueue(dr.ADMode.Backward, y)
        dr.traverse(dr.ADMode.Backward)
        gradient = dr.grad(self.encoding.data)
        dr.eval(gradient)
        dr.sync_thread()
        return y, gradient

    def export(self, result: Any) -> dict[str, Tensor]:
        y, gradient = result
        outputs = {"value": torch.stack([torch.from_numpy(self.dr.detach(column).numpy()) for column in y], -1)}
        if gradient is not None:
            table = torch.zeros(self.shape)
            table[self.rows] = torch.from_numpy(gradient.numpy()).reshape(-1, self.shape[1])
            outputs["table"] = table
        return outputs
