# SPDX-License-Identifier: MIT
"""Fields with the parameters of the public codes give their recorded results; what they draw, save and refuse."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from camkernels import testing
from camkernels.fields import (
    MODELS,
    CAMImageField,
    DynamicRadianceField,
    FourierImageField,
    HashCAMField,
    HashImageField,
    MipNeRFField,
    NeuRBFImageField,
    NeuRBFSDFField,
    RadianceField,
    RandFourierFeature,
    RayModulation,
    SignalField,
    SinusoidalEncoder,
    TensoRFKernels,
    VideoField,
    parameter_groups,
    spherical,
)

SMALL = {"net_depth": 6, "net_width": 10, "net_width_condition": 8}
FIELDS = {
    "signal": lambda: SignalField(encoded=True, width=8),
    "fourier": lambda: FourierImageField(width=8, num_frequencies=4),
    "cam": lambda: CAMImageField(channels=1, width=8, num_frequencies=4, nodes=5),
    "position": lambda: RadianceField(**SMALL, resolution=(4, 5)),
    "time": lambda: RadianceField(**SMALL, modulated_by="time"),
    "plain": lambda: RadianceField(**SMALL, modulated_by=None),
    "dynamic": lambda: DynamicRadianceField(**SMALL),
    "neurbf": lambda: NeuRBFImageField(size=(32, 24), kernels=5, width=8),
    "neurbf shape": lambda: NeuRBFSDFField(kernels=9, finest_resolution=32, width=8),
    "ray": lambda: RayModulation((4, 3)),
    "mipnerf": lambda: MipNeRFField(9, 5, net_depth=5, net_width=8, net_width_condition=4),
    "video": lambda: VideoField((2, 3), 8, (5, 1, 2), (4, 6), nodes=5, lower_width=8, compact=True),
}


# ---- recorded results ------------------------------------------------------------------------------------------------


def encoder_buffers(golden):
    """The constants that the public state_dict holds beside the recorded parameters."""
    hyper = golden.hyper
    encoders = {
        "cam_1d_model": {"time_encoder": hyper.get("pe_degrees")},
        "cam_nerf_field": {"posi_encoder": hyper.get("pe_pos"), "view_encoder": hyper.get("pe_view")},
    }.get(golden.meta["op"], {})
    return {f"{k}.scales": torch.tensor([2**d for d in range(*v)]) for k, v in encoders.items() if v is not None}


def field_of(golden):
    """(field, names of its inputs, names of its outputs) for a fixture."""
    op, hyper = golden.meta["op"], golden.hyper
    sizes = {key: hyper[key] for key in ("net_depth", "net_width", "skip_layer", "net_width_condition") if key in hyper}
    if op == "cam_1d_model":
        return SignalField(encoded=hyper["pe_degrees"] is not None, width=hyper["hidden"]), "x", "y"
    if op == "cam_image_model":
        return CAMImageField(width=hyper["hidden"], num_frequencies=hyper["num_frequencies"]), ["coord"], ["y"]
    if op == "cam_nerf_field" and hyper["coord_dim"] == 3:
        return RadianceField(**sizes, resolution=hyper["grid"]), ["x", "dir"], ["rgb", "sigma"]
    if op == "cam_nerf_field":
        return RadianceField(**sizes, modulated_by="time"), ["x", "dir", "t"], ["rgb", "sigma"]
    if op == "mipnerf_affine":
        res = (hyper["res_azi"], hyper["res_ele"])
        return RayModulation(res, hyper["eps"], hyper["bits"]), ["x", "sph"], ["y"]
    if op == "mipnerf_mlp":
        return MipNeRFField(9, 5, **sizes), ["x", "viewdirs", "condition"], ["raw_rgb", "raw_density"]
    assert op == "cam_video_generator"
    size = [int(n) for n in hyper["fc_hw_dim"].split("_")]
    field = VideoField(
        size[:2], size[2], hyper["stride_list"], hyper["t_dim"], hyper["mod_dim"], lower_width=hyper["lower_width"],
        aggregations=hyper["aggs"],
    )  # fmt: skip
    return field, ["t"], ["head0", "head1"]


NAMES = [
    name
    for prefix in ("cam_1d_", "cam_image_model", "cam_nerf_field", "cam_video_generator", "mipnerf_")
    for name in testing.golden_names(prefix)
]


@pytest.mark.parametrize("backend", ["best", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, dtype, backend, monkeypatch):
    assert len(NAMES) == 10
    monkeypatch.setenv("CAMKERNELS_BACKEND", "" if backend == "best" else backend)
    golden = testing.load_golden(name)
    field, inputs, outputs = field_of(golden)
    field.to(dtype)
    state = {key[2:]: golden.tensor(key) for key in golden.arrays if key.startswith("p.")} | encoder_buffers(golden)
    if "aux.pos_enc.proj" in golden:
        state["pos_enc.proj"] = golden.tensor("aux.pos_enc.proj")
    field.load_official(state)
    given = {
        key: golden.tensor(f"in.{key}", dtype).requires_grad_(f"g.in.{key}" in golden) for key in inputs if key != "sph"
    }
    if "sph" in inputs:
        given["sph"] = spherical(golden.tensor("in.viewdirs", dtype))
        testing.assert_close_golden(given["sph"].T, golden, "aux.sph", dtype)
    found = field(*given.values())
    found = dict(zip(outputs, found if isinstance(found, tuple) else (found,), strict=True))
    loss = sum((golden.tensor(f"ct.{key}", dtype) * y).sum() for key, y in found.items())
    loss.backward()
    own = field.state_dict() | {key: p.grad for key, p in field.named_parameters()}
    gradients = {f"g.p.{key}": view for key, view in field.official_views(own).items()}
    gradients |= {f"g.in.{key}": x.grad for key, x in given.items() if x.requires_grad}
    results = {f"out.{key}": y for key, y in found.items()} | {k: g for k, g in gradients.items() if k in golden}
    assert set(results) == {key for key in golden.arrays if key.startswith(("out.", "g."))}
    for key, result in results.items():
        assert result.dtype == dtype
        testing.assert_close_golden(result, golden, key, dtype)


@pytest.mark.parametrize(
    "build, total, modulation",
    [
        (lambda: SignalField(False), 12_673, 0),
        (lambda: SignalField(False, True), 14_721, 0),
        (lambda: SignalField(True), 13_185, 512),
        (lambda: SignalField(True, True), 15_233, 512),
        (FourierImageField, 263_683, 0),
        (CAMImageField, 269_827, 6_144),
        (RadianceField, 13_178_756, 12_582_912),
        (DynamicRadianceField, 613_271, 80),
        (MipNeRFField, 613_220, 480),
        (VideoField, 12_473_309, 64_800),
        (
            lambda: VideoField(
                (9, 16), 48, (5, 3, 2, 2, 2), (300, 600), 30, expansion=8, lower_width=24, compact=True, aggregations=4
            ),
            11_352_809,
            44_640,
        ),
    ],
)  # fmt: skip
def test_parameter_counts_of_the_public_models(build, total, modulation):
    with torch.device("meta"):
        field = build()
    grids = [p for name, p in field.named_parameters() if {"grids", "gamma", "beta"} & set(name.split("."))]
    assert sum(p.numel() for p in field.parameters()) == total
    assert sum(p.numel() for p in grids) == modulation


# ---- parameters of the public codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", FIELDS.values(), ids=FIELDS)
def test_public_names_cover_every_tensor_and_load(build):
    torch.manual_seed(0)
    field, other = build(), build()
    for p in field.parameters():
        torch.nn.init.normal_(p)
    state = {name: view.clone() for name, view in field.official_views(field.state_dict()).items()}
    other.load_official(state)
    tensors = {name: t for name, t in field.state_dict().items() if torch.is_tensor(t)}
    assert all(torch.equal(t, other.state_dict()[name]) for name, t in tensors.items())
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in tensors.values())


def test_flax_parameters_load_as_a_tree_of_arrays():
    field = FIELDS["mipnerf"]()
    views = field.official_views(field.state_dict())
    tree = {}
    for name, view in views.items():
        layer, kind = name.split(".")
        tree.setdefault(layer, {})[kind] = (view + 1).numpy()
    before = {name: view.clone() for name, view in views.items()}
    field.load_official(tree)
    assert all(torch.equal(view, before[name] + 1) for name, view in views.items())


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    field = FIELDS["cam"]()
    state = {name: view + 1 for name, view in field.official_views(field.state_dict()).items()}
    before = copy.deepcopy(field.state_dict())
    with pytest.raises(ValueError, match=r"CAMImageField.load_official: the state lacks FC_1.affine;"):
        field.load_official({k: v for k, v in state.items() if k != "FC_1.affine"})
    with pytest.raises(ValueError, match=r"has the unknown FC_3.affine; build the field with the arguments"):
        field.load_official(state | {"FC_3.affine": torch.ones(1)})
    with pytest.raises(ValueError, match=r"lacks .* and 8 more and has the unknown x"):
        field.load_official({"x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"FC_0.affine must have shape \[1, 2, 5, 5\], got \[1, 2, 32, 32\]"):
        field.load_official(state | {"FC_0.affine": torch.ones(1, 2, 32, 32)})
    assert all(torch.equal(t, before[name]) for name, t in field.state_dict().items() if torch.is_tensor(t))


# ---- checkpoints and learning rates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", FIELDS.values(), ids=FIELDS)
def test_config_builds_the_field_again(build):
    field = build()
    again = type(field)(**field.config)
    again.load_state_dict(field.state_dict())
    assert str(again) == str(field) and again.config == field.config


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_command(name):
    torch.manual_seed(1)
    grid = name.startswith("hash") or name == "neurbf"
    sizes = {"finest_resolution": 24, "n_levels": 3} if grid else {"num_frequencies": 8}
    field = MODELS[name](channels=2, width=8, **sizes)
    groups, trained = field.parameter_groups(field.learning_rate), [p for p in field.parameters() if p.requires_grad]
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained}
    assert sum(len(group["params"]) for group in groups) == len(trained)
    x = torch.rand(3, 4, 2)
    assert field(x).shape == (3, 4, 2)
    again = MODELS[name](**field.config, backend="reference")
    again.load_state_dict(field.state_dict())
    assert torch.allclose(again(x), field(x), atol=1e-6)


def test_rates_of_a_hash_grid_fall_by_half_a_cosine():
    field = HashImageField(finest_resolution=24)
    assert [field.decay(done) for done in (0.0, 0.25, 1.0)] == pytest.approx([1, 0.855, 0.01], abs=1e-3)


def test_learning_rates_of_the_public_recipes():
    def rates(field, lr):
        named = {id(p): name for name, p in field.named_parameters()}
        return {named[id(p)]: group["lr"] for group in field.parameter_groups(lr) for p in group["params"]}

    image = rates(FIELDS["cam"](), 1e-3)
    assert image["modulation.grids"] == pytest.approx(1e-2) and image["mlp.layers.0.weight"] == 1e-3
    # the public static script means 10 times the rate for its grids, but its names match none of them
    assert rates(FIELDS["position"](), 1e-3)["modulation.grids"] == pytest.approx(1e-2)
    assert set(rates(FIELDS["dynamic"](), 1e-3).values()) == {1e-3}
    assert set(rates(FIELDS["mipnerf"](), 1e-3).values()) == {1e-3}
    assert len(parameter_groups(torch.nn.Linear(2, 2), 1e-3)) == 1


# ---- what each computes ----------------------------------------------------------------------------------------------


def test_hash_cam_is_the_composition_of_its_layers():
    torch.manual_seed(2)
    field = HashCAMField(3, 2, 4, finest_resolution=32, width=8, nodes=5, norm="point", output_activation="sigmoid")
    for p in field.parameters():
        torch.nn.init.normal_(p)
    x = torch.rand(4, 5, 3)
    assert torch.allclose(field(x), field.mlp(field.grid(x), field.modulation(2 * x - 1)))
    plain = field.mlp(field.grid(x))
    assert not torch.allclose(field(x), plain, atol=0.1)
    field.modulation.reset_parameters()
    assert torch.allclose(field(x), plain)


def test_hash_cam_learns():
    torch.manual_seed(3)
    field = HashCAMField(2, 1, 4, finest_resolution=16, width=16)
    optimizer = torch.optim.Adam(field.parameter_groups(field.learning_rate))
    before = copy.deepcopy(field.state_dict())
    for _ in range(60):
        x = torch.rand(512, 2)
        loss = F.mse_loss(field(x), torch.sin(6 * x[:, :1]) * x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    assert all(not torch.equal(before[name], t) for name, t in field.state_dict().items() if torch.is_tensor(t))


def test_a_new_field_is_not_modulated():
    torch.manual_seed(4)
    cam, plain = CAMImageField(width=8, num_frequencies=4), FourierImageField(width=8, num_frequencies=4, norm="point")
    plain.load_state_dict({name: t for name, t in cam.state_dict().items() if not name.startswith("modulation.")})
    x = torch.rand(5, 2)
    assert torch.allclose(cam(x), plain(x), atol=1e-6)


def test_encodings():
    x = torch.rand(2, 5, 2, dtype=torch.float64)
    y = SinusoidalEncoder(2, 1, 3)(x)
    expected = [x, *(torch.sin(2.0**k * x) for k in (1, 2)), *(torch.cos(2.0**k * x) for k in (1, 2))]
    assert torch.allclose(y, torch.cat(expected, -1)) and y.shape[-1] == SinusoidalEncoder(2, 1, 3).latent_dim == 10
    assert torch.equal(SinusoidalEncoder(2, 1, 3, use_identity=False)(x), y[..., 2:])
    assert torch.equal(SinusoidalEncoder(2, 3, 3)(x), x)
    torch.manual_seed(0)
    encoder = RandFourierFeature(2, 4096, sigma=3, scale=80, range=2.0).double()
    assert encoder.proj.std().item() == pytest.approx(math.pi, rel=0.05)
    phase = 3 * x @ encoder.proj
    assert torch.allclose(encoder(x), 80 / 64 * torch.cat([phase.sin(), phase.cos()], -1))
    encoder.scale = -1
    assert torch.allclose(encoder(x).square().sum(-1), torch.tensor(4096.0, dtype=torch.float64))


def test_the_dynamic_field_is_a_warp_and_a_field_modulated_by_time():
    torch.manual_seed(5)
    field = FIELDS["dynamic"]().double()
    x, time, direction = torch.rand(7, 3).double(), torch.rand(7, 1).double(), torch.rand(7, 3).double()
    features = torch.cat([field.encoder(x), field.time_encoder(time)], -1)
    h = features
    for i, layer in enumerate(field.warp.layers[:4]):
        h = F.relu(layer(h))
        h = torch.cat([h, features], -1) if i == 2 else h
    moved = x + field.warp.layers[4](h)
    assert 0 < (moved - x).abs().max() < 0.1  # drawn from U(0, 1e-4)
    rgb, sigma = field.radiance(moved, direction, time)
    assert all(torch.allclose(a, b) for a, b in zip(field(x, time, direction), (rgb, sigma), strict=True))
    assert torch.allclose(field.query_density(x, time), sigma)
    with pytest.raises(ValueError, match="time must be a tensor"):
        field.radiance(x, direction)


def test_skips_of_the_trunk():
    field = RadianceField(net_depth=9, net_width=10, skip_layer=4, modulated_by=None)
    assert [layer.in_features for layer in field.trunk.layers] == [63, 10, 10, 10, 10, 73, 10, 10, 10]
    assert field.density.layers[0].in_features == 73  # behind layer 8 too
    assert MipNeRFField(9, 5, net_depth=5, net_width=8).density.in_features == 17


# ---- defects of the public codes -------------------------------------------------------------------------------------


def test_the_shift_of_the_static_field_is_dead_only_on_request():
    for beta_init, alive in (("zeros", False), ("auto", True)):
        field = RadianceField(**SMALL, resolution=(4, 4), beta_init=beta_init)
        sum(y.sum() for y in field(torch.rand(50, 3), torch.rand(50, 3))).backward()
        gamma, beta = field.modulation.grids.grad.unbind(1)
        assert gamma.any() and bool(beta.any()) == alive


def test_beyond_the_box_the_static_field_is_not_driven():
    field = RadianceField(**SMALL, resolution=(4, 4), beta_init="zeros")
    far = field.query_density(torch.full((1, 3), 9.0))
    assert torch.equal(far, F.relu(field.density.layers[0].bias).reshape(1, 1))  # gamma is 0 there


def test_no_gradient_passes_the_planes_to_the_position():
    x = torch.rand(3, 3, requires_grad=True)
    field = RadianceField(**SMALL, resolution=(4, 4))
    (gradient,) = torch.autograd.grad(field.query_density(x).sum(), x)
    modulation = field.modulation(x.detach() / 1.5)
    (expected,) = torch.autograd.grad(field.density(field.trunk(field.encoder(x), modulation)).sum(), x)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("time", [1.0, 1 - 1e-9])
def test_the_last_frame_of_a_video(time):
    field = FIELDS["video"]().double()
    last, before = (field(torch.tensor([t], dtype=torch.float64))[1] for t in (time, 1 - 1e-6))
    assert torch.allclose(last, before, atol=1e-3) and torch.isfinite(last).all()


def test_two_heads_need_three_strides():
    with pytest.raises(ValueError, match="strides must be at least 3"):
        VideoField(strides=(5, 2))


# ---- precision of phases ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [FourierImageField, CAMImageField])
def test_phases_are_not_rounded_by_autocast_or_conversion(model):
    torch.manual_seed(0)
    field, x = model(width=16, num_frequencies=8), torch.rand(50, 2)
    exact = field.encoder(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(field.encoder(x), exact)
    y = field(x).detach()
    half = field.bfloat16()
    assert torch.equal(half.encoder(x), exact) and half.encoder(x.bfloat16()).dtype == torch.bfloat16
    assert (half(x).float() - y).abs().max() < 0.05 * max(1.0, y.abs().max().item())


def test_a_bias_of_inputs_is_not_rounded_by_autocast():
    torch.manual_seed(0)
    kernels = TensoRFKernels(kernels=50, grid_features=24, width=32)
    with torch.no_grad():
        kernels.bias.uniform_(-9, 9)
    x, grid_features = torch.rand(5, 3), torch.rand(5, 24)
    y = kernels(x, grid_features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernels(x, grid_features), y.bfloat16())


def test_channels_of_a_video_are_shared_evenly():
    with pytest.raises(ValueError, match=r"^VideoField: channels must be a multiple of .*temporal_grids, 2, got 9"):
        VideoField((2, 3), 9, (2, 1, 2), temporal_grids=(4, 6), nodes=5, lower_width=4)
