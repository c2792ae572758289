# SPDX-License-Identifier: MIT
"""Calls beside the registry's: MLPs of many points and wide layers, and the hash grid with an MLP behind it."""

from __future__ import annotations

from typing import Any

import torch

from camkernels import _backends, reference, testing
from camkernels._cases.hash_grid_mlp import draw_network
from camkernels._cases.modulated_mlp import _Draw
from conftest import device_of

# By name: what differs from n=50 points (or leading axes), 2 hidden layers of 20 channels, 3 outputs, and what follows.
# Whole packs: rows that the CPU's kernels work on in registers.
SIZES: dict[str, dict[str, Any]] = {
    "several-tiles": {"leading": (300,)},
    "shared-by-all": {"leading": (300,), "modulation": ((1,), True)},
    "shared-by-rays": {"leading": (3, 100), "modulation": ((3, 1), True)},
    "shared-by-short-rays": {"leading": (60, 5), "modulation": ((60, 1), False)},
    "several-chunks": {"features": 70, "width": 130, "skips": (0, 1), "output_layer": False},
    "widest": {"features": 130, "width": 256, "modulation": ((2, 1), True), "leading": (2, 70), "bias": False},
    "wider": {"width": 300, "skips": (1,), "modulation": ((2, 1), True), "leading": (2, 35)},
    "whole-packs": {"features": 16, "width": 32, "modulation": ((50,), False)},
    "whole-packs-per-channel": {"features": 16, "width": 16, "hidden": 3, "modulation": ((50,), True)},
    "whole-packs-plain": {"features": 16, "width": 64, "norm": None},
    "whole-packs-skip": {"features": 16, "width": 16, "hidden": 3, "skips": (0,), "modulation": ((50,), False)},
    "deep": {"hidden": 7, "skips": (3,), "modulation": ((50,), False)},
    "no-points": {"leading": (0,), "modulation": ((1,), True)},
}


def make_mlp(options: dict[str, Any], dtype: torch.dtype, device: torch.device | str, seed: int, points: str) -> tuple:
    draw = _Draw(dtype, device, seed)
    features = options.get("features", 3)
    x = draw(*options.get("leading", (50,)), features, dtype=draw.point_dtype)
    inputs, rest = draw_network(draw, features, options)
    return {"x": x} | inputs, rest


MLPS = [testing.Case("modulated_mlp", name, make_mlp, options) for name, options in SIZES.items()]
FUSED = list(testing.PAIRED["hash_grid_mlp"])


def taken(cases: list[testing.Case], backend: str) -> list[testing.Case]:
    """Those whose layers are not too wide for a backend."""

    def reason(case: testing.Case) -> str | None:
        return _backends.can_run(
            backend, _backends.Call(case.op, device_of(backend), widest=case.options.get("width", 0))
        )

    return [case for case in cases if reason(case) is None]


def agree(
    case: testing.Case, function: Any, definition: Any, *, dtype: torch.dtype, device: Any = "cpu", order: int = 1
):
    """Both in that dtype, compared."""
    call = case.make(dtype, device)
    found = [testing.evaluate(f, call, order=order) for f in (function, definition)]
    testing.compare(case, call, *found)


def stays_finite_inside(function: Any, dtype: torch.dtype, device: Any = "cpu") -> None:
    """Hidden values are float32: sums beyond 65504, the range of float16, do not overflow."""
    weights = [torch.full((4, 4), 300.0, device=device), torch.full((2, 4), 2.0**-12, device=device)]
    inputs = {"x": torch.full((3, 4), 100.0, device=device)} | {f"weights.{i}": w for i, w in enumerate(weights)}
    exact = testing.Call({name: t.double() for name, t in inputs.items()}, {"activation": "relu"})
    call = testing.Call(inputs | {name: inputs[name].to(dtype) for name in ("weights.0", "weights.1")}, exact.options)
    found, expected = testing.evaluate(function, call), testing.evaluate(reference.modulated_mlp, exact)
    assert (exact.inputs["x"] @ exact.inputs["weights.0"].t() > 65504).all()
    for name in ("value", "grad.x"):
        assert found[name].isfinite().all()
        torch.testing.assert_close(found[name], expected[name].to(found[name].dtype), rtol=1e-2, atol=0)
