# SPDX-License-Identifier: MIT
"""Fast, dependable kernels for neural fields in PyTorch: drop-in layers that run on any machine."""

from . import reference
from ._version import __version__
from .coordinate_modulation import CoordinateModulation, coordinate_modulation
from .hash_grid import GridGeometry, HashGrid, hash_grid
from .hash_grid_mlp import hash_grid_mlp
from .modulate import Modulate, modulate
from .modulated_mlp import ModulatedMLP, modulated_mlp
from .radial_basis import radial_basis

__all__ = [
    "CoordinateModulation",
    "GridGeometry",
    "HashGrid",
    "Modulate",
    "ModulatedMLP",
    "__version__",
    "coordinate_modulation",
    "hash_grid",
    "hash_grid_mlp",
    "modulate",
    "modulated_mlp",
    "radial_basis",
    "reference",
]
