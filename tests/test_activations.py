# SPDX-License-Identifier: MIT
"""Activations and their derivatives as the kernels compute them, against autograd of the definition."""

import numpy as np
import pytest
import torch

from camkernels._modulation import ACTIVATIONS
from camkernels.reference.modulated_mlp import ACTIVATIONS as DEFINITIONS

RATE = 3.75  # times a number of 11 bits: exact in float32
GRID = np.concatenate([np.linspace(-12, 12, 4096), np.linspace(-110, 95, 1024), np.geomspace(1e-6, 1, 512), [0.0] * 16])
FLOAT32 = 1e-6  # of the result and of what is subtracted in it: a few roundings


def expected(name, z):
    """(f, f', f'') in float64."""
    z = torch.from_numpy(z).double().requires_grad_()
    value = DEFINITIONS[name](z, RATE, torch.tensor(RATE, dtype=torch.float64))
    first = torch.autograd.grad(value.sum(), z, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), z)[0] if first.requires_grad else torch.zeros_like(z)
    return [t.detach().numpy() for t in (value, first, second)]


def terms(name, z, wanted):
    """Size of the terms in a sum, whose rounding remains where they cancel."""
    order = [1, RATE, RATE**2] if "sine" in name else [np.abs(z), 1, 1]
    return [np.abs(w) + o + 1e-30 for w, o in zip(wanted, order, strict=True)]


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)), ids=map(str, ACTIVATIONS))
def test_in_float64(probe, lanes_probe, kind):
    z = GRID[np.abs(GRID) < 90]
    z = z[: len(z) // 8 * 8]
    wanted = expected(ACTIVATIONS[kind], z)
    for found in (probe.activation(kind, RATE, z), lanes_probe.lanes_activation_double(kind, RATE, z)):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)), ids=map(str, ACTIVATIONS))
def test_in_float32(probe, lanes_probe, kind):
    name = str(ACTIVATIONS[kind])
    z = (GRID.astype(np.float16) if "sine" in name else GRID).astype(np.float32)
    z = z[np.abs(z) < 80] if name == "exponential" else z
    z = z[: len(z) // 16 * 16]
    wanted = expected(ACTIVATIONS[kind], z)
    for found in (probe.activation_float(kind, RATE, z), lanes_probe.lanes_activation(kind, RATE, z)):
        for a, b, size in zip(found, wanted, terms(name, z, wanted), strict=True):
            assert np.abs(a - b).max() < np.inf
            worst = (np.abs(a - b) / size).argmax()
            assert (np.abs(a - b) <= FLOAT32 * size).all(), (z[worst], a[worst], b[worst])


def test_waves_keep_their_phase(lanes_probe):
    sine = ACTIVATIONS.index("sine")
    z = np.concatenate([np.linspace(-5e3, 5e3, 4096), np.geomspace(1e3, 9e8, 256), [3e9, -1e20, 2.0**30, 1e38] * 4])
    z = z.astype(np.float32)
    value, first, _ = lanes_probe.lanes_activation(sine, 1.0, z)
    np.testing.assert_allclose(value, np.sin(z.astype(np.float64)), rtol=0, atol=1.5e-7)
    np.testing.assert_allclose(first, np.cos(z.astype(np.float64)), rtol=0, atol=1.5e-7)


@pytest.mark.parametrize("kind", range(len(ACTIVATIONS)), ids=map(str, ACTIVATIONS))
def test_what_is_not_finite_is_as_in_pytorch(lanes_probe, kind):
    z = np.array([np.nan, np.inf, -np.inf, 3e38] * 4, np.float32)
    value = lanes_probe.lanes_activation(kind, 1.0, z)[0]
    ways = []  # PyTorch's own float32 depends on its instruction set: with AVX-512 its gelu of 3e38 is infinite
    for dtype in (torch.float32, torch.float64):
        wanted = DEFINITIONS[ACTIVATIONS[kind]](torch.from_numpy(z).to(dtype), 1.0, torch.tensor(1.0)).float().numpy()
        ways.append(np.isclose(value, wanted, rtol=1e-6, atol=1.5e-7, equal_nan=True))
    assert np.logical_or(*ways).all(), (value, wanted)
