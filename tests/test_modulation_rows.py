# SPDX-License-Identifier: MIT
"""coordinate_modulation where rows of numbers fill whole packs of SIMD lanes, and where a point has no row at all."""

import pytest
import torch

from camkernels import testing
from conftest import backends, definition_of, device_of, function_of

OP = "coordinate_modulation"
ROWS = {"8": (4, None), "16": (2, 4), "24": (3, 4), "64": (4, 8)}  # numbers of a row: layers, channels


def drawn(numbers: str, combine: str, dtype: torch.dtype, backend: str, points: int) -> testing.Call:
    generator = torch.Generator().manual_seed(points)
    layers, channels = ROWS[numbers]
    shape = (layers, 2, *([3] * (combine != "single")), *(() if channels is None else (channels,)), 5, 4)
    grids = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    coords = torch.rand(points, 2 + (combine != "single"), generator=generator, dtype=torch.float64) * 2.4 - 1.2
    inputs = {"coords": coords.to(dtype), "grids": grids.to(dtype)}
    return testing.Call({k: t.to(device_of(backend)) for k, t in inputs.items()}, {"combine": combine}, "coords")


@pytest.mark.parametrize("backend", [b for b in backends(OP) if b != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("combine", ["single", "plane_product"])
@pytest.mark.parametrize("numbers", ROWS)
def test_rows_of_whole_packs(numbers, combine, dtype, backend):
    call = drawn(numbers, combine, dtype, backend, points=37)  # the last block of points is not full
    found, wanted = (
        testing.evaluate(f(OP), call, order=2) for f in (lambda op: function_of(op, backend), definition_of)
    )
    testing.compare(testing.Case(OP, f"rows of {numbers}", None), call, found, wanted)


@pytest.mark.skipif("cpu" not in backends(OP), reason="there are no CPU kernels")
@pytest.mark.parametrize("numbers", ROWS)
def test_the_same_bits_for_two_threads(numbers, threads):
    call, function = drawn(numbers, "single", torch.float32, "cpu", points=9001), function_of(OP, "cpu")
    results = []
    for count in (1, 2):
        threads(count)
        results.append(testing.evaluate(function, call, order=2))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("backend", backends(OP))
@pytest.mark.parametrize("combine", ["single", "plane_product"])
def test_a_point_with_a_nan_coordinate_touches_no_node(combine, backend):
    call = drawn("8", combine, torch.float32, backend, points=37)
    coords, grids = call.inputs["coords"].clone(), call.inputs["grids"].requires_grad_()
    broken = torch.zeros(len(coords), dtype=torch.bool, device=coords.device)
    broken[3::5] = True
    coords[broken, -1] = float("nan")
    y = function_of(OP, backend)(coords, grids, combine=combine)
    assert y[broken].isnan().all() and y[~broken].isfinite().all()
    ct = torch.ones_like(y)
    ct[broken] = float("inf")
    (touched,) = torch.autograd.grad(y, grids, ct)
    alone = function_of(OP, backend)(coords[~broken], grids, combine=combine)
    (wanted,) = torch.autograd.grad(alone.sum(), grids)
    torch.testing.assert_close(touched, wanted, rtol=1e-5, atol=1e-5)
