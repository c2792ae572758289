# SPDX-License-Identifier: MIT
"""Layers of the modulated MLP family: what they draw, hold, save and compute."""

import copy
import math
import pickle

import pytest
import torch

import camkernels
from camkernels import CoordinateModulation, Modulate, ModulatedMLP, testing
from conftest import backends


def is_uniform(tensor, bound):
    """Whether many numbers look drawn from U(-bound, bound)."""
    values = tensor.detach().flatten()
    deviation = bound / math.sqrt(3 * len(values))
    spread = values.std() / (bound / math.sqrt(3))
    return values.abs().max() <= bound and values.mean().abs() < 5 * deviation and abs(spread - 1) < 0.05


# ---- ModulatedMLP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_are_drawn_as_pytorch_draws_them(bias):
    torch.manual_seed(4)
    mlp = ModulatedMLP(5, 3, width=16, hidden_layers=2, bias=bias)
    after = torch.rand(1)
    torch.manual_seed(4)
    layers = [torch.nn.Linear(*size, bias=bias) for size in ((5, 16), (16, 16), (16, 3))]
    assert torch.equal(torch.rand(1), after)
    expected = [p for layer in layers for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(mlp.parameters(), expected, strict=True))
    names = [f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")[: 1 + bias]]
    assert [name for name, _ in mlp.named_parameters()] == names == list(mlp.state_dict())


def test_sine_layers_are_drawn_as_siren():
    mlp = ModulatedMLP(3, 2, width=256, hidden_layers=3, activation="sine", omega=[30.0, 30.0, 10.0])
    first, second, third, last = mlp.layers
    assert is_uniform(first.weight, 1 / 3)
    assert is_uniform(second.weight, math.sqrt(6 / 256) / 30)
    assert is_uniform(third.weight, math.sqrt(6 / 256) / 10)
    assert is_uniform(last.weight, 1 / 16)  # linear, as torch.nn.Linear: 1 / sqrt(in)
    assert is_uniform(second.bias, 1 / 16)
    mixed = ModulatedMLP(3, 2, width=256, activation=["relu", "sine"], omega=30.0)
    assert is_uniform(mixed.layers[0].weight, 1 / math.sqrt(3))
    assert is_uniform(mixed.layers[1].weight, math.sqrt(6 / 256) / 30)


def test_reset_draws_anew():
    mlp = ModulatedMLP(3, 2, activation="sine")
    before = copy.deepcopy(mlp.state_dict())
    mlp.reset_parameters()
    assert all(not torch.equal(before[name], t) for name, t in mlp.state_dict().items())


@pytest.mark.parametrize("leading", [(), (0,), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("channels", [None, 8])
def test_a_forward_is_the_function_of_its_parameters(channels, leading):
    options = {"norm": "point", "activation": ["tanh", "sine", "relu"], "omega": 3.0, "output_activation": "sigmoid"}
    mlp = ModulatedMLP(2, 3, width=8, hidden_layers=3, skips=[1], **options)
    assert mlp.layers[2].in_features == 8 + 2
    grids = CoordinateModulation(3, (4, 5), channels=channels)
    torch.nn.init.uniform_(grids.grids)
    x = torch.rand(*leading, 2)
    y = mlp(x, grids(x))
    weights, biases = ([getattr(layer, kind) for layer in mlp.layers] for kind in ("weight", "bias"))
    modulation = camkernels.reference.coordinate_modulation(x, grids.grids)
    expected = camkernels.reference.modulated_mlp(x, weights, biases, modulation, skips=[1], **options)
    mlp.backend = grids.backend = "reference"
    assert y.shape == (*leading, 3) and torch.equal(mlp(x, grids(x)), expected)
    rtol, atol = testing.tolerance(torch.float32, "value")
    testing.assert_close(y, expected, rtol=rtol, atol=atol)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.any() == (0 not in leading) for p in grids.parameters())


def test_without_an_output_layer_the_last_hidden_layer_is_the_output():
    mlp = ModulatedMLP(3, 5, width=16, hidden_layers=2, output_layer=False, skips=[1])
    assert [tuple(layer.weight.shape) for layer in mlp.layers] == [(16, 3), (5, 16)]
    x = torch.rand(4, 3)
    y = mlp(x)
    assert y.shape == (4, 5 + 3) and (y[:, :5] >= 0).all() and torch.equal(y[:, 5:], x)


def test_no_hidden_layer_is_a_linear_one():
    mlp = ModulatedMLP(3, 5, hidden_layers=0, dtype=torch.float64)
    x = torch.rand(4, 3, dtype=torch.float64)
    torch.testing.assert_close(mlp(x), mlp.layers[0](x))


@pytest.mark.parametrize("given", [[1.0, 2.0, 4.0, 8.0], torch.tensor([1.0, 2.0, 4.0, 8.0])], ids=["list", "tensor"])
def test_frequencies_move_with_the_layer_and_are_not_saved(given):
    mlp = ModulatedMLP(3, 2, width=4, activation=["residual_sine", "relu"], frequencies=given)
    assert "frequencies" not in mlp.state_dict() and mlp.frequencies.tolist() == [1.0, 2.0, 4.0, 8.0]
    assert mlp.double()(torch.rand(5, 3).double()).dtype == torch.float64 == mlp.frequencies.dtype
    away = ModulatedMLP(3, 2, width=4, activation=["residual_sine", "relu"], frequencies=given, device="meta")
    assert away.frequencies.is_meta and away(torch.rand(5, 3, device="meta")).shape == (5, 2)
    back = away.to_empty(device="cpu")
    back.reset_parameters()
    assert back.frequencies.tolist() == [1.0, 2.0, 4.0, 8.0]


def test_options_are_shown():
    mlp = ModulatedMLP(3, 2, activation="sine", omega=30.0, skips=[0])
    assert "3, 2, activation='sine', output_activation=None, norm=None, skips=(0,)" in repr(mlp)
    assert "omega=30.0" in repr(mlp)


# ---- CoordinateModulation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "shape", "out"),
    [
        ({"resolution": 64}, (3, 2, 64), (7, 3, 2)),
        ({}, (3, 2, 32, 32), (7, 3, 2)),
        ({"resolution": (4, 5), "channels": 6}, (3, 2, 6, 4, 5), (7, 3, 2, 6)),
        ({"resolution": (4, 5, 6)}, (3, 2, 4, 5, 6), (7, 3, 2)),
    ],
)
def test_grids_start_as_the_identity(arguments, shape, out):
    state = torch.get_rng_state()
    modulation = CoordinateModulation(3, **arguments)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn"
    assert modulation.grids.shape == shape
    dims = len(shape) - 2 - ("channels" in arguments)
    y = modulation(torch.rand(7, dims) * 4 - 2)
    assert y.shape == out
    torch.testing.assert_close(y[:, :, 0], torch.ones_like(y[:, :, 0]))
    assert (y[:, :, 1] == 0).all()


def test_the_beta_planes_of_a_product_start_alive():
    x = torch.rand(50, 3) * 2 - 1
    touched = {}
    for beta_init in ("auto", "zeros"):
        modulation = CoordinateModulation(2, (16, 16), combine="plane_product", beta_init=beta_init)
        modulation(x).square().sum().backward()
        touched[beta_init] = modulation.grids.grad[:, 1].any()
        assert (modulation.grids[:, 0] == 1).all()
    assert touched == {"auto": True, "zeros": False}
    assert is_uniform(CoordinateModulation(2, (32, 32), combine="plane_product").grids[:, 1], 0.5)


def test_other_options_are_refused_and_none_are_accepted():
    state = CoordinateModulation(2, (4, 5)).state_dict()
    assert set(state) == {"grids", "_extra_state"}
    for options in ({"padding": "zeros"}, {"align_corners": False}):
        with pytest.raises(ValueError, match=r"^CoordinateModulation: the state_dict is of a layer with \{.*build it"):
            CoordinateModulation(2, (4, 5), **options).load_state_dict(state)
        CoordinateModulation(2, (4, 5), **options).load_state_dict({"grids": state["grids"]})
    with pytest.raises(RuntimeError, match="size mismatch for grids"):
        CoordinateModulation(2, (4, 6)).load_state_dict(state)


# ---- Modulate --------------------------------------------------------------------------------------------------------


def test_modulate_is_the_function():
    h, gamma, beta = torch.randn(4, 3, 5, 6), torch.rand(4, 3, 1, 1), torch.rand(3, 1, 1)
    options = {"norm": "frame", "eps": 1e-3, "activation": "residual_sine", "omega": 2.0}
    layer = Modulate(**options, frequencies=[1.0, 2.0, 3.0])
    expected = camkernels.modulate(h, gamma, beta, **options, frequencies=torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(layer(h, gamma, beta), expected)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(h, gamma, beta), expected) and repr(twin) == repr(layer)
    assert not list(layer.parameters()) and not layer.state_dict()
    assert repr(layer) == "Modulate(norm='frame', eps=0.001, activation='residual_sine', omega=2.0)"


# ---- autocast, and a field as in the paper ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_outputs_and_nothing_inside(dtype):
    x, weights = torch.rand(9, 3), [torch.rand(16, 3), torch.rand(2, 16)]
    h, gamma, beta = torch.rand(9, 4), torch.rand(9, 1), torch.rand(4)
    grids = torch.rand(2, 2, 4, 5, 6)
    for function, arguments in (
        (camkernels.modulated_mlp, (x, weights)),
        (camkernels.modulate, (h, gamma, beta)),
        (camkernels.coordinate_modulation, (x, grids)),
    ):
        expected = function(*arguments)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(function(*arguments), expected.to(dtype))


def test_the_published_study_in_one_dimension():
    """One step of the 1-D study of CAM decreases its loss more with grids than without: four linear layers are one."""
    torch.manual_seed(31210)
    x = torch.linspace(0, 1, 200).unsqueeze(-1)
    y = sum(torch.sin(2 * 3.14159 * 5 * k * x + torch.rand(1) * 2 * 3.14159) for k in range(1, 11))
    final = {}
    for name in ("plain", "CAM"):
        torch.manual_seed(0)
        mlp = ModulatedMLP(1, 1, hidden_layers=4, activation=None)
        grids = CoordinateModulation(4, 64, padding="zeros") if name == "CAM" else None
        parameters = [*mlp.parameters(), *(grids.parameters() if grids else [])]
        assert sum(p.numel() for p in parameters) == {"plain": 12673, "CAM": 13185}[name]
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        for _ in range(150):
            optimizer.zero_grad()
            loss = (mlp(x, grids(2 * x - 1) if grids else None) - y).square().mean()
            loss.backward()
            optimizer.step()
        final[name] = loss.item()
    assert final["plain"] > 4.5 and final["CAM"] < 0.8 * final["plain"]


def test_sizes_and_layers_may_be_of_numpy():
    np = pytest.importorskip("numpy")
    assert camkernels.CoordinateModulation(2, np.int64(5)).grids.shape == (2, 2, 5)
    mlp = camkernels.ModulatedMLP(2, 3, width=4, skips=np.array([1]))
    assert mlp.layers[2].weight.shape == (3, 6) and mlp.options["skips"] == (1,)


def test_modulate_takes_frequencies_as_a_list_of_any_numbers():
    h, gamma, beta = torch.randn(5, 3), torch.ones(5, 1), torch.zeros(5, 1)
    expected = h + torch.sin(h * torch.tensor([1.0, 2.0, 3.0]))
    layer = camkernels.Modulate(activation="residual_sine", frequencies=[1, 2, 3])
    torch.testing.assert_close(layer(h, gamma, beta), expected)


@pytest.mark.parametrize("backend", backends("modulated_mlp"))
def test_what_is_not_finite_stays_so_where_it_is(backend):
    x, weights = torch.rand(5, 3), [torch.rand(4, 3), torch.rand(2, 4)]
    modulation = torch.ones(5, 1, 2)
    options = {"activation": "silu", "norm": "point", "backend": backend}
    for of_one_point in (x, modulation):
        before = of_one_point[2].clone()
        of_one_point[2] = math.nan
        y = camkernels.modulated_mlp(x, weights, modulation=modulation, **options)
        assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()
        of_one_point[2] = before
    weights[1][1, 1] = math.nan
    y = camkernels.modulated_mlp(x, weights, modulation=modulation, **options)
    assert y[:, 1].isnan().all() and y[:, 0].isfinite().all()
    weights[0][1, 1] = math.nan
    assert camkernels.modulated_mlp(x, weights, modulation=modulation, **options).isnan().all()
