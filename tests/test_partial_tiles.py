# SPDX-License-Identifier: MIT
"""The modulated MLP on the CPU takes points by tiles: in one that is not full they get what they get in a full one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import camkernels
from camkernels import testing
from conftest import backends

pytestmark = pytest.mark.skipif("cpu" not in backends("modulated_mlp"), reason="there are no CPU kernels")
WIDTHS = {"few columns": (48, 64, 3), "odd": (7, 33, 20), "skip": (32, 40, 5)}


def per_point(points: int, widths: tuple[int, int, int], skips: tuple[int, ...]) -> list[Tensor]:
    """Value, gradients in x and modulation, and their second derivatives in x."""
    torch.manual_seed(0)
    n, width, out = widths
    weights = [torch.randn(width, n), torch.randn(width, width), torch.randn(out, width + n * len(skips))]
    weights = [(w / w.shape[1] ** 0.5).requires_grad_() for w in weights]
    x, modulation, ct = (torch.randn(200, *shape)[:points].clone() for shape in [(n,), (2, 2), (out,)])
    x.requires_grad_(), modulation.requires_grad_()
    y = camkernels.modulated_mlp(
        x, weights, modulation=modulation, norm="point", activation="tanh", skips=skips, backend="cpu"
    )
    gradients = torch.autograd.grad(y, [x, modulation], ct, create_graph=True)
    (second,) = torch.autograd.grad(gradients[0].square().sum(), x)
    return [t.detach() for t in (y, *gradients, second)]


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("points", [1, 11, 13, 31, 33, 95, 97, 109])
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_tile_that_is_not_full(widths: str, points: int, rounded: bool) -> None:
    with testing.bfloat16(rounded):
        skips = (1,) if widths == "skip" else ()
        some, every = (per_point(n, WIDTHS[widths], skips) for n in (points, 200))
    for found, wanted in zip(some, every, strict=True):
        assert torch.equal(found, wanted[:points])
