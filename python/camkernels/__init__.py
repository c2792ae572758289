# SPDX-License-Identifier: MIT
"""Fast, dependable kernels for neural fields in PyTorch: drop-in layers that run on any machine."""

from . import neighbors, optim, reference
from ._version import __version__
from .coordinate_modulation import CoordinateModulation, coordinate_modulation
from .hash_grid import GridGeometry, HashGrid, hash_grid
from .hash_grid_mlp import hash_grid_mlp
from .modulate import Modulate, modulate
from .modulated_mlp import ModulatedMLP, modulated_mlp
from .neighbors import NeighborIndex, nearest
from .radial_basis import RadialBasis, radial_basis

__all__ = [
    "CoordinateModulation",
    "GridGeometry",
    "HashGrid",
    "Modulate",
    "ModulatedMLP",
    "NeighborIndex",
    "RadialBasis",
    "__version__",
    "coordinate_modulation",
    "hash_grid",
    "hash_grid_mlp",
    "modulate",
    "modulated_mlp",
    "nearest",
    "neighbors",
    "optim",
    "radial_basis",
    "reference",
]
