# SPDX-License-Identifier: MIT
"""Drop-in classes: constructors, state_dict and results of the public ones, also inside the public models."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from camkernels import testing
from camkernels.fields import DynamicRadianceField, RadianceField, VideoField, parameter_groups
from camkernels.fields.drop_in import CamMLP, FCLayer_aff, TempMod


def run_golden(golden, dtype, module, forward, names):
    """Loads p.* under the module's own names, then compares output and every recorded gradient."""
    module.to(dtype)
    module.load_state_dict({name: golden.tensor(f"p.{key}") for name, key in names.items()})
    given = {
        k: golden.tensor(k, dtype).requires_grad_(f"g.{k}" in golden) for k in golden.arrays if k.startswith("in.")
    }
    y = forward(module, given)
    (golden.tensor("ct.y", dtype) * y).sum().backward()
    results = {"out.y": y} | {f"g.p.{names[name]}": p.grad for name, p in module.named_parameters()}
    results |= {f"g.{key}": x.grad for key, x in given.items() if x.requires_grad}
    assert set(results) == {key for key in golden.arrays if key.startswith(("out.", "g."))}
    for key, result in results.items():
        testing.assert_close_golden(result, golden, key, dtype)


both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
acts = pytest.mark.parametrize(  # the last is a ReLU that is not computed in the kernel
    "act",
    [None, nn.ReLU(inplace=True), F.relu, nn.LeakyReLU(0.0, inplace=True)],
    ids=["default", "module", "function", "in place"],
)


@both
@acts
@pytest.mark.parametrize("name", testing.golden_names("cam_image_layer"))
def test_fc_layer(name, act, dtype):
    golden = testing.load_golden(name)
    layer = FCLayer_aff(golden.hyper["c_in"], golden.hyper["c_out"], *([act] if act else []))
    names = {"linear.weight": "weight", "linear.bias": "bias", "affine": "grid"}
    run_golden(golden, dtype, layer, lambda m, x: m(x["in.x"][None], x["in.coord"].view(1, -1, 1, 2) * 2 - 1)[0], names)


def of_trunk(golden):
    hyper = golden.hyper
    sizes = {key: hyper[key] for key in ("input_dim", "net_depth", "net_width", "skip_layer", "coord_dim")}
    return sizes | {"output_enabled": False}, {key[2:]: key[2:] for key in golden.arrays if key.startswith("p.")}


@both
@acts
@pytest.mark.parametrize("name", testing.golden_names("cam_nerf_trunk"))
def test_cam_mlp(name, act, dtype):
    golden = testing.load_golden(name)
    arguments, names = of_trunk(golden)
    mlp = CamMLP(**arguments, hidden_activation=act)
    assert mlp.output_dim == golden.arrays["out.y"].shape[-1]
    for i in range(len(mlp.affines)):  # the recorded planes are smaller than the public ones
        mlp.affines[i] = nn.Parameter(torch.empty(golden.arrays[f"p.affines.{i}"].shape))
    run_golden(golden, dtype, mlp, lambda m, x: m(x["in.x"], x["in.coord"]), names)


@both
@pytest.mark.parametrize("name", testing.golden_names("cam_video_tempmod"))
def test_temp_mod(name, dtype):
    golden = testing.load_golden(name)
    layer = TempMod(mod_dim=golden.hyper["T"], new_ngf=golden.hyper["C"], wbit=golden.hyper["bits"])
    left, right = (golden.tensor(f"aux.{side}") for side in ("left", "right"))
    distances = [golden.tensor(f"aux.d_{side}", dtype).view(-1, 1, 1, 1) for side in ("left", "right")]

    def forward(module, given):
        del given["in.t"]  # whose index and distances the public model computes
        return module(given["in.h"], [left.long(), right.long(), *distances])

    run_golden(golden, dtype, layer, forward, {"mod_grid.0": "gamma", "mod_grid.1": "beta"})


# ---- constructors and what they draw ---------------------------------------------------------------------------------


