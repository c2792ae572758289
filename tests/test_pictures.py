# SPDX-License-Identifier: MIT
"""Reading every kind of picture, and the two measures of how close two are."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from camkernels.fit.metrics import psnr, ssim
from camkernels.fit.picture import quantize, read_picture
from pictures import save, smooth

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("scipy")


# ---- reading pictures ------------------------------------------------------------------------------------------------


def deep_png(values: np.ndarray, path: Path) -> Path:
    """A PNG of 16-bit RGB, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
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


def test_16_bit_colour_says_what_is_lost(tmp_path):
    values = smooth(peak=65535)
    picture = read_picture(deep_png(values, tmp_path / "deep.png"))
    assert picture.bits == 8 and np.array_equal(picture.values, values >> 8)
    assert "16-bit colour is read as 8 bits" in picture.notes[0]


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
