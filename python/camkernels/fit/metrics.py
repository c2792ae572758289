# SPDX-License-Identifier: MIT
"""How close two pictures are: PSNR and SSIM."""

from __future__ import annotations

import math

import numpy as np

from .errors import require

SIGMA, RADIUS = 1.5, 5  # an 11 x 11 window
K1, K2 = 0.01, 0.03


def psnr_of_mse(mse: float) -> float:
    """-10 log10(mse) in dB for values in [0, 1]; inf for equal pictures."""
    return -10 * math.log10(mse) if mse > 0 else math.inf


def psnr(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """10 log10(peak^2 / mean (a - b)^2) in dB, over all pixels and channels."""
    _same_shape("psnr", a, b)
    total = sum(float(np.square((u.astype(np.float64) - v) / peak).sum()) for u, v in zip(a, b, strict=True))
    return psnr_of_mse(total / a.size)


def ssim(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """Structural similarity of [height, width, channels], averaged over pixels and channels; 1 for equal pictures:

        (2 ma mb + c1) (2 sab + c2) / ((ma^2 + mb^2 + c1) (sa^2 + sb^2 + c2))

    with means m, variances s^2 and covariance sab under a Gaussian window of sigma 1.5, 11 x 11 pixels, c1 = (0.01
    peak)^2, c2 = (0.03 peak)^2. The average is over the windows that lie inside; on an axis of less than 11 pixels
    there are none, and the picture is continued by its mirror image.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.
    """
    _same_shape("ssim", a, b)
    ndimage = require("scipy.ndimage")

    def blur(values: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(values, SIGMA, radius=RADIUS, mode="reflect")

    inside = tuple(slice(RADIUS, -RADIUS) if n > 2 * RADIUS else slice(None) for n in a.shape[:2])
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    means = []
    for channel in range(a.shape[2]):
        u, v = a[..., channel].astype(np.float64), b[..., channel].astype(np.float64)
        mu, mv = blur(u), blur(v)
        variances = blur(u * u) - mu * mu + blur(v * v) - mv * mv
        covariance = blur(u * v) - mu * mv
        score = (2 * mu * mv + c1) * (2 * covariance + c2) / ((mu * mu + mv * mv + c1) * (variances + c2))
        means.append(float(score[inside].mean()))
    return sum(means) / len(means)


def _same_shape(name: str, a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"{name}: two pictures [height, width, channels] of one shape, got {a.shape} and {b.shape}")
