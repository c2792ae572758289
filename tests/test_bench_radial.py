# SPDX-License-Identifier: MIT
"""The benchmark's radial-basis cases: what they are, that every provider computes them, what work they count."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import camkernels

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "run.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import cases, providers, radial_basis_cases, worker  # noqa: E402

TINY = 60
NAMES = ("2d-k4-f32-20k", "3d-k8-f32-100k", "2d-k10-f64-100k")


@pytest.fixture(params=NAMES)
def case(request):
    """A case of 60 points and 500 kernels."""
    kernels = dataclasses.replace(radial_basis_cases.KERNELS[request.param], count=500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(radial_basis_cases.KERNELS, request.param, kernels)
        (made,) = (c for c in radial_basis_cases.make() if c.name == f"radial_basis/{request.param}/float32/n14")
    return dataclasses.replace(made, points=TINY)


def test_cases_cover_what_is_promised():
    found = {c.name for c in cases.all_cases() if c.op == "radial_basis"}
    assert found == {f"radial_basis/{name}/float32/n{size}" for name in NAMES for size in (14, 17, 20)}
    assert tuple(radial_basis_cases.KERNELS) == NAMES


def test_neighbors_are_the_nearest_also_of_other_points(case):
    inputs = case.inputs()
    for points in (inputs, case.new_points(5)):
        distances = (points["x"].double().unsqueeze(1) - inputs["centers"].double()).norm(dim=-1)
        wanted = distances.topk(case.facts["neighbors"], largest=False).indices
        assert torch.equal(points["neighbors"].long(), wanted)


def test_kernels_are_positive_and_values_of_order_one(case):
    inputs = case.inputs()
    dims = case.facts["dims"]
    matrices = inputs["shapes"].unflatten(-1, (dims, dims))
    assert torch.equal(matrices, matrices.mT) and (torch.linalg.eigvalsh(matrices) > 0).all()
    y = camkernels.reference.radial_basis(**inputs, **case.options())
    assert y.shape == (TINY, case.facts["features"]) and 0.3 < y.std() < 3


@pytest.mark.parametrize("provider", ["cpu", "eager"])
def test_providers_compute_what_the_reference_computes(case, provider):
    source = providers.find(provider)
    for task in case.passes.values():
        if source.missing(case, task, "cpu"):
            pytest.skip(source.missing(case, task, "cpu"))
        assert worker.check_sample(case, task, source, case.inputs(), "cpu") is None


def test_a_basis_with_other_neighbours_is_found_out(case):
    task = case.passes["fb-features"]

    def wrong(neighbors, **inputs):
        return camkernels.radial_basis(neighbors=neighbors.roll(1, 0), **inputs, **case.options())

    source = providers.Provider("wrong", "", lambda *of: providers.TorchTask(wrong, task), lambda *of: None)
    assert "disagrees in value" in worker.check_sample(case, task, source, case.inputs(), "cpu")


def test_floors_grow_with_the_work(case):
    floors = [case.floor(task) for task in case.passes.values()]
    for what in ("memory", "flops"):
        numbers = [getattr(found, what) for found in floors]
        assert numbers == sorted(set(numbers))
    counts = [sum(count for _, count in found.lookups) for found in floors]
    neighbors = case.facts["neighbors"]
    assert counts == [3 * neighbors, 4 * neighbors, 6 * neighbors]
