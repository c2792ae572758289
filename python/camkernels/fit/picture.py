# SPDX-License-Identifier: MIT
"""Pictures in and out: any ordinary image file as an array of 1 to 4 channels with 8 or 16 bits, and back to PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UserError, check_file, require


@dataclass(frozen=True)
class Picture:
    """values [height, width, channels], uint8 or uint16: grey, grey and alpha, RGB, or RGB and alpha."""

    values: np.ndarray
    notes: tuple[str, ...] = ()  # what reading lost, for the user

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.values.shape[1], self.values.shape[0]

    @property
    def channels(self) -> int:
        return self.values.shape[2]

    @property
    def bits(self) -> int:
        return 8 * self.values.dtype.itemsize

    def describe(self) -> str:
        name = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGB with alpha"}[self.channels]
        return f"{self.size[0]} x {self.size[1]} pixels, {name}, {self.bits} bit"

    def to_tensor(self) -> Tensor:
        """[height * width, channels] in [0, 1], rows of pixels from the top."""
        peak = 2**self.bits - 1
        flat = self.values.reshape(-1, self.channels)
        return torch.from_numpy(flat.astype(np.float32)).div_(peak)


def quantize(values: Tensor, bits: int) -> np.ndarray:
    """Numbers in [0, 1], clamped, to the nearest of the 2^bits steps: uint8 or uint16 of the same shape."""
    peak = 2**bits - 1
    steps = values.detach().cpu().float().nan_to_num(0.0).clamp(0, 1).mul(peak).round().numpy()
    return steps.astype(np.uint8 if bits == 8 else np.uint16)


def read_picture(path: str | Path) -> Picture:
    """Reads an image file, turned upright as its EXIF data say. UserError if it cannot be read as a picture.

    Palettes become RGB, other colour spaces too; transparency of any kind becomes an alpha channel; 16 bits are kept
    for grey. Pillow reads 16-bit colour as 8 bits, which `notes` then says.
    """
    image_module = require("PIL.Image")
    path = Path(path)
    check_file(path, "an image file")
    try:
        with image_module.open(path) as image:
            notes = _notes(image)
            image.load()
            upright = require("PIL.ImageOps").exif_transpose(image)
            return Picture(_to_array(upright, path), notes)
    except image_module.DecompressionBombError as error:
        raise UserError(f"{path} is too large for Pillow ({error}); scale it down first") from error
    except image_module.UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that Pillow can read; convert it to PNG, JPEG or TIFF") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what decoders raise on damaged files
        raise UserError(f"{path} cannot be read: {error}; the file is damaged or of an unusual kind") from error


def _notes(image: Any) -> tuple[str, ...]:
    notes = []
    deep = any("16" in str(part) for tile in image.tile for part in tile[3:])
    if image.mode in ("RGB", "RGBA", "LA") and deep:
        notes.append("16-bit colour is read as 8 bits, the upper half, because Pillow has no deeper colour")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"of {frames} frames the first is taken")
    return tuple(notes)


def _to_array(image: Any, path: Path) -> np.ndarray:
    mode = image.mode
    if mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path} has integers of more than 16 bits; convert it to 8 or 16 bits first")
        return values.astype(np.uint16)[..., None]
    if mode == "F":
        raise UserError(f"{path} has floating-point pixels, whose white is not defined; convert it to 16 bits first")
    grey = mode in ("1", "L", "LA", "La")
    if mode not in ("L", "LA", "RGB", "RGBA") or image.has_transparency_data:
        alpha = image.has_transparency_data
        image = image.convert(("LA" if alpha else "L") if grey else ("RGBA" if alpha else "RGB"))
    values = np.array(image, dtype=np.uint8)
    return values.reshape(image.height, image.width, -1)


def write_picture(values: np.ndarray, path: str | Path) -> None:
    """Writes [height, width, channels] uint8, or uint16 of one channel, as the file type its suffix names."""
    image_module = require("PIL.Image")
    flat = values[..., 0] if values.shape[2] == 1 else values
    image = image_module.fromarray(np.ascontiguousarray(flat))
    try:
        image.save(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be written: {error}; choose another file or type, such as .png") from error
