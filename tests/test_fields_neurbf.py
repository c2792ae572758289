# SPDX-License-Identifier: MIT
"""NeuRBF's fields: the public code's recorded results, kernels placed where the data are, and what is refused."""

import pytest
import torch

from camkernels import testing
from camkernels.fields import NeuRBFField, NeuRBFImageField
from camkernels.fields.neurbf import affordable_kernels, hash_grid_parameters

NAMES = testing.golden_names("neurbf_field__image")


def field_of(golden):
    """The field of a fixture's arguments."""
    hyper = golden.hyper
    kind, form = hyper["kind"].split("_")
    return NeuRBFField(
        hyper["half_extent_xy"], hyper["out"], hyper["n_kernel"], neighbors=hyper["K"], features=hyper["F"], kind=kind,
        shape={"a": "full", "s": "isotropic"}[form], normalize=hyper["normalize"], feature_waves=hyper["rbf_freq"],
        n_levels=hyper["levels"], n_features_per_level=hyper["level_dim"], base_resolution=hyper["base_resolution"],
        log2_hashmap_size=hyper["log2_hashmap_size"], finest_resolution=hyper["desired_resolution"],
        width=hyper["hidden"], hidden_layers=hyper["num_layers"] - 1, decoder_waves=hyper["layer0_freq"],
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["best", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, dtype, backend, monkeypatch):
    monkeypatch.setenv("CAMKERNELS_BACKEND", "" if backend == "best" else backend)
    golden = testing.load_golden(name)
    field = field_of(golden).to(dtype).requires_grad_()
    state = {key[2:]: golden.tensor(key) for key in golden.arrays if key.startswith("p.")}
    field.load_official(state | {"hg0.offsets": golden.tensor("aux.hg0.offsets")})
    position = golden.tensor("in.x", dtype)
    x = (position / field.half_extent + 1) / 2
    x.requires_grad_()
    neighbors = field.nearest(x)
    assert torch.equal(neighbors, golden.tensor("aux.idx"))
    y = field(x, neighbors)
    assert y.dtype == dtype and torch.equal(y, field(x))
    (golden.tensor("ct.y", dtype) * y).sum().backward()
    own = field.state_dict() | {key: p.grad for key, p in field.named_parameters()}
    results = {f"g.p.{key}": view for key, view in field.official_views(own).items()}
    results |= {"out.y": y, "g.in.x": x.grad / (2 * field.half_extent)}
    assert set(results) == {key for key in golden.arrays if key.startswith(("out.", "g."))}
    for key, result in results.items():
        testing.assert_close_golden(result, golden, key, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_golden_behind_the_recorded_hash_features(name, monkeypatch):
    golden = testing.load_golden(name)
    field = field_of(golden).double()
    field.load_official({key[2:]: golden.tensor(key) for key in golden.arrays if key.startswith("p.")})
    monkeypatch.setattr(field.grid, "forward", lambda x: golden.tensor("aux.hash_features"))
    y = field((golden.tensor("in.x") / field.half_extent + 1) / 2)
    testing.assert_close(y, golden.tensor("out.y"), rtol=1e-9, atol=1e-9)


# ---- numbers of parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, reference, kernels, trained",
    [
        ((8000, 8000), 61_435_779, 795_365, 57_459_000),
        ((3734, 6114), 37_132_339, 498_231, 34_641_000),
        ((2040, 1356), 4_905_747, 76_153, 4_525_000),
        ((256, 256), 142_755, 2_776, 128_900),
    ],
)
def test_parameters_of_the_published_pictures(size, reference, kernels, trained):
    finest = max(size) // 2
    assert hash_grid_parameters(2, 3, 24, 16, finest) == reference
    with torch.device("meta"):
        field = NeuRBFImageField(size=size)
    assert field.config["kernels"] == kernels
    assert sum(p.numel() for p in field.parameters() if p.requires_grad) == pytest.approx(trained, abs=1000)


@pytest.mark.parametrize(
    "log2_size, kernels, trained",
    [(12, 3_275, 124e3), (13, 6_347, 235e3), (14, 12_280, 448e3), (15, 23_600, 856e3), (16, 44_899, 1.62e6)],
)
def test_parameters_of_the_published_shapes(log2_size, kernels, trained):
    options = {"features": 16, "kind": "nlin", "shape": "isotropic", "n_levels": 16, "n_features_per_level": 1}
    options |= {"log2_hashmap_size": log2_size, "finest_resolution": 2048}
    budget = hash_grid_parameters(3, 1, log2_size, 16, 2048)
    assert affordable_kernels(budget, (1, 1, 1), 1, **options) == kernels
    with torch.device("meta"):
        field = NeuRBFField((1, 1, 1), 1, kernels, neighbors=8, **options)
    assert sum(p.numel() for p in field.parameters() if p.requires_grad) == pytest.approx(trained, rel=5e-3)


@pytest.mark.parametrize("parameters", [20_000, 100_000, 250_000, 400_000, 900_000])
def test_parameters_given_are_spent_and_not_exceeded(parameters):
    with torch.device("meta"):
        field = NeuRBFImageField(size=(640, 400), n_levels=8, parameters=parameters)
    kernel = sum(tensor[0].numel() for tensor in (field.basis.centers, field.basis.shapes, field.basis.features))
    assert parameters - kernel < sum(p.numel() for p in field.parameters()) <= parameters
    assert "parameters" not in field.config
    finest, log2_size = field.config["finest_resolution"], field.config["log2_hashmap_size"]
    room = 0.85 * (parameters - sum(p.numel() for p in field.decoder.parameters()))
    options = {"size": (640, 400), "n_levels": 8, "kernels": 4}
    larger = {"log2_hashmap_size": log2_size + 1} if finest == 480 else {"log2_hashmap_size": 24}
    with torch.device("meta"):
        finer = NeuRBFImageField(**options, **larger, finest_resolution=finest + (log2_size == 24))
    assert field.grid.table.numel() <= room
    assert finest == 320 or finer.grid.table.numel() > room
    assert (log2_size == 24) == (finest == 320 or finest < 640 / 3)


def test_a_finest_resolution_given_beside_parameters_stays():
    with torch.device("meta"):
        field = NeuRBFImageField(size=(640, 400), finest_resolution=64, parameters=100_000)
    assert field.config["finest_resolution"] == 64 and field.config["kernels"] > 2000


def test_parameters_without_room_and_beside_kernels_are_refused():
    with pytest.raises(ValueError, match="NeuRBFImageField: 2000 parameters have no room for a kernel"):
        NeuRBFImageField(parameters=2000)
    with pytest.raises(ValueError, match="kernels and parameters were both given"):
        NeuRBFImageField(parameters=100_000, kernels=5)


# ---- kernels where the picture changes -------------------------------------------------------------------------------


def edge_picture():
    """Dark left of a vertical edge, light right of it."""
    picture = torch.zeros(24, 32, 3)
    picture[:, 20:] = 1
    return picture


def adapted(picture, seed=0, **options):
    torch.manual_seed(0)
    field = NeuRBFImageField(size=(picture.shape[1], picture.shape[0]), **options)
    field.adapt(picture, generator=torch.Generator().manual_seed(seed))
    return field


def test_kernels_stand_at_an_edge_and_are_narrow_across_it():
    field = adapted(edge_picture(), kernels=6)
    across, along = field.basis.centers.unbind(-1)
    assert torch.allclose(across, field.positions(torch.tensor([20 / 32, 0.5]))[0], atol=0.5 / 64)
    assert along.std() > 0.08
    shapes = field.basis.shapes.unflatten(-1, (2, 2))
    assert (shapes[:, 0, 0] > 2 * shapes[:, 1, 1]).all()


def test_kernels_are_the_same_under_the_same_seed_and_others_under_another():
    picture = torch.rand(24, 32, 1, generator=torch.Generator().manual_seed(3))
    one, same, other = (adapted(picture, seed, channels=1, kernels=20) for seed in (1, 1, 2))
    assert torch.equal(one.basis.centers, same.basis.centers) and torch.equal(one.basis.shapes, same.basis.shapes)
    assert not torch.equal(one.basis.centers, other.basis.centers)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 3), (9, 16)])
