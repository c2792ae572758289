# SPDX-License-Identifier: MIT
"""Draw a fitted field at any size."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import build_model, load_checkpoint
from .errors import UserError, require
from .image import check_backend, check_device, draw
from .picture import write_picture


def render(
    checkpoint: Path, size: tuple[int, int], out: Path | None, device: str, backend: str | None, say=print
) -> int:
    """Draws the picture of a checkpoint with `size` (width, height) pixels; the exit status."""
    require("PIL.Image")
    saved = load_checkpoint(checkpoint)
    if saved["task"].get("kind") != "image":
        raise UserError(f"{checkpoint} is a fit of kind {saved['task'].get('kind')!r}; render draws images")
    place = check_device(device)
    out = out or checkpoint.with_name(f"render_{size[0]}x{size[1]}.png")
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: there is no folder {out.parent}; create it or choose another --out")
    model = build_model(checkpoint, saved, backend).to(place)
    check_backend(model.ops, backend, place)
    write_picture(draw(model, *size, saved["task"].get("bits", 8), place), out)
    say(f"written {out}: {size[0]} x {size[1]} pixels")
    return 0
