# SPDX-License-Identifier: MIT
"""NeuRBF: a hash grid beside radial kernels that stand where the data are, decoded by a small MLP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import GridGeometry, HashGrid, ModulatedMLP, RadialBasis, modulated_mlp, nearest
from .._backends import define
from .._checks import check_size
from .._radial_basis import shape_width
from ..neighbors import kernel_shapes, second_moments, weighted_kmeans, width_bounds
from .field import Field, half_cosine, linear_views

INIT_SCALE = 1e-4  # features, hash table and their bias begin in U(-INIT_SCALE, INIT_SCALE)
CONSTANTS = {"a0", "a1", "a2", "a3", "hg0.channels_keep", "cmin_gpu", "k_dims_0", "kci0"}  # of the public state_dict


def wave_frequencies(low: float, high: float, count: int) -> Tensor:
    """[count] from low to high, each the same multiple of the one before; float32 on the CPU, as the public code.

    >>> wave_frequencies(1.0, 8.0, 4).tolist()
    [1.0, 2.0, 4.0, 8.0]
    """
    return torch.exp2(torch.linspace(math.log2(low), math.log2(high), count, device="cpu"))


@torch.no_grad()
def place_kernels(
    basis: RadialBasis,
    points: Tensor,
    weights: Tensor,
    bounds: tuple[Tensor, Tensor],
    *,
    alpha: float = 0.5,
    iterations: int = 10,
    generator: torch.Generator | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Puts the kernels of a layer where points [N, d] with weights [N] are, each as wide as its cluster of them.

    Weighted k-means from points drawn by the generator, then the shapes of the clusters' second moments / alpha, within
    the bounds that `camkernels.neighbors.width_bounds` gives. progress and the errors: `weighted_kmeans` there.
    """
    kind, shape = basis.options["kind"], basis.options["shape"]
    centers = weighted_kmeans(
        points, weights, len(basis.centers), iterations=iterations, generator=generator, progress=progress
    )
    moments = second_moments(points, weights, centers, shape=shape, alpha=alpha)
    basis.centers.copy_(centers)
    basis.shapes.copy_(kernel_shapes(moments, bounds, kind=kind, shape=shape))


