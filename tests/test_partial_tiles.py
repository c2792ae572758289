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
NETWORKS = {  # widths, skips, activation
    "few columns": ((48, 64, 64, 3), (), "tanh"),
    "in registers": ((48, 64, 16, 32, 3), (), "relu"),
    "odd": ((7, 33, 33, 20), (), "tanh"),
    "skip": ((32, 40, 40, 5), (1,), "tanh"),
    "uneven": ((32, 64, 33, 64, 5, 20), (0, 2), "tanh"),
}


def per_point(points: int, widths: tuple[int, ...], skips: tuple[int, ...], activation: str) -> list[Tensor]:
    """Value, gradients in x and modulation, and their second derivatives in x."""
    torch.manual_seed(0)
    n, *hidden, out = widths
    given = [n, *(width + n * (i in skips) for i, width in enumerate(hidden))]
    weights = [torch.randn(o, i).div(i**0.5).requires_grad_() for o, i in zip((*hidden, out), given, strict=True)]
    x, modulation, ct = (torch.randn(200, *shape)[:points].clone() for shape in [(n,), (len(hidden), 2), (out,)])
    x.requires_grad_(), modulation.requires_grad_()
    y = camkernels.modulated_mlp(
        x, weights, modulation=modulation, norm="point", activation=activation, skips=skips, backend="cpu"
    )
    gradients = torch.autograd.grad(y, [x, modulation], ct, create_graph=True)
    (second,) = torch.autograd.grad(gradients[0].square().sum(), x)
    return [t.detach() for t in (y, *gradients, second)]


@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("points", [1, 11, 13, 31, 33, 95, 97, 109])
@pytest.mark.parametrize("recompute", ["0", "1"])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_tile_that_is_not_full(
    network: str, recompute: str, points: int, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAMKERNELS_RECOMPUTE", recompute)
    with testing.bfloat16(rounded):
        some, every = (per_point(n, *NETWORKS[network]) for n in (points, 200))
    for found, wanted in zip(some, every, strict=True):
        assert torch.equal(found, wanted[:points])
