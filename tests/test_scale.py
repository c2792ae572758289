# SPDX-License-Identifier: MIT
"""Large calls are small calls side by side: many points, several chunks, tables beyond 2^31 numbers, flat memory."""

import gc
from pathlib import Path

import pytest
import torch

import camkernels
from camkernels import testing
from conftest import backends, function_of

HERE = [b for b in backends("hash_grid") if b != "reference"]
MILLIONS = 10_000_000


def tables(geometry, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(geometry.n_entries, geometry.n_features_per_level, generator=generator) * 2 - 1).to(dtype)


# ---- many points -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize(("dims", "features"), [(1, 1), (2, 2), (3, 2)])
def test_ten_million_points_in_one_call(dims, features, backend):
    geometry = camkernels.GridGeometry.build(dims, 2, features, 10, base_resolution=8, per_level_scale=2.0)
    x = torch.rand(MILLIONS, dims, generator=torch.Generator().manual_seed(1)).requires_grad_(dims == 3)
    table = tables(geometry).requires_grad_()
    y = function_of("hash_grid", backend)(x, table, geometry)
    rows = torch.cat([torch.randint(0, MILLIONS, (2000,)), torch.tensor([0, MILLIONS // 2, MILLIONS - 1])])
    few = x.detach()[rows].requires_grad_()
    expected = camkernels.reference.hash_grid(few, table, geometry)
    testing.assert_close(y[rows].detach(), expected.detach(), rtol=2e-6, atol=2e-6)
    y.sum().backward()
    if x.requires_grad:
        slope = torch.autograd.grad(expected.sum(), few)[0]
        testing.assert_close(x.grad[rows], slope, rtol=1e-5, atol=1e-5)
    # every point spreads a weight of 1 over each level
    for level in range(2):
        total = table.grad[geometry.offsets[level] : geometry.offsets[level + 1]].double().sum(0)
        torch.testing.assert_close(total, torch.full_like(total, MILLIONS), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("features", [2, 3])
def test_gradients_larger_than_a_cache_are_those_of_small_calls(features, backend):
    geometry = camkernels.GridGeometry.build(2, 16, features, 10, base_resolution=8, per_level_scale=1.4)
    generator = torch.Generator().manual_seed(1)
    # 128 or 192 bytes each: more than 1 MiB for each of up to eight threads
    x = torch.rand(98_765, 2, generator=generator).requires_grad_()
    table = tables(geometry).requires_grad_()
    ct = torch.randn(x.shape[0], geometry.output_dim, generator=generator)

    def gradients(x, ct):
        return torch.autograd.grad(function_of("hash_grid", backend)(x, table, geometry), (x, table), ct)

    slopes, total = gradients(x, ct)
    parts = zip(x.detach().split(4000), ct.split(4000), strict=True)
    small = [gradients(part.requires_grad_(), c) for part, c in parts]
    assert torch.equal(slopes, torch.cat([s for s, _ in small]))
    testing.assert_close(total, torch.stack([t.double() for _, t in small]).sum(0).float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("norm", [None, "point"])
@pytest.mark.parametrize("width", [128, 120])
@pytest.mark.parametrize("backend", [b for b in backends("modulate") if b != "reference"])
def test_modulated_rows_written_past_the_caches_are_those_of_small_calls(backend, width, norm):
    """32 MiB and more, whose rows are whole packs of lanes or not, to second order; the gradients' own too."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(70_000, width, generator=generator) for _ in range(5)]  # h, gamma, beta, two cotangents

    def results(h, gamma, beta, ct, along):
        inputs = [t.requires_grad_() for t in (h, gamma, beta)]
        ct = ct.requires_grad_()
        y = function_of("modulate", backend)(*inputs, norm=norm, activation="silu")
        slopes = torch.autograd.grad(y, inputs, ct, create_graph=True)
        return [y, *slopes, *torch.autograd.grad(slopes[0], [*inputs[:2], ct], along)]

    whole = results(*(t.clone() for t in tensors))
    parts = [results(*(t.clone() for t in part)) for part in zip(*(t.split(20_000) for t in tensors), strict=True)]
    for found, *small in zip(whole, *parts, strict=True):
        assert torch.equal(found, torch.cat(small))


@pytest.mark.slow
@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_chunks_equal_one_after_the_other(backend, dtype):
    geometry = camkernels.GridGeometry.build(2, 8, 16, 10, base_resolution=8, per_level_scale=1.4)
    n = 150_001  # 512 bytes of scratch a point and three times that for the Jacobian; a chunk may take 40 MiB
    x = torch.rand(n, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    table = tables(geometry, dtype).requires_grad_()
    function = function_of("hash_grid", backend)
    ct = torch.randn(1, geometry.output_dim, generator=torch.Generator().manual_seed(2)).to(dtype)

    def total(part):
        y, jacobian = function(part, table, geometry, return_jacobian=True)
        return (y * ct).sum().double() + jacobian.square().sum(dtype=torch.float64) * 1e-3

    whole = torch.autograd.grad(total(x), (x, table))
    parts = [part.clone().requires_grad_() for part in x.detach().split(10_000)]
    pieces = [torch.autograd.grad(total(part), (part, table)) for part in parts]
    assert torch.equal(whole[0], torch.cat([piece[0] for piece in pieces]))
    summed = sum(piece[1].double() for piece in pieces)
    rtol = 1e-4 if dtype == torch.float32 else 1e-2  # every piece rounds its own sums
    testing.assert_close(whole[1].double(), summed, rtol=rtol, atol=rtol)
    y = function(x, table, geometry).detach()
    assert torch.equal(y, torch.cat([function(part, table, geometry).detach() for part in x.split(10_000)]))


@pytest.mark.parametrize("backend", HERE)
def test_several_chunks_in_second_order(backend):
    geometry = camkernels.GridGeometry.build(2, 8, 16, 8, base_resolution=8, per_level_scale=1.4)
    x = torch.rand(120_001, 2, generator=torch.Generator().manual_seed(1))
    table = tables(geometry).requires_grad_()
    function = function_of("hash_grid", backend)

    def steepness(part):
        (slope,) = torch.autograd.grad(function(part, table, geometry).sin().sum(), part, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (part, table))

    whole = steepness(x.clone().requires_grad_())
    pieces = [steepness(part.clone().requires_grad_()) for part in x.split(20_000)]
    testing.assert_close(whole[0], torch.cat([piece[0] for piece in pieces]), rtol=1e-6, atol=1e-6)
    testing.assert_close(whole[1], sum(piece[1] for piece in pieces), rtol=1e-4, atol=1e-4)


# ---- borders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["tcnn", "torch-ngp", "nerfstudio"])
@pytest.mark.parametrize("backend", HERE)
def test_points_on_the_upper_border(backend, convention):
    for dims in (1, 2, 3, 4):
        geometry = camkernels.GridGeometry.build(
            dims, 3, 2, 12, base_resolution=4, per_level_scale=1.5, convention=convention
        )
        corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * dims).reshape(-1, dims)
        x = corners.repeat(40, 1)
        table = tables(geometry)
        results = []
        for f in (function_of("hash_grid", backend), camkernels.reference.hash_grid):
            leaves = x.clone().requires_grad_(), table.clone().requires_grad_()
            y = f(*leaves, geometry)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        for a, b in zip(*results, strict=True):
            assert a.isfinite().all()
            testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [b for b in HERE if b == "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_beyond_two_to_the_31(backend, dtype):
    last = 3 * 2**29  # vertices of the second level; together the levels have 2^31 + 2^30 + ... rows
    geometry = camkernels.GridGeometry.build(1, 2, 1, 30, kind="dense", resolutions=[last, last])
    assert geometry.n_entries > 1 << 31
    try:
        table = torch.empty(geometry.n_entries, 1, dtype=dtype)  # of which the pages that are touched come to exist
    except RuntimeError:
        pytest.skip(f"this machine promises no {geometry.n_entries * 2 / 2**30:.0f} GiB of virtual memory")
    rows = torch.tensor([0, 1, 2**30 + 5, last - 2])
    x = ((rows.double() + 0.25 - geometry.shift) / geometry.scales[0][0]).unsqueeze(1).clamp(0, 1)
    position = x * geometry.scales[0][0] + geometry.shift
    cell, t = position.floor().long(), position - position.floor()
    for level in range(2):
        start = geometry.offsets[level]
        table[start + cell.flatten()] = (torch.arange(4).to(dtype) + 1 + 10 * level).unsqueeze(1)
        table[start + cell.flatten() + 1] = (torch.arange(4).to(dtype) + 2 + 10 * level).unsqueeze(1)
    # rows 0 and 1 are neighbours: read what they ended up with
    lower, upper = (torch.cat([table[geometry.offsets[i] + cell[:, 0] + k] for i in (0, 1)], 1) for k in (0, 1))
    expected = (1 - t) * lower.double() + t * upper.double()
    y = function_of("hash_grid", backend)(x, table, geometry)
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=0)
    assert y[3, 1] > 13  # of the row behind 2^31


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("backend", HERE)
def test_memory_is_flat_over_a_thousand_steps(backend):
    layer = camkernels.HashGrid(dims=2, n_levels=4, log2_hashmap_size=10, backend=backend, init_scale=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x = torch.rand(500, 2)
    sizes = []
    for step in range(1001):
        optimizer.zero_grad()
        points = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(points).sum(), points, create_graph=True)
        (layer(x).square().mean() + slope.square().mean()).backward()
        optimizer.step()
        if step % 250 == 0:
            gc.collect()
            sizes.append(resident_bytes())
    assert sizes[-1] - sizes[1] < 4 << 20, sizes
