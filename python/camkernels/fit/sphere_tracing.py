# SPDX-License-Identifier: MIT
"""A picture of a surface that is given as signed distances in the unit cube, by sphere tracing."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .picture import quantize

CHUNK = 1 << 17  # points per call of the field
MIDDLE, RADIUS = 0.5, 0.5  # the sphere that is looked into
AZIMUTH, ELEVATION = math.radians(30), math.radians(20)  # of the camera
AWAY, ZOOM = 1.7, 3.2  # its distance from the middle, and the length of its lens in half-heights of the picture
STEPS, RELAXATION, NEAR = 128, 0.9, 5e-4  # of a ray: at most so many, of that share of the distance, until so near
SMALLEST_STEP = 1e-4
SUPERSAMPLING = 2
REACH = 0.08  # how far from the surface others shade it
COLOR, BACKGROUND = (0.72, 0.76, 0.82), (1.0, 1.0, 1.0)
LIGHT = (-0.25, 0.7, 0.75)

Distance = Callable[[Tensor], Tensor]  # [N, 3] -> [N]


def draw_surface(distance: Distance, width: int, height: int, device: torch.device) -> np.ndarray:
    """The surface where the distance is 0, seen from the front, above and the right, y up: uint8 [height, width, 3]."""
    side = SUPERSAMPLING
    origin, directions = _rays(width * side, height * side, device)
    colors = torch.cat([_colors(distance, origin, part) for part in directions.split(CHUNK)])
    pixels = colors.reshape(height, side, width, side, 3).mean((1, 3))
    return quantize(pixels, 8)


def gradient(distance: Distance, x: Tensor) -> Tensor:
    """Derivatives [N, 3] of the distance at x [N, 3]."""
    parts = []
    for part in x.split(CHUNK):
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            parts.append(torch.autograd.grad(distance(part).sum(), part)[0])
    return torch.cat(parts) if parts else torch.empty_like(x)


def _rays(width: int, height: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(origin [3], unit directions [width * height, 3]), row by row from the top left."""
    toward = torch.tensor(
        [
            -math.sin(AZIMUTH) * math.cos(ELEVATION),
            -math.sin(ELEVATION),
            -math.cos(AZIMUTH) * math.cos(ELEVATION),
        ]
    )
    right = torch.nn.functional.normalize(torch.linalg.cross(toward, torch.tensor([0.0, 1.0, 0.0])), dim=0)
    up = torch.linalg.cross(right, toward)
    across = (2 * torch.arange(width) + 1 - width) / min(width, height)
    down = (2 * torch.arange(height) + 1 - height) / min(width, height)
    directions = ZOOM * toward + across[None, :, None] * right - down[:, None, None] * up
    directions = torch.nn.functional.normalize(directions, dim=-1).reshape(-1, 3)
    return (MIDDLE - AWAY * toward).to(device), directions.to(device)


@torch.no_grad()
def _colors(distance: Distance, origin: Tensor, directions: Tensor) -> Tensor:
    """[N, 3] in [0, 1]."""
    colors = directions.new_tensor(BACKGROUND).expand(len(directions), 3).clone()
    hit, places = _trace(distance, origin, directions)
    if len(hit):
        colors[hit] = _shaded(distance, places, directions[hit])
    return colors


def _trace(distance: Distance, origin: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers of the rays [M] that meet the surface within the sphere, where they do [M, 3])."""
    offset = origin - MIDDLE
    half = -(directions @ offset)
    within = half.square() - (offset @ offset - RADIUS**2)
    ray = (within > 0).nonzero()[:, 0]
    t, end = half[ray] - within[ray].sqrt(), half[ray] + within[ray].sqrt()
    hits, places = [ray[:0]], [directions[:0]]
    for _ in range(STEPS):
        if not len(ray):
            break
        x = origin + t.unsqueeze(-1) * directions[ray]
        d = distance(x)
        met = d < NEAR
        hits.append(ray[met])
        places.append(x[met])
        t = t + (RELAXATION * d).clamp(min=SMALLEST_STEP)
        on = ~met & (t < end)
        ray, t, end = ray[on], t[on], end[on]
    return torch.cat(hits), torch.cat(places)


def _shaded(distance: Distance, x: Tensor, directions: Tensor) -> Tensor:
    normal = torch.nn.functional.normalize(gradient(distance, x), dim=-1)
    normal = torch.where((normal * directions).sum(-1, keepdim=True) > 0, -normal, normal)
    light = torch.nn.functional.normalize(x.new_tensor(LIGHT), dim=0)
    diffuse = (normal @ light).clamp(min=0)
    sky = 0.5 + 0.5 * normal[:, 1]
    shine = (normal @ torch.nn.functional.normalize(light - directions.mean(0), dim=0)).clamp(min=0) ** 60
    open_share = _openness(distance, x, normal)
    brightness = open_share * (0.3 + 0.25 * sky + 0.55 * diffuse)
    return (brightness.unsqueeze(-1) * x.new_tensor(COLOR) + 0.1 * (open_share * shine).unsqueeze(-1)).clamp(0, 1)


def _openness(distance: Distance, x: Tensor, normal: Tensor) -> Tensor:
    """How much of the sky is seen from x [N, 3], in [0, 1]: by the distances above it, which other parts shorten."""
    shade = torch.zeros_like(x[:, 0])
    for k in range(1, 5):
        height = REACH * k / 4
        shade += (height - distance((x + height * normal).clamp(0, 1))).clamp(min=0) / height * 0.5**k
    return (1 - 0.9 * shade).clamp(0, 1)
