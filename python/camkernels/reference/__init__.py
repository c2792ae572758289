# SPDX-License-Identifier: MIT
"""The definition of every op in plain PyTorch: short, differentiable by autograd, float64-capable, on any device."""

from .hash_grid import hash_grid

__all__ = ["hash_grid"]
