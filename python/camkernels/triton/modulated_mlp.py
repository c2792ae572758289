# SPDX-License-Identifier: MIT
"""The modulated MLP in Triton: value, and gradients in x, weights, biases and modulation.

Definition: `camkernels.reference.modulated_mlp`. A program takes BLOCK points through all layers, see
modulated_mlp_rows.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._modulation import compute_dtype
from .modulated_mlp_gradients import differentiate, x_gradient
from .modulated_mlp_memory import evaluate_in_memory
from .modulated_mlp_plan import Plan, padded
from .modulated_mlp_rows import evaluate, points_of, x_columns
from .modulated_mlp_sums import sums_kernel

NUMBERS = {torch.float32: tl.float32, torch.float64: tl.float64}


class Settings(NamedTuple):
    """The settings of the operators, see camkernels/modulated_mlp.py."""

    activations: Sequence[int]
    omegas: Sequence[float]
    skips: Sequence[bool]
    output_layer: bool
    point_norm: bool
    eps: float
    tf32: bool
    bfloat16: bool
    keep: bool
    deterministic: bool


class Shape(NamedTuple):
    """How a kernel is cut: points of a program, widest chunk of a layer, warps; whether chunks pass through memory."""

    block: int
    chunk: int
    warps: int
    in_memory: bool = False

    @property
    def options(self) -> dict[str, int | None]:
        """Of the compiler. Without a limit the assembler spills, so that three blocks fit on a multiprocessor."""
        return {"num_warps": self.warps, "num_stages": 1, "maxnreg": 255 if self.in_memory else None}


# Of all gradients, and of values of layers that do not fit into registers. Chosen from machine code: 16 points a warp,
# and the widest chunk that spills nowhere.
THROUGH_MEMORY = Shape(64, 32, 4, in_memory=True)
# Of values, by whether the GPU multiplies from shared memory (sm_90 and later; others hold a chunk of weights in
# registers, so that chunks are narrower), and by the widest layer, padded. That of sm_90 for 64 channels is the fastest
# of those tried on an H100 and an H200; the others are chosen from machine code. On sm_90 a warp has 16 points or more:
# with fewer, warps share columns, and what Triton 3.6 makes of that reads beyond shared memory. Nothing spills on sm_80
# and sm_90, which tests/test_triton_compiled.py checks.
FORWARD = {
    True: {
        16: Shape(128, 16, 4),
        32: Shape(128, 32, 4),
        64: Shape(64, 64, 4),
        128: Shape(128, 128, 8),
        256: THROUGH_MEMORY,
    },
    False: {
        16: Shape(128, 16, 4),
        32: Shape(64, 32, 4),
        64: Shape(64, 32, 4),
        128: THROUGH_MEMORY,
        256: THROUGH_MEMORY,
    },
}
# Estimated, not measured: what a launch leaves in memory stays in the L2 cache until the sums read it.
ROW_BYTES = 256 << 10  # per multiprocessor
SUM_PROGRAMS = 4  # per multiprocessor
SUM_OPTIONS = {"num_warps": 4, "num_stages": 2}


@triton.jit(do_not_specialize=["n", "before"])
def value_kernel(
    x_ptr, weights, biases, modulation_ptr, frequencies_ptr, y_ptr, rows_ptr, n, per_row, before, PLAN: tl.constexpr
):  # fmt: skip
    """y [n, outputs]; a row of the modulation serves per_row points. Of a launch's tiles, tile `before` first."""
    tile = before + tl.program_id(0)
    r = tile.to(tl.int64) * PLAN.block + tl.arange(0, PLAN.block)
    if PLAN.in_memory:
        rows_ptr += tl.program_id(0).to(tl.int64) * PLAN.size
        evaluate_in_memory(
            x_ptr, r, r < n, r // per_row, tile, weights, biases, modulation_ptr, frequencies_ptr, y_ptr, rows_ptr,
            PLAN,
        )  # fmt: skip
    else:
        evaluate(x_ptr, r, r < n, r // per_row, weights, biases, modulation_ptr, frequencies_ptr, y_ptr, PLAN)


@triton.jit(do_not_specialize=["n", "span", "before"])
def gradients_kernel(
    g_ptr, x_ptr, weights, biases, modulation_ptr, frequencies_ptr, gx_ptr, gradient_ptr, rows_ptr, biases_ptr,
    n, per_row, span, before, PLAN: tl.constexpr,
):  # fmt: skip
    """gx [n, in], gradients of the modulation (gradient_ptr), and what those of the weights and biases are made of.

    Of a launch's tiles, tile `before` first."""
    X_COUNT: tl.constexpr = PLAN.x_count
    tile = before + tl.program_id(0)
    rows_ptr += tl.program_id(0).to(tl.int64) * PLAN.size
    r, valid = points_of(tile, n, span, PLAN)
    differentiate(
        g_ptr, x_ptr, r, valid, r // per_row, tile, weights, biases, modulation_ptr, frequencies_ptr, gradient_ptr,
        rows_ptr, biases_ptr, PLAN,
    )  # fmt: skip
    if gx_ptr is not None:
        for i in range(X_COUNT):
            feature, seen = x_columns(i, PLAN)
            gx = x_gradient(tile, weights[0], rows_ptr, 0, i, PLAN).to(gx_ptr.dtype.element_ty)
            at = gx_ptr + r[:, None] * PLAN.features + feature[None, :]
            tl.store(at, gx, mask=valid[:, None] & seen[None, :])


# ---- launching -------------------------------------------------------------------------------------------------------


def precision_of(number: torch.dtype, tf32: bool) -> str:
    """How float32 are multiplied: exactly, by three products of tf32, unless one is allowed."""
    if number == torch.float64:
        return "ieee"
    return "tf32" if tf32 else "tf32x3"


def plan_of(
    settings: Settings, features: int, outs: Sequence[int], modulation: Tensor | None, number: torch.dtype,
    shape: Shape, group: tuple[int, int] | None = None, keeps: bool = False,
) -> Plan:  # fmt: skip
    """What a kernel is compiled for."""
    channels = 0 if modulation is None else modulation.shape[3] if modulation.ndim == 4 else 1
    return Plan(
        features=features,
        outs=tuple(outs),
        activations=tuple(settings.activations),
        omegas=tuple(settings.omegas),
        skips=tuple(settings.skips),
        hidden=len(outs) - settings.output_layer,
        channels=channels,
        point_norm=settings.point_norm,
        eps=settings.eps,
        number=NUMBERS[number],
        precision=precision_of(number, settings.tf32),
        block=shape.block,
        chunk=shape.chunk,
        in_memory=shape.in_memory,
        keeps=keeps,
        group=group,
    )


def value_shape(outs: Sequence[int], device: torch.device) -> Shape:
    modern = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return FORWARD[modern][padded(max(outs))]


def on_device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def per_row(x: Tensor, modulation: Tensor | None) -> int:
    """Points that share a row of the modulation."""
    return 1 if modulation is None else len(x) // max(len(modulation), 1)


def value(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], modulation: Tensor | None,
    frequencies: Tensor | None, *settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator triton_modulated_mlp; nothing is kept."""
    number = compute_dtype(x, modulation, frequencies, *weights)
    outs = [w.shape[0] for w in weights]
    shape = value_shape(outs, x.device)
    plan = plan_of(Settings(*settings), x.shape[1], outs, modulation, number, shape)
    y = weights[0].new_empty(len(x), plan.outputs)

    def launch(rows: Tensor | None, before: int, tiles: int) -> None:
        value_kernel[(tiles,)](
            x, tuple(weights), tuple(biases) or None, modulation, frequencies, y, rows, len(x), per_row(x, modulation),
            before, plan, **shape.options,
        )  # fmt: skip

    run_value(launch, x, plan)
    return y, x.new_empty(0, dtype=number)


def run_value(launch: Callable[[Tensor | None, int, int], None], x: Tensor, plan: Plan) -> None:
    """launch(memory of the tiles, first, count) for all tiles of the points x."""
    tiles = triton.cdiv(len(x), plan.block)
    at_once = tiles_at_once(tiles, x, plan) if plan.in_memory else max(1, tiles)
    rows = x.new_empty(at_once, plan.size, dtype=dtype_of(plan)) if plan.in_memory else None
    with on_device(x):
        for before in range(0, tiles, at_once):
            launch(rows, before, min(at_once, tiles - before))


def dtype_of(plan: Plan) -> torch.dtype:
    """PyTorch's name of the type of hidden values."""
    return torch.float64 if plan.number == tl.float64 else torch.float32


def tiles_at_once(tiles: int, x: Tensor, plan: Plan) -> int:
    """How many tiles a launch takes, whose memory is to stay in the cache."""
    count = processors(x.device)
    fitting = count * ROW_BYTES // (plan.size * dtype_of(plan).itemsize)
    return max(1, min(tiles, max(fitting, 2 * count)))


def backward(
    g: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], modulation: Tensor | None,
    frequencies: Tensor | None, kept: Tensor, *settings_and_mask: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """The operator triton_modulated_mlp_backward: gradients of <g, y> in x, weights, biases and modulation."""
    *settings, mask = settings_and_mask
    number = kept.dtype
    outs = [w.shape[0] for w in weights]
    plan = plan_of(Settings(*settings), x.shape[1], outs, modulation, number, THROUGH_MEMORY, keeps=True)
    job = Gradients(plan, x, weights, biases, modulation, mask)

    def launch(before: int, tiles: int) -> None:
        gradients_kernel[(tiles,)](
            g, x, tuple(weights), tuple(biases) or None, modulation, frequencies, job.gx, job.of_modulation, job.rows,
            job.of_biases, len(x), per_row(x, modulation), job.span, before, job.plan, **THROUGH_MEMORY.options,
        )  # fmt: skip

    job.run(launch, x)
    return job.results()


class Gradients:
    """Memory of a backward pass: results, what becomes results, rows of a launch."""

    def __init__(
        self, plan: Plan, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], modulation: Tensor | None,
        mask: Sequence[bool],
    ):  # fmt: skip
        self.x, self.weights, self.biases, self.modulation = x, weights, biases, modulation
        wants_x, self.wants_weights, self.wants_biases, self.wants_modulation = mask
        self.number = dtype_of(plan)
        points, self.span = per_row(x, modulation), len(x)
        if self.wants_modulation and points >= plan.block:
            self.span, plan = points, dataclasses.replace(plan, sums_modulation=True)
        self.plan = plan
        self.tiles = len(x) // max(self.span, 1) * triton.cdiv(self.span, plan.block)
        self.tiles_per_launch = tiles_at_once(self.tiles, x, plan)
        self.splits = min(self.tiles_per_launch, triton.cdiv(SUM_PROGRAMS * processors(x.device), plan.piece_at[-1]))
        self.gx = torch.empty_like(x) if wants_x else None
        self.rows = self._numbers(self.tiles_per_launch, plan.size)
        self.of_weights = self._numbers(self.splits, plan.weight_at[-1]) if self.wants_weights else None
        wants_sums = self.wants_weights or self.wants_biases
        self.of_biases = self._numbers(self.tiles, plan.bias_at[-1]) if wants_sums else None
        self.of_modulation = self._memory_of_modulation(len(x), points) if self.wants_modulation else None

    def _numbers(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=self.number)

    def run(self, launch: Callable[[int, int], None], inputs: Tensor | None) -> None:
        """launch(first, count) for all tiles, and the sums over their points; inputs: x, if rows do not hold it."""
        with on_device(self.x):
            for before in range(0, self.tiles, self.tiles_per_launch):
                tiles = min(self.tiles_per_launch, self.tiles - before)
                launch(before, tiles)
                if self.of_weights is not None:
                    sums_kernel[(self.plan.piece_at[-1], self.splits)](
                        inputs, self.rows, self.of_weights, len(self.x), self.span, before, tiles, self.plan,
                        **SUM_OPTIONS,
                    )  # fmt: skip

    def _memory_of_modulation(self, points: int, per_row: int) -> Tensor:
        """[rows, hidden, 2, channels]: the result itself, or parts of its sums."""
        tail = self.modulation.shape[1:]
        if self.plan.sums_modulation:
            return self._numbers(self.tiles, *tail)
        return self.modulation.new_empty(points, *tail, dtype=self.number if per_row > 1 else self.modulation.dtype)

    def results(self) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        gx = self.x.new_empty(0) if self.gx is None else self.gx
        weights = self._split(self.of_weights, self.plan.weight_at, self.weights) if self.wants_weights else []
        biases = self._split(self.of_biases, self.plan.bias_at, self.biases) if self.wants_biases else []
        if not self.wants_modulation:
            return gx, weights, biases, (self.x if self.modulation is None else self.modulation).new_empty(0)
        parts, rows = self.of_modulation, len(self.modulation)
        if len(parts) != rows:
            parts = parts.unflatten(0, (rows, len(parts) // rows)).sum(1)
        return gx, weights, biases, parts.to(self.modulation.dtype)

    def _split(self, parts: Tensor, places: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the first axis of the parts, cut into tensors."""
        total = parts.sum(0) if self.tiles > 0 else parts.new_zeros(parts.shape[1:])
        cut = zip(places, like, strict=False)
        return [total[at : at + t.numel()].view_as(t).to(t.dtype, copy=True) for at, t in cut]


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
