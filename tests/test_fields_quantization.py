# SPDX-License-Identifier: MIT
"""Fields that learn rounded parameters compute what fields of those parameters do."""

import pytest
import torch

from camkernels.fields import MipNeRFField, VideoField


def test_a_quantised_video():
    torch.manual_seed(6)
    field = VideoField((2, 3), 8, (2, 1, 2), (4, 6), nodes=5, lower_width=4, bits=6).double()

    def quantised(p, n):
        w = torch.tanh(p.detach())
        return torch.floor(w.abs() * n) / n * w.sign()

    rounded = VideoField(**(field.config | {"bits": 32})).double()
    heads = {id(p) for head in (field.head, field.aggregation_head) for p in head.parameters()}
    with torch.no_grad():
        for p, q in zip(field.parameters(), rounded.parameters(), strict=True):
            q.copy_(quantised(p, 127 if id(p) in heads else 31))
    assert rounded.blocks[0].modulation.grids[:, 0].unique().tolist() == pytest.approx([0.742], abs=1e-3)
    times = torch.tensor([0.0, 0.31, 0.77], dtype=torch.float64)
    found, expected = field(times), rounded(times)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))
    for model, ys in ((field, found), (rounded, expected)):
        model.zero_grad()
        sum(y.square().sum() for y in ys).backward()
    for p, q in zip(field.parameters(), rounded.parameters(), strict=True):  # straight through, but for the tanh
        assert torch.allclose(p.grad, q.grad * (1 - torch.tanh(p) ** 2), atol=1e-10)


def test_a_quantised_ray_network_rounds_weights_and_grids_but_no_bias():
    torch.manual_seed(7)
    options = {"net_depth": 3, "net_width": 8, "net_width_condition": 4}
    field, rounded = (MipNeRFField(9, 5, **options, bits=bits).double() for bits in (8, 32))
    with torch.no_grad():
        for p, q in zip(field.parameters(), rounded.parameters(), strict=True):
            torch.nn.init.normal_(p)
            scale = p.abs().max() / 127
            q.copy_(p if p.ndim == 1 else torch.round(p / scale) * scale)
    given = torch.rand(4, 6, 9).double(), torch.randn(4, 3).double(), torch.rand(4, 5).double()
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(field(*given), rounded(*given), strict=True))
