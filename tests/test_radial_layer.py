# SPDX-License-Identifier: MIT
"""The layer RadialBasis: what it draws, holds, saves and computes."""

import copy

import pytest
import torch

import camkernels
from camkernels import RadialBasis
from camkernels._radial_basis import SHAPES, shape_width


@pytest.mark.parametrize("leading", [(), (0,), (7,), (2, 3)], ids=str)
@pytest.mark.parametrize("neighbors", [3, None])
def test_a_forward_is_the_function_of_its_parameters(neighbors, leading):
    options = {"kind": "gauss", "shape": "diagonal", "keep": 1}
    layer = RadialBasis(30, 2, 4, neighbors, frequencies=[1.0, 2.0, 4.0], **options)
    x = torch.rand(*leading, 2)
    near = None if neighbors is None else camkernels.nearest(x, layer.centers, 3)
    parameters = (layer.centers, layer.shapes, layer.features)
    expected = camkernels.radial_basis(x, *parameters, near, frequencies=layer.frequencies, **options)
    assert torch.equal(layer(x), expected) and layer(x).shape == (*leading, 4)
    given = torch.randint(0, 30, (*leading, 2))
    expected = camkernels.radial_basis(x, *parameters, given, frequencies=layer.frequencies, **options)
    assert torch.equal(layer(x, given), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_their_first_values(shape):
    layer = RadialBasis(400, 2, 5, shape=shape)
    assert [name for name, _ in layer.named_parameters()] == ["centers", "shapes", "features"]
    assert layer.centers.shape == (400, 2) and layer.shapes.shape == (400, shape_width(shape, 2))
    assert layer.centers.min() < -0.9 and layer.centers.max() > 0.9 and layer.centers.abs().max() <= 1
    assert 0.9e-4 < layer.features.abs().max() <= 1e-4
    half = torch.tensor([[0.05, 0.0]])  # half the pitch of 20 x 20 kernels
    one = torch.ones(1, 1)
    phi = camkernels.radial_basis(half, torch.zeros(1, 2), layer.shapes[:1], one, shape=shape, normalize=False)
    torch.testing.assert_close(phi.item(), 0.8 if shape == "projected" else 0.5)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not torch.equal(before["centers"], layer.centers) and not torch.equal(before["features"], layer.features)


def test_only_what_is_trainable_has_gradients():
    layer = RadialBasis(30, 2, 4)
    layer(torch.rand(9, 2)).square().sum().backward()
    assert layer.features.grad is not None and layer.centers.grad is None and layer.shapes.grad is None
    layer = RadialBasis(30, 2, 4, trainable=("centers", "shapes"))
    layer(torch.rand(9, 2)).sum().backward()
    assert layer.features.grad is None and layer.centers.grad.any() and layer.shapes.grad.any()


def test_neighbors_follow_the_centers():
    layer, x = RadialBasis(30, 2, 4), torch.rand(9, 2)
    layer(x)
    index = layer._index
    layer(x)
    assert layer._index is index, "built once"
    for change in (lambda c: c.copy_(c.flip(0)), lambda c: c.data.neg_()):
        with torch.no_grad():
            change(layer.centers)
        near = camkernels.nearest(x, layer.centers, 4)
        assert torch.equal(layer(x), layer(x, near))


def test_a_graph_finds_the_neighbors_of_moved_centers():
    layer, x = RadialBasis(30, 2, 4, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for _ in range(2):
        assert torch.equal(compiled(x), layer(x))
        with torch.no_grad():
            layer.centers.add_(torch.rand_like(layer.centers))


def test_what_it_says_of_itself():
    text = repr(RadialBasis(30, 3, 4, kind="nlin", shape="isotropic"))
    assert "30, 3, 4, neighbors=4, kind='nlin', shape='isotropic'" in text and "('features',)" in text


def test_other_options_are_refused():
    state = RadialBasis(30, 2, 4, frequencies=[1.0, 2.0, 3.0, 4.0]).state_dict()
    for options in ({"kind": "gauss"}, {"normalize": False}, {"neighbors": 3}, {"frequencies": None}):
        with pytest.raises(ValueError, match=r"^RadialBasis: the state_dict is of a layer with \{.*build it"):
            RadialBasis(30, 2, 4, **{"frequencies": [1.0, 2.0, 3.0, 4.0], **options}).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_frequencies_are_not_rounded_to_16_bits(dtype):
    waves = [1.1, 33.3, 1234.567]
    layers = [
        RadialBasis(30, 2, 3, frequencies=waves),
        camkernels.ModulatedMLP(2, 3, width=3, activation="residual_sine", frequencies=waves),
        camkernels.Modulate(activation="residual_sine", frequencies=waves),
    ]
    for layer in layers:
        exact, state = layer.frequencies.clone(), layer.state_dict()
        layer.to(dtype)
        assert torch.equal(layer.frequencies, exact)
        layer.load_state_dict(state)  # of the layer before
        assert layer.double().to(dtype).frequencies.dtype == torch.float32
    mlp = camkernels.ModulatedMLP(2, 3, width=3, activation="residual_sine", frequencies=waves, dtype=dtype)
    assert torch.equal(mlp.frequencies, exact) and mlp(torch.rand(5, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "count must be at least 1", {"count": 0}),
        (ValueError, "dims must be from 1 to 4, got 5", {"dims": 5}),
        (ValueError, "neighbors must be at most count, 30, got 31", {"neighbors": 31}),
        (ValueError, "trainable must be one of", {"trainable": "weights"}),
        (ValueError, "kind must be one of", {"kind": "box"}),
        (ValueError, r"frequencies must have shape \[4\]", {"frequencies": [1.0]}),
        (TypeError, "dtype must be", {"dtype": torch.int32}),
        (ValueError, "backend must be one of", {"backend": "gpu"}),
    ],
)
def test_errors_say_what_is_wrong(error, message, arguments):
    with pytest.raises(error, match=f"^RadialBasis: {message}"):
        RadialBasis(**{"count": 30, "dims": 2, "features": 4, **arguments})