def test_a_picture_without_edges_has_kernels_all_over(height, width):
    field = adapted(torch.full((height, width, 3), 0.5))
    assert field.basis.centers.unique(dim=0).shape == field.basis.centers.shape
    assert field(torch.rand(5, 2)).isfinite().all()


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"NeuRBFImageField: picture must have shape \[24, 32"):
        NeuRBFImageField(size=(32, 24), kernels=5).adapt(torch.rand(32, 24, 3))


def test_rates_fall_by_half_a_cosine():
    field = NeuRBFImageField(size=(32, 24), kernels=5)
    assert [field.decay(done) for done in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.505, 0.01])
    sizes = {group["lr"]: sum(p.numel() for p in group["params"]) for group in field.parameter_groups(0.01)}
    decoder = sum(p.numel() for p in field.decoder.parameters())
    features = field.basis.features.numel() + field.bias.numel()
    assert sizes == {0.01: decoder + features, 0.04: field.grid.table.numel()}


# ---- the public code's state -----------------------------------------------------------------------------------------


def official_state(field):
    return {name: view.clone() for name, view in field.official_views(field.state_dict()).items()}


def test_constants_of_the_public_state_are_compared_or_left_out():
    field, other = (NeuRBFImageField(size=(32, 24), kernels=5) for _ in range(2))
    constants = {"a0": torch.ones(1), "cmin_gpu": torch.zeros(2), "k_dims_0": torch.ones(2), "kci0": torch.ones(2)}
    constants |= {"cmax_gpu": torch.tensor([24 / 128, 32 / 128])}
    other.load_official(official_state(field) | constants)
    assert torch.equal(other.grid.table, field.grid.table) and torch.equal(other.bias, field.bias)
    for wrong in ({"cmax_gpu": torch.tensor([32 / 128, 24 / 128])}, {"hg0.offsets": torch.tensor([0, 8, 16])}):
        with pytest.raises(ValueError, match=f"load_official: {next(iter(wrong))} must be"):
            other.load_official(official_state(field) | wrong)
