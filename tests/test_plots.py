# SPDX-License-Identifier: MIT
"""What the pictures show that explain a fit."""

from __future__ import annotations

import numpy as np
import pytest

from camkernels.fit.plots import write_error_picture, write_loss_curve
from pictures import smooth

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")


def test_the_error_picture_is_bright_where_the_error_is(tmp_path):
    original = smooth(40, 40)
    fitted = original.copy()
    fitted[:, 20:] -= 25
    write_error_picture(original, fitted, 255, tmp_path / "error.png")
    with Image.open(tmp_path / "error.png") as image:
        grey = np.asarray(image.convert("L"), dtype=float)
    assert min(grey.shape) >= 200
    left, right = (grey[100:400, start : start + 100].mean() for start in (60, 300))
    assert left < 20 and right > left + 100


def test_the_loss_picture_shows_the_losses(tmp_path):
    def drawn(losses):
        write_loss_curve(losses, tmp_path / "loss.png")
        with Image.open(tmp_path / "loss.png") as image:
            return np.asarray(image.convert("RGB"), dtype=int)

    falling, flat = drawn([0.1 / (1 + step) for step in range(300)]), drawn([0.1] * 299 + [0.1 / 300])
    assert min(falling.shape[:2]) >= 200

    def height_of_the_curve(picture):
        """Mean row of the bluish pixels of the middle columns."""
        blue = picture[:, 300:500, 2] - picture[:, 300:500, 0] > 60
        return np.nonzero(blue)[0].mean()

    assert height_of_the_curve(falling) > height_of_the_curve(flat) + 100
