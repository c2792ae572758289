# SPDX-License-Identifier: MIT
"""Reading every kind of picture, and the two measures of how close two are."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from camkernels.fit.errors import UserError
from camkernels.fit.metrics import psnr, ssim
from camkernels.fit.picture import quantize, read_picture, write_picture
from pictures import save, smooth

Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")
pytest.importorskip("scipy")


# ---- reading pictures ------------------------------------------------------------------------------------------------


def filtered(rows: np.ndarray, size: int, kinds: list[int]) -> bytes:
    """Rows of bytes [height, width * size] as a PNG file has them, row y filtered by kinds[y % len(kinds)]."""
    result, above = b"", [0] * rows.shape[1]
    for y, row in enumerate(rows.tolist()):
        kind = kinds[y % len(kinds)]
        result += bytes([kind])
        for i, value in enumerate(row):
            a, c = (row[i - size], above[i - size]) if i >= size else (0, 0)
            b = above[i]
            paeth = min((a, b, c), key=lambda near: abs(a + b - c - near))
            result += bytes([(value - (0, a, b, (a + b) // 2, paeth)[kind]) % 256])
        above = row
    return result


def deep_png(values: np.ndarray, path: Path, interlaced: bool = False, extra: tuple = ()) -> Path:
    """A PNG of 16 bits per channel, in which every filter occurs and the data are cut in two chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    passes = [values]
    if interlaced:
        starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        passes = [part for y, x, down, across in starts if (part := values[y::down, x::across]).size]
    rows = [part.astype(">u2").view(np.uint8).reshape(len(part), -1) for part in passes]
    data = zlib.compress(b"".join(filtered(part, 2 * channels, [4, 3, 1, 2, 0, 4, 3]) for part in rows))
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, int(interlaced))
    body = [(b"IHDR", head), *extra, (b"IDAT", data[:99]), (b"IDAT", data[99:]), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in body))
    return path


@pytest.mark.parametrize("channels, peak", [(1, 255), (2, 255), (3, 255), (4, 255), (1, 65535)])
def test_plain_pictures_are_read_exactly(tmp_path, channels, peak):
    values = smooth(channels=channels, peak=peak)
    for suffix in (".png", ".tif"):
        picture = read_picture(save(values, tmp_path / f"p{suffix}"))
        assert np.array_equal(picture.values, values) and picture.values.dtype == values.dtype
        assert picture.size == (20, 14) and picture.notes == ()
    tensor = picture.to_tensor()
    assert tensor.shape == (14 * 20, channels) and tensor.dtype == torch.float32
    assert np.array_equal(quantize(tensor, picture.bits).reshape(values.shape), values)


def test_other_modes(tmp_path):
    rgb = Image.fromarray(smooth())
    rgb.quantize(16).save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png").channels == 3
    rgb.quantize(16).save(tmp_path / "clear.gif", transparency=0)
    assert read_picture(tmp_path / "clear.gif").channels == 4
    Image.fromarray(smooth(channels=1)[..., 0]).convert("1").save(tmp_path / "bits.png")
    bits = read_picture(tmp_path / "bits.png")
    assert bits.channels == 1 and set(np.unique(bits.values)) <= {0, 255}
    rgb.convert("CMYK").save(tmp_path / "ink.jpg")
    assert read_picture(tmp_path / "ink.jpg").channels == 3
    Image.fromarray(smooth(channels=1)[..., 0]).save(tmp_path / "key.png", transparency=128)
    assert read_picture(tmp_path / "key.png").channels == 2
    rgb.save(tmp_path / "film.gif", save_all=True, append_images=[rgb.rotate(180)])
    assert "2 frames" in read_picture(tmp_path / "film.gif").notes[0]


def noise(width: int, height: int, channels: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 65536, (height, width, channels), dtype=np.uint16)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("size", [(23, 17), (1, 1), (1, 9), (9, 1), (3, 2)])
def test_16_bit_colour_of_png_is_read_exactly(tmp_path, size, channels, interlaced):
    values = noise(*size, channels)
    path = deep_png(values, tmp_path / "deep.png", interlaced)
    picture = read_picture(path)
    assert picture.bits == 16 and np.array_equal(picture.values, values) and picture.notes == ()
    if channels > 2:  # Pillow, which has the upper halves alone, sees the same file
        assert np.array_equal(np.asarray(Image.open(path)), values >> 8)


