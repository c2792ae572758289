# SPDX-License-Identifier: MIT
"""Whether there is a GPU, and whether the CUDA library fits it and this PyTorch; each reason says what to do."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

LIBRARY = "_cuda"
_INSTALL = "install a build of PyTorch for CUDA (https://pytorch.org)"


def build_facts(folder: Path) -> dict[str, Any] | None:
    """What setup.py noted about the build; None if nothing was built or the note cannot be read."""
    try:
        return json.loads((folder / "build.json").read_text())
    except (OSError, ValueError):
        return None


@cache
def _facts() -> dict[str, Any]:
    return build_facts(Path(__file__).parent) or {}


def codes(facts: dict[str, Any]) -> list[str]:
    """Machine code (sm_80) and portable code (compute_90) in the CUDA library, from the note of its build."""
    options = facts.get("libraries", {}).get(LIBRARY, {}).get("nvcc", "")
    return re.findall(r"code=((?:sm|compute)_\d+[af]?)", options)


def runs(code: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU runs a code: sm_XY on X.Y and later minors, compute_XY on all later; a: X.Y alone, f: its major."""
    kind, number, suffix = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", code).groups()
    own = divmod(int(number), 10)
    if suffix == "a":
        return own == capability
    if kind == "compute" and not suffix:
        return own <= capability
    return own[0] == capability[0] and own[1] <= capability[1]


def no_gpu() -> str | None:
    """Why PyTorch can use no GPU here; None if it can."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"this PyTorch ({torch.__version__}) was built without CUDA: {_INSTALL} on a machine with an NVIDIA GPU"
    try:
        torch.cuda.init()
        said = "no device is visible to this process"
    except (AssertionError, RuntimeError) as error:  # its own sentence is better: no driver, too old a driver, ...
        said = str(error).strip().partition("\n")[0]
    return f"PyTorch finds no CUDA device: {said}"


def _other_release(facts: dict[str, Any]) -> str | None:
    """Why a library built with one major release of CUDA is not used by a PyTorch built with another."""
    if torch.version.cuda is None:
        if torch.cuda.is_available():
            return f"this PyTorch ({torch.__version__}) is built for another kind of GPU: {_INSTALL}"
        return None  # tensors without a GPU are fake ones, traced for another machine: nothing to refuse
    built = re.search(r"release (\d+)\.(\d+)", facts.get("cuda") or "")
    major = torch.version.cuda.split(".")[0]
    if built is None or built[1] == major:
        return None
    return (
        f"{LIBRARY}.so was built with CUDA {built[1]}.{built[2]}, this PyTorch with CUDA {torch.version.cuda}: build "
        f"it again with the nvcc of a CUDA {major} toolkit (CUDA_HOME), or install a PyTorch for CUDA {built[1]}"
    )


def _other_architecture(facts: dict[str, Any], index: int | None) -> str | None:
    """Why nothing in the library runs on a GPU; None where something does, or where the build left no note."""
    held = codes(facts)
    if not held or not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability(index)
    if any(runs(code, capability) for code in held):
        return None
    own = ".".join(map(str, capability))
    return (
        f"{LIBRARY}.so holds code for {', '.join(held)}, {torch.cuda.get_device_name(index)} has compute capability "
        f"{own}: build it again with TORCH_CUDA_ARCH_LIST={own}"
    )


def reason_against(index: int | None = None) -> str | None:
    """Why the CUDA library cannot compute on a GPU, the current one by default; None if nothing speaks against it."""
    return _cached(index) if index is not None else _other_release(_facts()) or _other_architecture(_facts(), None)


# torch.compile calls it while tracing and keeps the answer: what torch.compiler.assume_constant_result sets, which
# would import the compiler together with this package.
reason_against._dynamo_marked_constant = True


def allows_tf32() -> bool:
    """Whether PyTorch lets products of float32 on a GPU be those of TF32, by whichever of its settings."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 raises where this one was set


allows_tf32._dynamo_marked_constant = True  # torch.compile compiles again when the setting changes


def allows_bfloat16() -> bool:
    """Whether PyTorch lets products of float32 on the CPU be those of bfloat16."""
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


allows_bfloat16._dynamo_marked_constant = True


@cache
def _cached(index: int) -> str | None:
    """A GPU does not change, and every call asks."""
    return _other_release(_facts()) or _other_architecture(_facts(), index)
