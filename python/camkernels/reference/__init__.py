# SPDX-License-Identifier: MIT
"""The definition of every op in plain PyTorch: short, differentiable by autograd, float64-capable, on any device."""

from .hash_grid import hash_grid
from .modulated_mlp import coordinate_modulation, hash_grid_mlp, modulate, modulated_mlp
from .optim import sparse_row_adam
from .radial_basis import radial_basis

__all__ = [
    "coordinate_modulation",
    "hash_grid",
    "hash_grid_mlp",
    "modulate",
    "modulated_mlp",
    "radial_basis",
    "sparse_row_adam",
]
