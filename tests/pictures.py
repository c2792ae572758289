# SPDX-License-Identifier: MIT
"""Pictures that the tests of the main job make up."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def smooth(width: int = 20, height: int = 14, channels: int = 3, peak: int = 255) -> np.ndarray:
    """A picture of slow waves, [height, width, channels]."""
    y, x = np.mgrid[:height, :width]
    waves = [0.5 + 0.4 * np.sin(x / width * (3 + c) + y / height * (4 - c) + c) for c in range(channels)]
    return np.round(np.stack(waves, -1) * peak).astype(np.uint8 if peak == 255 else np.uint16)


def save(values: np.ndarray, path: Path, **options) -> Path:
    from PIL import Image

    Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values).save(path, **options)
    return path
