# SPDX-License-Identifier: MIT
"""Fields of signed distances: the public code's recorded results, kernels placed at a surface, configurations."""

from __future__ import annotations

import pytest
import torch

from camkernels import testing
from camkernels.fields import SHAPE_MODELS, NeuRBFSDFField

SMALL = {"n_levels": 4, "finest_resolution": 32, "log2_hashmap_size": 10, "width": 16}


def official_field(golden) -> NeuRBFSDFField:
    """The field of a fixture's arguments."""
    hyper = golden.hyper
    return NeuRBFSDFField(
        hyper["n_kernel"], hyper["K"], hyper["F"], hyper["levels"], hyper["level_dim"], hyper["log2_hashmap_size"],
        hyper["base_resolution"], hyper["desired_resolution"], hyper["hidden"], hyper["num_layers"] - 1,
        hyper["rbf_freq"], hyper["layer0_freq"],
    )  # fmt: skip


def samples(count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of the unit cube and their distances to a sphere of radius 0.3, half of them on it."""
    x = torch.rand(count, 3, generator=torch.Generator().manual_seed(0))
    x[::2] = 0.5 + 0.3 * torch.nn.functional.normalize(x[::2] - 0.5, dim=-1)
    return x, (x - 0.5).norm(dim=-1) - 0.3


@pytest.mark.parametrize("backend", ["best", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden(dtype, backend, monkeypatch):
    monkeypatch.setenv("CAMKERNELS_BACKEND", "" if backend == "best" else backend)
    golden = testing.load_golden("neurbf_field__sdf_nlin_s")
    field = official_field(golden).to(dtype).requires_grad_()
    state = {key[2:]: golden.tensor(key) for key in golden.arrays if key.startswith("p.")}
    field.load_official(state | {"hg0.offsets": golden.tensor("aux.hg0.offsets")})
    x = ((golden.tensor("in.x", dtype) + 1) / 2).requires_grad_()
    assert torch.equal(field.nearest(x), golden.tensor("aux.idx"))
    y = field(x)
    (golden.tensor("ct.y", dtype) * y).sum().backward()
    own = field.state_dict() | {key: p.grad for key, p in field.named_parameters()}
    results = {f"g.p.{key}": view for key, view in field.official_views(own).items()}
    results |= {"out.y": y, "g.in.x": x.grad / 2}
    assert set(results) == {key for key in golden.arrays if key.startswith(("out.", "g."))}
    for key, result in results.items():
        testing.assert_close_golden(result, golden, key, dtype)


@pytest.mark.parametrize("name", SHAPE_MODELS)
def test_a_field_is_built_again_from_its_configuration(name):
    field = SHAPE_MODELS[name](**SMALL)
    again = SHAPE_MODELS[name](**field.config)
    again.load_state_dict(field.state_dict())
    x = torch.rand(5, 2, 3)
    assert torch.equal(field(x), again(x)) and field(x).shape == (5, 2, 1)
    grouped = [p for group in field.parameter_groups(1e-3) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in field.parameters() if p.requires_grad}


def test_kernels_stand_at_the_surface_and_are_as_wide_as_they_are_apart():
    x, distances = samples()
    field = NeuRBFSDFField(kernels=200, **SMALL)
    field.adapt(x, distances, generator=torch.Generator().manual_seed(1))
    centers = field.basis.centers
    assert (centers.norm(dim=-1) - 0.6).abs().median() < 0.02  # the cube from -1 to 1 has the sphere twice as large
    assert len(centers.unique(dim=0)) == 200
    spacing = torch.cdist(centers, centers).fill_diagonal_(9).amin(-1).median()
    assert 0.2 * spacing < 1 / field.basis.shapes.median() < 5 * spacing


def test_placement_follows_the_generator():
    x, distances = samples(1500)
    states = []
    for seed in (1, 1, 2):
        field = NeuRBFSDFField(kernels=50, **SMALL)
        field.adapt(x, distances, generator=torch.Generator().manual_seed(seed))
        states.append((field.basis.centers, field.basis.shapes))
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not torch.equal(states[0][0], states[2][0])


def test_the_public_choices_have_the_published_number_of_parameters():
    field = NeuRBFSDFField(kernels=23_600, finest_resolution=2048)
    trained = sum(p.numel() for p in field.parameters() if p.requires_grad)
    assert round(trained / 1e3) == 856
