# SPDX-License-Identifier: MIT
"""Fixtures recorded from public code: arrays in an .npz file whose entry `meta` tells how they came about."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DIRECTORY = Path(__file__).resolve().parents[3] / "tests" / "data"


@dataclass(frozen=True)
class Golden:
    """One fixture. Keys: in.X inputs, p.X parameters, out.Y outputs, ct.Y their cotangents, g.* gradients of
    <ct, out>, v.in.X a direction and gg.* the gradients of h = <v.in.X, g.in.X>, aux.* anything else."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def hyper(self) -> dict[str, Any]:
        return self.meta["hyper"]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def tensor(self, key: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Tensor:
        return torch.from_numpy(self.arrays[key]).to(device=device, dtype=dtype)

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """(rtol, atol) stated for an implementation that computes in float32 or float64."""
        stated = self.meta["expected"][str(dtype).removeprefix("torch.")]
        return stated["rtol"], stated["atol"]

    def counted(self, key: str) -> np.ndarray:
        """Items of an array that are compared: finite, and not in the rows which the fixture excludes."""
        mask = np.isfinite(self.arrays[key])
        mask[self.meta.get("skip_rows", {}).get(key, [])] = False
        return mask


def golden_names(prefix: str = "", directory: Path = DIRECTORY) -> list[str]:
    """Names of the .npz fixtures which start with `prefix`."""
    return sorted(path.stem for path in directory.glob(f"{prefix}*.npz"))


def load_golden(name: str, directory: Path = DIRECTORY) -> Golden:
    """A fixture by name. Raises FileNotFoundError outside a checkout: fixtures are not part of the package."""
    path = Path(directory) / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(
            f"load_golden: no {path}; fixtures lie in tests/data of the repository, give directory="
        )
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files if key != "meta"}
        return Golden(name, json.loads(str(stored["meta"])), arrays)


def load_json(name: str, directory: Path = DIRECTORY) -> Any:
    """A .json fixture by its path below tests/data."""
    return json.loads((Path(directory) / f"{name}.json").read_text())
