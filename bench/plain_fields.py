# SPDX-License-Identifier: MIT
"""Fields whose layers are computed by PyTorch's own operations, as one would write them without this package."""

from __future__ import annotations

import copy
import functools

from torch import Tensor, nn

from camkernels import CoordinateModulation, HashGrid, ModulatedMLP, RadialBasis
from camkernels.fields import HashCAMField, HashImageField, NeuRBFImageField
from camkernels.fields.hash import HashField

from . import hash_grid_eager, modulated_mlp_eager, radial_basis_eager


class PlainGrid(nn.Module):
    """HashGrid by int64 hashing, rows of the table and blends, of a form of `hash_grid_eager`: x [n, D] -> [n, L*F]."""

    def __init__(self, layer: HashGrid, form: str):
        super().__init__()
        self.table = layer.table
        self.function = hash_grid_eager.make({"geometry": layer.geometry}, str(layer.table.device), form)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.table)


class PlainModulation(nn.Module):
    """CoordinateModulation over a plane, one value per layer, by grid_sample: coords [n, 2] -> [n, layers, 2]."""

    def __init__(self, layer: CoordinateModulation):
        super().__init__()
        self.grids = layer.grids
        self.options = {name: layer.options[name] for name in ("padding", "align_corners")}

    def forward(self, coords: Tensor) -> Tensor:
        return modulated_mlp_eager.read_grids(coords, self.grids, **self.options)


class PlainMLP(nn.Module):
    """ModulatedMLP by linear, layer_norm, product and sum: x [n, in], modulation [n, layers, 2] or None -> [n, out]."""

    def __init__(self, mlp: ModulatedMLP):
        super().__init__()
        self.layers = mlp.layers
        options = mlp.options | {"frequencies": mlp.frequencies}
        self.function = modulated_mlp_eager.make(options, str(mlp.layers[0].weight.device))
        self.last = {None: nn.Identity(), "sigmoid": nn.Sigmoid()}[mlp.options["output_activation"]]

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        weights, biases = zip(*((layer.weight, layer.bias) for layer in self.layers), strict=True)
        return self.last(self.function(x, weights, biases, modulation))


class PlainBasis(nn.Module):
    """RadialBasis by embeddings, products and sines: x [n, d], neighbors [n, K] -> [n, features]."""

    def __init__(self, layer: RadialBasis):
        super().__init__()
        self.centers, self.shapes, self.features = layer.centers, layer.shapes, layer.features
        options = layer.options | {"frequencies": layer.frequencies}
        self.function = radial_basis_eager.make(options, str(layer.centers.device))

    def forward(self, x: Tensor, neighbors: Tensor) -> Tensor:
        return self.function(x, self.centers, self.shapes, self.features, neighbors)


class PlainNeuRBF(NeuRBFImageField):
    """NeuRBFImageField of such layers, one after the other."""

    def __init__(self, field: NeuRBFImageField):
        nn.Module.__init__(self)
        self.grid, self.basis, self.decoder, self.bias = field.grid, field.basis, field.decoder, field.bias
        self.register_buffer("half_extent", field.half_extent, persistent=False)

    def forward(self, x: Tensor, neighbors: Tensor) -> Tensor:
        return self.decoder(self.encode(x, neighbors) + self.bias)


class PlainHash(HashField):
    """A field of a hash grid and an MLP of such layers, one after the other."""

    def __init__(self, field: HashField):
        nn.Module.__init__(self)
        self.grid, self.mlp, self.modulation = field.grid, field.mlp, field.modulation

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.grid(x), None if self.modulation is None else self.modulation(2 * x - 1))


class PlainHashImage(PlainHash, HashImageField):
    """HashImageField of such layers."""


class PlainHashCAM(PlainHash, HashCAMField):
    """HashCAMField of such layers."""


LAYERS = {CoordinateModulation: PlainModulation, ModulatedMLP: PlainMLP, RadialBasis: PlainBasis}
FIELDS = {HashImageField: PlainHashImage, HashCAMField: PlainHashCAM, NeuRBFImageField: PlainNeuRBF}


def plain(field: nn.Module, grid_form: str = "blend") -> nn.Module:
    """A copy of a field, with parameters of its own and of equal names, in PyTorch's own operations."""
    found = copy.deepcopy(field)
    layers = LAYERS | {HashGrid: functools.partial(PlainGrid, form=grid_form)}
    for name, layer in list(found.named_children()):
        if type(layer) in layers:
            setattr(found, name, layers[type(layer)](layer))
    return FIELDS.get(type(field), lambda same: same)(found)
