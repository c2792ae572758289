# SPDX-License-Identifier: MIT
"""Fast, dependable kernels for neural fields in PyTorch: drop-in layers that run on any machine."""

from . import reference
from ._version import __version__
from .hash_grid import GridGeometry, HashGrid, hash_grid

__all__ = ["GridGeometry", "HashGrid", "__version__", "hash_grid", "reference"]
