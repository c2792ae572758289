# SPDX-License-Identifier: MIT
"""Pictures in and out: any ordinary image file as an array of 1 to 4 channels with 8 or 16 bits, and back to PNG."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import png
from .errors import UserError, check_file, require

ORIENTATION = 0x0112  # the EXIF tag


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

    Palettes become RGB, other colour spaces too; transparency of any kind becomes an alpha channel. 16 bits are kept
    for grey, and for colour in PNG files; in others Pillow reads 16-bit colour as 8 bits, which `notes` then says.
    """
    image_module = require("PIL.Image")
    path = Path(path)
    check_file(path, "an image file")
    try:
        with image_module.open(path) as image:
            colour = image.mode in ("RGB", "RGBA", "LA")
            deep = colour and any("16" in str(part) for tile in image.tile for part in tile[3:])
            by_pillow = not (deep and image.format == "PNG")
            notes = _notes(image, lost=deep and by_pillow)
            image.load()
            values = _to_array(image, path) if by_pillow else png.decode(path.read_bytes())
            return Picture(_upright(values, image.getexif().get(ORIENTATION, 1)), notes)
    except image_module.DecompressionBombError as error:
        raise UserError(f"{path} is too large for Pillow ({error}); scale it down first") from error
    except image_module.UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image that Pillow can read; convert it to PNG, JPEG or TIFF") from error
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, zlib.error, struct.error) as error:
        # what decoders raise on damaged files
        raise UserError(f"{path} cannot be read: {error}; the file is damaged or of an unusual kind") from error


def _notes(image: Any, lost: bool) -> tuple[str, ...]:
    notes = ["16-bit colour is read as 8 bits, the upper half, because Pillow has no deeper colour"] if lost else []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"of {frames} frames the first is taken")
    return tuple(notes)


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors [height, width, channels] as an EXIF orientation, 1 to 8, asks for."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return np.ascontiguousarray(values)


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
    """Writes [height, width, channels] uint8 or uint16 as the file type its suffix names; uint16 of colours as PNG."""
    image_module = require("PIL.Image")
    path = Path(path)
    deep = values.dtype == np.uint16 and values.shape[2] > 1
    if deep and path.suffix.lower() != ".png":
        raise UserError(f"{path} cannot be written: 16-bit colour is written as PNG only; choose a file *.png")
    flat = values[..., 0] if values.shape[2] == 1 else values
    try:
        if deep:
            path.write_bytes(png.encode(values))
        else:
            image_module.fromarray(np.ascontiguousarray(flat)).save(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be written: {error}; choose another file or type, such as .png") from error