def test_constructors():
    def arguments(cls):
        return {name: p.default for name, p in inspect.signature(cls).parameters.items()}

    assert list(arguments(FCLayer_aff)) == ["in_features", "out_features", "act"]
    mlp = arguments(CamMLP)
    assert list(mlp) == [
        "input_dim", "output_dim", "net_depth", "net_width", "skip_layer", "hidden_init", "hidden_activation",
        "output_enabled", "output_init", "output_activation", "bias_enabled", "bias_init", "coord_dim",
    ]  # fmt: skip
    assert (mlp["net_depth"], mlp["net_width"], mlp["skip_layer"], mlp["coord_dim"]) == (8, 256, 4, 0)


def test_state_dicts():
    shapes = {name: tuple(t.shape) for name, t in FCLayer_aff(5, 7).state_dict().items()}
    assert shapes == {"affine": (1, 2, 32, 32), "linear.weight": (7, 5), "linear.bias": (7,)}
    for coord_dim, shape in ((1, (1, 2, 5, 1)), (2, (1, 2, 10, 3)), (3, (6, 1, 512, 512))):
        grid = CamMLP(3, net_depth=1, output_enabled=False, coord_dim=coord_dim).state_dict()["affines.0"]
        assert grid.shape == shape
        gamma, beta = (grid[:3], grid[3:]) if coord_dim == 3 else grid[0]
        assert (gamma == 1).all() and (beta == 0).all()
    assert [tuple(t.shape) for t in TempMod(new_ngf=3, mod_dim=4, wbit=32).state_dict().values()] == [(4, 3, 1, 1)] * 2


def test_cam_mlp_draws_as_the_public_one():
    torch.manual_seed(1)
    mlp = CamMLP(3, 2, net_depth=2, net_width=8)
    torch.manual_seed(1)
    layers = [nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)]  # made, then drawn anew
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
    drawn = [*mlp.hidden_layers, mlp.output_layer]
    assert all(torch.equal(a.weight, b.weight) and not a.bias.any() for a, b in zip(drawn, layers, strict=True))
    constant = CamMLP(3, 2, net_depth=1, hidden_init=nn.init.ones_, output_init=None, bias_init=nn.init.ones_)
    assert (constant.hidden_layers[0].weight == 1).all() and (constant.output_layer.bias == 1).all()


def test_cam_mlp_without_modulation_hidden_layers_or_bias():
    x = torch.rand(4, 6, 3)
    mlp = CamMLP(3, 2, net_depth=2, net_width=8, skip_layer=None, bias_enabled=False, output_activation=nn.Sigmoid())
    first, second = (layer.weight for layer in mlp.hidden_layers)
    expected = torch.sigmoid(F.relu(F.relu(x @ first.T) @ second.T) @ mlp.output_layer.weight.T)
    assert torch.allclose(mlp(x), expected, atol=1e-6)
    dense = CamMLP(3, 2, net_depth=0)
    assert torch.allclose(dense(x), dense.output_layer(x), atol=1e-6)
    assert torch.equal(CamMLP(3, net_depth=0, output_enabled=False, coord_dim=1)(x, x[..., :1]), x)
    driven = CamMLP(3, 2, net_depth=2, net_width=8, coord_dim=1)
    nn.init.uniform_(driven.affines[1])
    assert not torch.allclose(driven(x), driven(x, x[..., :1]))


def test_an_image_layer_takes_any_batch():
    layer = FCLayer_aff(5, 7)
    nn.init.uniform_(layer.affine)
    x, coord = torch.rand(3, 4, 5), torch.rand(3, 4, 1, 2) * 2 - 1
    expected = [layer(a[None], c[None].view(1, 4, 1, 2))[0] for a, c in zip(x, coord, strict=True)]
    assert torch.allclose(layer(x, coord), torch.stack(expected), atol=1e-6)
    assert torch.equal(layer(x, coord.view(1, 12, 1, 2)), layer(x, coord))


# ---- defects of the public codes -------------------------------------------------------------------------------------


def test_the_static_shift_never_moves():
    mlp = CamMLP(3, net_depth=2, net_width=8, output_enabled=False, coord_dim=3)
    mlp(torch.rand(50, 3), torch.rand(50, 3) * 2 - 1).sum().backward()
    assert all(grid.grad[:3].any() and not grid.grad[3:].any() for grid in mlp.affines)


