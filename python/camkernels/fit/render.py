# SPDX-License-Identifier: MIT
"""Draw a fitted picture or shape at any size."""

from __future__ import annotations

from pathlib import Path

from .checkpoint import build_model, load_checkpoint
from .errors import UserError, require
from .image import draw
from .picture import write_picture
from .shape import draw_shape
from .start import check_backend, check_device, check_folder


def render(
    checkpoint: Path, size: tuple[int, int], out: Path | None, device: str, backend: str | None, say=print
) -> int:
    """Draws a checkpoint's picture, or a view of its shape, with `size` (width, height) pixels; the exit status."""
    require("PIL.Image")
    saved = load_checkpoint(checkpoint)
    kind = saved["task"].get("kind")
    if kind not in ("image", "shape"):
        raise UserError(f"{checkpoint} is a fit of kind {kind!r}; render draws images and shapes")
    bits = saved["task"].get("bits", 8)
    if bits not in (8, 16):
        raise UserError(f"{checkpoint} is damaged: a picture of {bits!r} bits; fit again")
    place = check_device(device)
    out = out or checkpoint.with_name(f"render_{size[0]}x{size[1]}.png")
    model = build_model(checkpoint, saved, backend).to(place)
    check_backend(model.ops, backend, place)
    check_folder(out.parent)
    if kind == "image":
        values = draw(model, *size, bits, place)
    else:
        values = draw_shape(model, *size, place)
    write_picture(values, out)
    say(f"written {out}: {size[0]} x {size[1]} pixels")
    return 0
