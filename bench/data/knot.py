# SPDX-License-Identifier: MIT
"""Makes knot.ply, the mesh of the demonstration: python bench/data/knot.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np

AROUND, ACROSS = 320, 24  # vertices along the knot and around its tube
FINS, TWISTS = 4, 5  # sharp edges of the cross-section, and how many times it turns by one of them


def knot() -> tuple[np.ndarray, np.ndarray]:
    """(vertices [V, 3], triangles [F, 3]) of a trefoil knot with four thin, sharp, twisted fins along it."""
    t, s = np.meshgrid(np.arange(AROUND) / AROUND, np.arange(ACROSS) / ACROSS, indexing="ij")
    normal, binormal, center = frame(2 * np.pi * t)
    turn = 2 * np.pi * TWISTS / FINS
    angle = 2 * np.pi * s
    radius = 0.42 + 0.28 * np.abs(np.cos(FINS / 2 * angle)) ** 6  # a fin where the cosine is 1
    across = np.cos(angle + turn * t)[..., None] * normal + np.sin(angle + turn * t)[..., None] * binormal
    vertices = (center + radius[..., None] * across).reshape(-1, 3)

    # Around the knot the cross-section has turned by TWISTS fins: the last ring meets the first that much further on.
    i, j = np.meshgrid(np.arange(AROUND), np.arange(ACROSS), indexing="ij")
    shift = np.where(i == AROUND - 1, TWISTS * ACROSS // FINS, 0)

    def at(i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return i % AROUND * ACROSS + j % ACROSS

    a, b, c, d = at(i, j), at(i + 1, j + shift), at(i + 1, j + 1 + shift), at(i, j + 1)
    return vertices, np.concatenate([np.stack([a, c, b], -1), np.stack([a, d, c], -1)]).reshape(-1, 3)


def frame(t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two axes across a trefoil knot and its points, at parameters t; they come back after 2 pi."""
    ring = np.stack([np.cos(2 * t), np.sin(2 * t), 0 * t], -1)
    center = (2 + np.cos(3 * t))[..., None] * ring
    center[..., 2] = np.sin(3 * t)
    out = np.cos(3 * t)[..., None] * ring  # away from the torus that the knot lies on
    out[..., 2] = np.sin(3 * t)
    along = np.stack(
        [
            -3 * np.sin(3 * t) * ring[..., 0] - 2 * (2 + np.cos(3 * t)) * ring[..., 1],
            -3 * np.sin(3 * t) * ring[..., 1] + 2 * (2 + np.cos(3 * t)) * ring[..., 0],
            3 * np.cos(3 * t),
        ],
        -1,
    )
    along /= np.linalg.norm(along, axis=-1, keepdims=True)
    return out, np.cross(along, out), center


def write(path: Path) -> None:
    """A binary PLY file."""
    vertices, triangles = knot()
    header = (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\nproperty float x\nproperty float y\n"
        f"property float z\nelement face {len(triangles)}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    rows = np.empty(len(triangles), [("count", "u1"), ("corners", "<i4", 3)])
    rows["count"], rows["corners"] = 3, triangles
    path.write_bytes(header.encode() + vertices.astype("<f4").tobytes() + rows.tobytes())


if __name__ == "__main__":
    write(Path(__file__).with_name("knot.ply"))
