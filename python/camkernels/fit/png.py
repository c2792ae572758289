# SPDX-License-Identifier: MIT
"""PNG files of 16 bits per channel, which Pillow has for grey alone: read and written exactly."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by number of channels
WHOLE = ((0, 0, 1, 1),)
# Passes of an interlaced file: first column and row, steps from there.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def decode(content: bytes) -> np.ndarray:
    """A whole, undamaged file of 16 bits per channel -> [height, width, channels] uint16.

    A colour that the file declares transparent becomes an alpha channel.
    """
    chunks: dict[bytes, bytes] = {}
    for kind, data in _chunks(content):
        chunks[kind] = chunks.get(kind, b"") + data
    width, height, _, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    channels = next(count for count, number in COLOUR_TYPES.items() if number == colour)
    data = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8)
    values = np.empty((height, width, channels), np.uint16)
    for column, row, across, down in ADAM7 if interlaced else WHOLE:
        part = values[row::down, column::across]
        if part.size:
            line = 1 + 2 * channels * part.shape[1]
            rows, data = np.split(data, [line * len(part)])
            part[...] = _unfilter(rows.reshape(-1, line), 2 * channels).view(">u2")
    if b"tRNS" in chunks:
        clear = (values == np.frombuffer(chunks[b"tRNS"], ">u2")).all(-1, keepdims=True)
        values = np.concatenate([values, np.where(clear, 0, 65535).astype(np.uint16)], -1)
    return values


def encode(values: np.ndarray) -> bytes:
    """[height, width, channels] uint16, 1 to 4 channels -> a file."""
    height, width, channels = values.shape
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.full((height, 1 + rows.shape[1]), 2, np.uint8)  # each row as its difference from the one above
    filtered[:, 1:] = rows
    filtered[1:, 1:] -= rows[:-1]
    head = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b""))
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, at)
        yield kind, content[at + 8 : at + 8 + length]
        at += 12 + length


def _unfilter(rows: np.ndarray, size: int) -> np.ndarray:
    """[height, 1 + width size] bytes of pixels, filtered as the first of each row says -> [height, width, size].

    A byte depends on those of the pixels to the left, above, and above left: pixels of one diagonal are independent.
    """
    height, width = len(rows), rows.shape[1] // size
    kinds = rows[:, :1]
    framed = np.zeros((height + 1, width + 1, size), np.uint8)  # zeros above and to the left
    framed[1:, 1:] = rows[:, 1:].reshape(height, width, size)
    pixels = framed.reshape(-1, size)
    for diagonal in range(height + width - 1):
        top, bottom = max(0, diagonal - width + 1), min(diagonal, height - 1)
        first, last = ((row + 1) * (width + 1) + diagonal - row + 1 for row in (top, bottom))
        left, above, corner = (
            pixels[first - back : last - back + 1 : width].astype(np.int16) for back in (1, width + 1, width + 2)
        )
        estimates = [0 * left, left, above, (left + above) // 2, _paeth(left, above, corner)]
        estimate = np.choose(kinds[top : bottom + 1], estimates).astype(np.uint8)
        pixels[first : last + 1 : width] += estimate
    return framed[1:, 1:]


def _paeth(left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """That of the three which is nearest to left + above - corner, the first of equals."""
    to_left, to_above, to_corner = abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)
    nearer = np.where(to_above <= to_corner, above, corner)
    return np.where((to_left <= to_above) & (to_left <= to_corner), left, nearer)
