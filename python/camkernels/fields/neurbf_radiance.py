# SPDX-License-Identifier: MIT
"""The radial kernels of NeuRBF's radiance fields: what they add to the features of TensoRF and of K-planes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import RadialBasis, modulated_mlp
from .._backends import define
from .._layers import KeepsFrequencies
from ..neighbors import width_bounds
from .field import Field
from .neurbf import place_kernels, wave_frequencies

LEAST_WIDTH = 1e-3  # of a kernel


class _RadianceKernels(Field):
    """Radial kernels beside the features of a grid; `initial` is the range that their features begin in."""

    def __init__(
        self, kernels: int, neighbors: int, features: int, normalize: bool, initial: tuple[float, float],
        backend: str | None,
    ):  # fmt: skip
        super().__init__()
        self.basis = RadialBasis(kernels, 3, features, neighbors, normalize=normalize, backend=backend)
        nn.init.uniform_(self.basis.features, *initial)

    def place(
        self,
        x: Tensor,
        weights: Tensor,
        low: Sequence[float],
        high: Sequence[float],
        resolution: Sequence[int],
        *,
        alpha: float = 0.5,
        iterations: int = 10,
        generator: torch.Generator | None = None,
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        """Puts the kernels where points x [N, 3] with weights [N] are, in a box from low [3] to high [3].

        weights: `volume_weights`, flattened. resolution [3]: cells of the volume that they are of. alpha is 0.3 for
        TensoRF in the public code. The rest, and the errors: `NeuRBFField.place`.
        """
        low, high, cells = (x.new_tensor(values) for values in (low, high, resolution))
        bounds = width_bounds(low, high, cells, least=LEAST_WIDTH)
        place_kernels(
            self.basis, x, weights, bounds, alpha=alpha, iterations=iterations, generator=generator, progress=progress
        )

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        names = {"kc0.weight": "centers", "ks0.weight": "shapes", "lc0.weight": "features"}
        return {theirs: own[f"basis.{ours}"] for theirs, ours in names.items()}

    def load_official(self, state: Mapping[str, Any]) -> None:
        """Takes over what is of this part in a state_dict of the public code's model.

        Raises ValueError, and changes nothing, if a name is missing or a shape is another.
        """
        names = self.official_views(self.state_dict())
        super().load_official({name: t for name, t in state.items() if name in names})


class TensoRFKernels(KeepsFrequencies, _RadianceKernels):
    """TensoRF's appearance with radial kernels: the grid's features [..., C] at x [..., 3] -> [..., width].

        a <- z + sin(m z),  z = W ([grid features, radial_basis(x)] + bias)

    The nearest `neighbors` of `kernels` inverse quadratics of any ellipsoid, not normalised, give `features` numbers; m
    is between the two of `waves`. x is in the coordinates of the scene, where `place` puts the kernels. Names of
    parameters: basis.features, bias, mix.weight; `load_official` takes those of the public code that are of this part.

    Source: Chen et al., "NeuRBF: A Neural Fields Representation with Adaptive Radial Basis Functions", ICCV 2023, the
    class TensorVMSplitRBF of nerf_tensorf/network.py.

    >>> kernels = TensoRFKernels(kernels=50, grid_features=24, width=32)
    >>> kernels(torch.rand(5, 3), torch.rand(5, 24)).shape
    torch.Size([5, 32])
    """

    def __init__(
        self,
        kernels: int,
        grid_features: int,
        width: int = 128,
        neighbors: int = 5,
        features: int = 32,
        waves: tuple[float, float] = (0.3, 10.0),
        *,
        backend: str | None = None,
    ):
        super().__init__(kernels, neighbors, features, False, (-1e-6, 1e-6), backend)
        self.config = {
            "kernels": kernels, "grid_features": grid_features, "width": width, "neighbors": neighbors,
            "features": features, "waves": tuple(waves),
        }  # fmt: skip
        self.backend = backend
        self.bias = nn.Parameter(torch.zeros(1, grid_features + features))
        self.mix = nn.Linear(grid_features + features, width, bias=False)
        self.register_buffer("frequencies", wave_frequencies(*waves, width), persistent=False)

    def forward(self, x: Tensor, grid_features: Tensor, neighbors: Tensor | None = None) -> Tensor:
        """x [..., 3], grid_features [..., C], neighbors as `camkernels.nearest` finds them, or None -> [..., width]."""
        h = torch.cat([grid_features, self.basis(x, neighbors)], -1)
        weight = self.mix.weight
        bias = define(torch.mv, weight, self.bias[0])
        return modulated_mlp(
            h, [weight], [bias], activation="residual_sine", frequencies=self.frequencies, output_layer=False,
            backend=self.backend,
        )  # fmt: skip

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().official_views(own) | {"lcb0": own["bias"], "basis_mat.weight": own["mix.weight"]}


class KPlanesKernels(_RadianceKernels):
    """K-planes' features with radial kernels: the planes' features [..., C] at x [..., 3] -> [..., C + features].

        sin([plane features, radial_basis(x)] + bias)

    The nearest `neighbors` of `kernels` inverse quadratics of any ellipsoid, normalised, give `features` numbers. x is
    in the cube from -1 to 1. What comes out is the input of K-planes' density network. Names of parameters:
    basis.features, bias; `load_official` takes those of the public code that are of this part.

    Source: Chen et al., "NeuRBF: A Neural Fields Representation with Adaptive Radial Basis Functions", ICCV 2023, the
    class KPlaneRBFField of nerf_kplanes/network.py.

    >>> kernels = KPlanesKernels(kernels=50, plane_features=24)
    >>> kernels(torch.rand(5, 3), torch.rand(5, 24)).shape
    torch.Size([5, 40])
    """

    def __init__(
        self,
        kernels: int,
        plane_features: int,
        neighbors: int = 8,
        features: int = 16,
        *,
        backend: str | None = None,
    ):
        super().__init__(kernels, neighbors, features, True, (0.1, 0.5), backend)
        self.config = {
            "kernels": kernels, "plane_features": plane_features, "neighbors": neighbors, "features": features
        }  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(plane_features + features))

    def forward(self, x: Tensor, plane_features: Tensor, neighbors: Tensor | None = None) -> Tensor:
        """x [..., 3], plane_features [..., C], neighbors as for TensoRFKernels -> [..., C + features]."""
        return torch.sin(torch.cat([plane_features, self.basis(x, neighbors)], -1) + self.bias)

    def official_views(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().official_views(own) | {"kpb": own["bias"]}


def volume_weights(density: Tensor, features: Tensor, *, threshold: float = 0.0) -> Tensor:
    """Where a scene is: (1 - exp(-density)) |gradient of its features| [d, h, w], the weights of kernels' points.

    density [d, h, w] per cell; features [C, d, h, w], scaled to [0, 1], whose gradient, by central differences, is
    measured over all axes and channels. Weights of at most `threshold` times their mean are 0: 0.5 for K-planes in the
    public code, which leaves TensoRF's as they are. `place` looks at no scale; a power of them sharpens it.

    Source: initialisation of Chen et al., "NeuRBF", ICCV 2023.

    >>> volume_weights(torch.ones(4, 4, 4), torch.rand(3, 4, 4, 4)).shape
    torch.Size([4, 4, 4])
    """
    low, high = features.aminmax()
    scaled = (features - low) / torch.where(high > low, high - low, 1)
    padded = nn.functional.pad(scaled.unsqueeze(0), [1] * 6, mode="replicate")[0]
    inner = slice(1, -1)
    squares = torch.zeros_like(density)
    for axis in range(1, 4):
        before, after = ([slice(None), inner, inner, inner] for _ in range(2))
        before[axis], after[axis] = slice(None, -2), slice(2, None)
        squares = squares + ((padded[tuple(after)] - padded[tuple(before)]) / 2).square().sum(0)
    weights = -torch.expm1(-density) * squares.sqrt()
    return weights * (weights > threshold * weights.mean())