def test_a_clear_16_bit_colour_becomes_alpha(tmp_path):
    values = noise(5, 4, 3)
    values[0, :2] = values[3, 4]
    path = deep_png(values, tmp_path / "deep.png", extra=((b"tRNS", values[3, 4].astype(">u2").tobytes()),))
    expected = np.full((4, 5, 1), 65535, np.uint16)
    expected[0, :2] = expected[3, 4] = 0
    assert np.array_equal(read_picture(path).values, np.concatenate([values, expected], -1))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colour_is_written_as_it_is(tmp_path, channels):
    values = noise(23, 17, channels)
    write_picture(values, tmp_path / "deep.png")
    assert np.array_equal(read_picture(tmp_path / "deep.png").values, values)
    if channels > 2:
        assert np.array_equal(np.asarray(Image.open(tmp_path / "deep.png")), values >> 8)
    with pytest.raises(UserError, match=r"deep.tif cannot be written: 16-bit colour is written as PNG only"):
        write_picture(values, tmp_path / "deep.tif")


def test_a_damaged_16_bit_picture_is_refused(tmp_path):
    path = deep_png(noise(23, 17, 3), tmp_path / "deep.png")
    content = path.read_bytes()
    end = content.rindex(b"IEND") - 4
    for damaged in (content[:900], content[:500] + bytes(100) + content[600:], content[: end - 8], content[: end + 3]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read_picture(path)


def test_16_bit_colour_of_tiff_says_what_is_lost(tmp_path):
    values = smooth(peak=65535)
    tags = {256: 20, 257: 14, 258: 16, 259: 1, 262: 2, 273: 8, 277: 3, 278: 14, 279: values.nbytes}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    entries = entries.replace(struct.pack("<HHII", 258, 4, 1, 16), struct.pack("<HHII", 258, 3, 3, 8 + values.nbytes))
    folder = struct.pack("<3HH", 16, 16, 16, len(tags)) + entries + bytes(4)
    head = b"II*\0" + struct.pack("<I", 8 + values.nbytes + 6)
    (tmp_path / "deep.tif").write_bytes(head + values.astype("<u2").tobytes() + folder)
    picture = read_picture(tmp_path / "deep.tif")
    assert picture.bits == 8 and np.array_equal(picture.values, values >> 8)
    assert "16-bit colour is read as 8 bits" in picture.notes[0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in (".png", ".tif", ".jpg"):
        path = save(smooth(), tmp_path / f"turned{suffix}", exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
        assert np.array_equal(read_picture(path).values, expected)


def test_a_16_bit_picture_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = noise(5, 4, 3)
    path = deep_png(values, tmp_path / "deep.png", extra=((b"eXIf", exif.tobytes()[6:]),))
    assert np.array_equal(read_picture(path).values, np.rot90(values, -1))


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    path = save(smooth(), tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    picture = read_picture(path)
    assert picture.size == (14, 20)
    assert psnr(picture.values, np.rot90(smooth(), -1), 255) > 35


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_psnr():
    a = smooth()
    assert psnr(a, a, 255) == float("inf")
    b = a.astype(int)
    b[::2] += 2
    assert psnr(a, b, 255) == pytest.approx(10 * np.log10(255**2 / 2))
    with pytest.raises(ValueError, match="of one shape"):
        psnr(a, a[:-1], 255)


def test_ssim():
    i, j = np.mgrid[:48, :64]
    a = np.stack([(i * 5 + j * 3) % 256, (i * j) % 251, (i * i + 7 * j) % 241], -1).astype(np.uint8)
    b = np.clip(a.astype(int) + ((i * 13 + j * 29) % 41 - 20)[..., None], 0, 255).astype(np.uint8)
    # structural_similarity(gaussian_weights=True, use_sample_covariance=False) of scikit-image 0.26
    assert ssim(a, b, 255) == pytest.approx(0.8783496307455915, abs=1e-12)
    assert ssim(a, a, 255) == pytest.approx(1) and ssim(b, a, 255) == pytest.approx(ssim(a, b, 255))
    deep = [x.astype(np.uint16) * 257 for x in (a, b)]
    assert ssim(*deep, 65535) == pytest.approx(ssim(a, b, 255))
    assert ssim(a, 255 - a, 255) < 0
    assert ssim(a[:3, :1], a[:3, :1], 255) == pytest.approx(1)  # smaller than the window
    flat = np.full((32, 32, 1), 100, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(flat, flat + 50, 255) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