def test_time_1_does_not_read_beyond_the_last_node():
    layer = TempMod(new_ngf=3, mod_dim=4, wbit=32).double()
    for grid in layer.mod_grid:
        nn.init.normal_(grid)
    x = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    index, one, none = torch.tensor([3]), torch.ones(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double()
    gamma, beta = (grid[3] for grid in layer.mod_grid)
    assert torch.allclose(layer(x, [index, index + 1, none, one]), F.instance_norm(x) * gamma + beta)


def test_a_rate_of_their_own_for_the_grids():
    for module, count in (
        (FCLayer_aff(2, 3), 1),
        (CamMLP(2, 3, coord_dim=1), 8),
        (TempMod(new_ngf=3, mod_dim=4, wbit=32), 2),
    ):
        groups = parameter_groups(module, 0.1, factor=10)
        assert groups[-1]["lr"] == 1.0 and len(groups[-1]["params"]) == count


# ---- the same networks, as fields and from drop-in classes -----------------------------------------------------------


def test_a_trunk_of_the_public_field():
    """The names inside the public field's state_dict are those of the drop-in class."""
    torch.manual_seed(8)
    field = RadianceField(6, 10, 4, 8, modulated_by="time")
    nn.init.uniform_(field.modulation.grids)
    prefix = "mlp.base."
    views = field.official_views(field.state_dict())
    trunk = CamMLP(63, net_depth=6, net_width=10, output_enabled=False, coord_dim=1)
    trunk.load_state_dict({name.removeprefix(prefix): t for name, t in views.items() if name.startswith(prefix)})
    x, time = torch.rand(5, 3), torch.rand(5, 1)
    sigma = CamMLP(10, 1, net_depth=0)
    sigma.output_layer.load_state_dict(field.density.layers[0].state_dict())
    found = F.relu(sigma(trunk(field.encoder(x), 2 * time - 1)))
    assert torch.allclose(found, field.query_density(x, time), atol=1e-5)


def test_the_warp_of_the_public_dynamic_field():
    field = DynamicRadianceField(6, 10, net_width_condition=8)
    views = field.official_views(field.state_dict())
    warp = CamMLP(36, 3, net_depth=4, net_width=64, skip_layer=2)
    warp.load_state_dict({name[5:]: t for name, t in views.items() if name.startswith("warp.")})
    x, time = torch.rand(5, 3), torch.rand(5, 1)
    features = torch.cat([field.encoder(x), field.time_encoder(time)], -1)
    assert torch.allclose(x + warp(features), field.warped(x, time), atol=1e-6)


def test_a_block_of_the_public_generator():
    torch.manual_seed(9)
    field = VideoField((2, 3), 8, (2, 1, 2), (4, 6), nodes=5, lower_width=4, bits=6).double()
    block = field.blocks[0]
    nn.init.normal_(block.modulation.grids)
    layer = TempMod(new_ngf=8, mod_dim=5, wbit=6).double()
    views = field.official_views(field.state_dict())
    layer.load_state_dict({name[14:]: t for name, t in views.items() if name.startswith("layers.0.norm.")})
    x, position = torch.rand(2, 8, 2, 3).double(), torch.tensor([0.3, 3.6]).double()
    left = position.floor().long()
    distances = [(position - left).view(-1, 1, 1, 1), (left + 1 - position).view(-1, 1, 1, 1)]
    weight, bias = (torch.tanh(p) for p in (block.conv.weight, block.conv.bias))
    h = F.conv2d(x, *(torch.floor(p.abs() * 31) / 31 * p.sign() for p in (weight, bias)), padding=1)
    expected = F.gelu(layer(F.pixel_shuffle(h, 2), [left, left + 1, *distances]))
    assert torch.allclose(block(x, (position / 2 - 1).unsqueeze(-1)), expected)


def test_coordinates_that_the_network_has_no_grids_for():
    with pytest.raises(ValueError, match=r"^CamMLP: coord_dim must be one of 0, 1, 2, 3, got 4"):
        CamMLP(6, 3, coord_dim=4)
    with pytest.raises(ValueError, match=r"^CamMLP: coord must be None where coord_dim is 0"):
        CamMLP(6, 3, net_depth=2, net_width=16)(torch.rand(5, 6), torch.rand(5, 2))