class NeuRBFField(Field):
    """Values of a domain: x [..., d] in [0, 1], over a box from -half_extent to half_extent -> [..., out_features].

        h = [hash_grid(x), radial_basis((2x - 1) half_extent)] + bias
        h <- z + sin(m z),  z = W_0 h + b_0;    then relu layers and a linear one

    The grid is torch-ngp's with align_corners, 0 outside of the box. Of `kernels` radial kernels of `kind` and `shape`,
    the nearest `neighbors` give each point `features` numbers, through sines whose frequencies are between the two of
    feature_waves. The decoder has hidden_layers of `width`; m is between those of decoder_waves. Centers and shapes are
    constants: `place` puts the kernels where the data are. Names of parameters: grid.table, basis.features, bias,
    decoder.layers.{i}.*; `load_official` takes those of the public code.

    Source: Chen et al., "NeuRBF: A Neural Fields Representation with Adaptive Radial Basis Functions", ICCV 2023, the
    class rbf of img_sdf/network.py.

    >>> import torch
    >>> field = NeuRBFField((1.0, 1.0), 3, kernels=100, finest_resolution=64)
    >>> field(torch.rand(5, 2)).shape
    torch.Size([5, 3])
    """

    ops = ("hash_grid", "radial_basis", "modulated_mlp")
    learning_rate = 1e-2  # of the decoder
    grid_factor = 0.5  # times that rate for the hash table
    feature_factor = 0.5  # times that rate for the kernels' features and the bias
    final_rate = 0.01  # share of the rates at the end
    modulation = None

    def __init__(
        self,
        half_extent: Sequence[float],
        out_features: int,
        kernels: int,
        *,
        neighbors: int = 4,
        features: int = 32,
        kind: str = "ivq",
        shape: str = "full",
        normalize: bool = True,
        feature_waves: tuple[float, float] = (2.0**-3, 2.0**12),
        n_levels: int = 2,
        n_features_per_level: int = 2,
        log2_hashmap_size: int = 24,
        base_resolution: int = 16,
        finest_resolution: int = 512,
        width: int = 64,
        hidden_layers: int = 2,
        decoder_waves: tuple[float, float] = (10.0, 100.0),
        backend: str | None = None,
    ):
        super().__init__()
        self.config = {
            "half_extent": tuple(half_extent), "out_features": out_features, "kernels": kernels,
            "neighbors": neighbors, "features": features, "kind": kind, "shape": shape, "normalize": normalize,
            "feature_waves": tuple(feature_waves), "n_levels": n_levels, "n_features_per_level": n_features_per_level,
            "log2_hashmap_size": log2_hashmap_size, "base_resolution": base_resolution,
            "finest_resolution": finest_resolution, "width": width, "hidden_layers": hidden_layers,
            "decoder_waves": tuple(decoder_waves),
        }  # fmt: skip
        check_size(type(self).__name__, "hidden_layers", hidden_layers)
        dims = len(half_extent)
        self.grid = HashGrid(
            dims, n_levels, n_features_per_level, log2_hashmap_size, base_resolution,
            finest_resolution=finest_resolution, convention="torch-ngp", align_corners=True, outside="zero",
            init_scale=INIT_SCALE, backend=backend,
        )  # fmt: skip
        self.basis = RadialBasis(
            kernels, dims, features, neighbors, kind=kind, shape=shape, normalize=normalize,
            frequencies=wave_frequencies(*feature_waves, features), backend=backend,
        )  # fmt: skip
        self.bias = nn.Parameter(torch.empty(self.grid.output_dim + features).uniform_(-INIT_SCALE, INIT_SCALE))
        self.decoder = ModulatedMLP(
            self.grid.output_dim + features, out_features, width, hidden_layers,
            activation=["residual_sine"] + ["relu"] * (hidden_layers - 1),
            frequencies=wave_frequencies(*decoder_waves, width), backend=backend,
        )  # fmt: skip
        self.register_buffer("half_extent", torch.tensor([float(side) for side in half_extent]), persistent=False)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for an optimizer, with their rates: lr for the decoder, other ones for table and kernels."""
        rates = {"grid": self.grid_factor * lr, "decoder": lr}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                rate = rates.get(name.split(".")[0], self.feature_factor * lr)
                groups.setdefault(rate, []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]

    def decay(self, done: float) -> float:
        """Factor of the learning rates when a share of the run is done."""
        return half_cosine(done, self.final_rate)

    def positions(self, x: Tensor) -> Tensor:
        """x [..., d] in [0, 1] -> where the kernels have it, in the box."""
        return (2 * x - 1) * self.half_extent

    def nearest(self, x: Tensor) -> Tensor:
        """x [..., d] in [0, 1] -> its kernels, int32 [..., neighbors], which forward takes for points seen often."""
        return nearest(self.positions(x), self.basis.centers, self.basis.neighbors)

    def encode(self, x: Tensor, neighbors: Tensor | None = None) -> Tensor:
        """x [..., d] -> what the decoder is given, without the bias: the hash grid's features, then the kernels'."""
        return torch.cat([self.grid(x), self.basis(self.positions(x), neighbors)], -1)

    def forward(self, x: Tensor, neighbors: Tensor | None = None) -> Tensor:
        """x [..., d] in [0, 1], neighbors as `nearest` finds them, or None -> [..., out_features]."""
        options = self.decoder.arguments()
        weights, (first, *others) = options.pop("weights"), options.pop("biases")
        biases = [define(torch.addmv, first, weights[0], self.bias), *others]  # W_0 (h + bias) + b_0
        return modulated_mlp(self.encode(x, neighbors), weights, biases, **options)

    @torch.no_grad()
    def place(
        self,
        x: Tensor,
        weights: Tensor,
        resolution: Sequence[int],
        *,
        alpha: float = 0.5,
        iterations: int = 10,
        generator: torch.Generator | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """Puts the kernels where points x [N, d] in [0, 1] with weights [N] are, each as wide as its cluster of them.

        Weighted k-means from points drawn by the generator, then the shapes of the clusters' second moments / alpha,
        no narrower than a hundredth of half a cell of a grid of `resolution` [d], no wider than a tenth of the box.
        progress and the errors: `camkernels.neighbors.weighted_kmeans`.
        """
        bounds = width_bounds(-self.half_extent, self.half_extent, torch.tensor(resolution, device=x.device))
        place_kernels(
            self.basis, self.positions(x), weights, bounds, alpha=alpha, iterations=iterations, generator=generator,
            progress=progress,
        )  # fmt: skip

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        views = {
            "kc0.weight": own["basis.centers"], "ks0.weight": own["basis.shapes"], "lc0.weight": own["basis.features"],
            "lcb0": own["bias"], "hg0.embeddings": own["grid.table"],
        }  # fmt: skip
        for i in range(len(self.decoder.layers)):
            views |= linear_views(own, f"decoder.layers.{i}", f"backbone.{i}")
        return views

    def load_official(self, state: Mapping[str, Any]) -> None:
        """Takes over the parameters of the public code's model: its state_dict, with its constants or without.

        Raises ValueError, and changes nothing, if a name is missing or unknown, a shape is another, or the constants
        are of another box or another hash grid.
        """
        given = {name: t for name, t in state.items() if name not in CONSTANTS}
        constants = {"cmax_gpu": self.half_extent.flip(-1), "hg0.offsets": torch.tensor(self.grid.geometry.offsets)}
        for name, own in constants.items():
            theirs = given.pop(name, None)
            if theirs is not None and theirs.tolist() != own.tolist():
                raise ValueError(
                    f"{type(self).__name__}.load_official: {name} must be {own.tolist()}, got {theirs.tolist()}; build "
                    "the field with the arguments of that model"
                )
        super().load_official(given)


# ---- numbers of parameters -------------------------------------------------------------------------------------------

REFERENCE_LEVELS, REFERENCE_FEATURES, REFERENCE_INPUTS = 16, 2, 32  # of the hash grid that NeuRBF is measured by


def mlp_parameters(inputs: int, out_features: int, width: int, hidden_layers: int) -> int:
    """Weights and biases of an MLP.

    >>> mlp_parameters(32, 3, width=64, hidden_layers=2)
    6467
    """
    widths = [inputs] + [width] * hidden_layers + [out_features]
    return sum((before + 1) * after for before, after in pairwise(widths))


def hash_grid_parameters(
    dims: int, out_features: int, log2_hashmap_size: int, base_resolution: int, finest_resolution: int,
    width: int = 64, hidden_layers: int = 2,
) -> int:  # fmt: skip
    """Parameters of a hash grid of 16 levels of 2 features and its MLP: what NeuRBF's may not exceed.

    >>> hash_grid_parameters(3, 1, 15, 16, 2048)
    950417
    """
    geometry = GridGeometry.build(
        dims, REFERENCE_LEVELS, REFERENCE_FEATURES, log2_hashmap_size, base_resolution,
        finest_resolution=finest_resolution, convention="torch-ngp", align_corners=True,
    )  # fmt: skip
    return geometry.n_entries * REFERENCE_FEATURES + mlp_parameters(
        REFERENCE_INPUTS, out_features, width, hidden_layers
    )


def affordable_kernels(
    parameters: int, half_extent: Sequence[float], out_features: int, *, stored: bool = False, **options: Any
) -> int:
    """How many kernels a NeuRBFField of these options may have, of so many parameters in all; below 1 where none.

    A kernel counts its features, its center, and its shape, of which a full matrix counts as a symmetric one, or, with
    `stored`, as all the numbers that it holds.

    >>> affordable_kernels(10_000, (1.0, 1.0), 3, finest_resolution=16)
    59
    """
    with torch.device("meta"):
        field = NeuRBFField(half_extent, out_features, 1, **options | {"neighbors": 1})
    dims, features = field.basis.centers.shape[1], field.basis.features.shape[1]
    shape = field.basis.options["shape"]
    kernel = features + dims + shape_width("symmetric" if shape == "full" and not stored else shape, dims)
    besides = sum(p.numel() for name, p in field.named_parameters() if not name.startswith("basis."))
    return (parameters - besides) // kernel
