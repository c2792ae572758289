# SPDX-License-Identifier: MIT
"""Checkpoints: one dict of tensors, numbers and strings, written whole or not at all, loaded without running code.

format     "camkernels.fit"            version    1
model      name in `fields.MODELS`, for a shape in `fields.SHAPE_MODELS`
config     its arguments
state      its state_dict              optimizer  the optimizer's state_dict
step       steps done                  rng        state of the generator that draws batches
training   settings, elapsed seconds, points seen, losses
task       what was fitted: kind, for an image its size, channels and bits, for a shape its mesh's size,
           place and digest
"""

from __future__ import annotations

import lzma
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..fields import MODELS, SHAPE_MODELS
from .errors import UserError, check_file

FORMAT, VERSION = "camkernels.fit", 1
KEYS = {
    "model": str,
    "config": dict,
    "state": dict,
    "optimizer": dict,
    "step": int,
    "rng": torch.Tensor,
    "training": dict,
    "task": dict,
}
# What reading a file of any content may raise.
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, pickle.UnpicklingError, RuntimeError, OSError,
    EOFError, ValueError, LookupError, TypeError, AttributeError,
)  # fmt: skip


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes beside `path` first and renames: a reader sees the old file or the whole new one."""
    part = path.with_name(path.name + ".part")
    try:
        torch.save({"format": FORMAT, "version": VERSION} | content, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}; free some space or choose another folder") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads and checks a checkpoint, tensors on the CPU; UserError if it is damaged, foreign or of another version."""
    path = Path(path)
    check_file(path, "the checkpoint.pt that a fit wrote")
    try:
        _check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's own text recommends to trust the file
            reason = "it does not hold tensors, numbers and strings alone"
        else:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path} is damaged or is no checkpoint ({reason}); fit again or use another file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a camkernels checkpoint; give the checkpoint.pt that a fit wrote")
    if content.get("version") != VERSION:
        given = content.get("version")
        raise UserError(
            f"{path} has format version {given!r}, this camkernels reads {VERSION}; use the one that wrote it"
        )
    odd = [key for key, kind in KEYS.items() if not isinstance(content.get(key), kind)]
    if odd:
        raise UserError(f"{path} is damaged: {', '.join(odd)} missing or of the wrong type; fit again")
    return content


def _check_sums(path: Path) -> None:
    """ValueError if a tensor's bytes are not those that were written; PyTorch itself reads them unchecked."""
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"the check sum of {broken} is wrong")


def build_model(path: str | Path, content: dict[str, Any], backend: str | None) -> nn.Module:
    """The model of a checkpoint with its parameters. UserError if this version has no such model or they do not fit."""
    name, models = content["model"], SHAPE_MODELS if content["task"].get("kind") == "shape" else MODELS
    if name not in models:
        raise UserError(
            f"{path} is of model {name!r}, this camkernels has {', '.join(models)}; use the one that wrote it"
        )
    try:
        model = models[name](**content["config"], backend=backend)
        model.load_state_dict(content["state"])
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} is of another architecture: its parameters do not fit model {name!r} ({reason}); "
            "use the camkernels that wrote it, or fit again"
        ) from error
    return model
