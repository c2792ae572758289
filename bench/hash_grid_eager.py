# SPDX-License-Identifier: MIT
"""The hash grid as eager PyTorch code computes it, all levels at once, one indexing per corner: the baseline.

With the convention "nerfstudio" it follows, operation by operation, the PyTorch path of nerfstudio's HashEncoding
(`nerfstudio/field_components/encodings.py`): int32 corners by ceil and floor, a product with the primes in int64, xor,
remainder, offset, `table[index]`, and one linear blend per axis. "tcnn" is written in the same manner with that
convention's rules: the upper corner is floor + 1, and levels that fit are indexed without hashing.

The other form in use, a sum over corners of a product of weights, holds more for the backward pass: `form="sum"`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from camkernels import GridGeometry

FORMS = ("blend", "fair", "sum")
PRIMES = (1, 2654435761, 805459861)


def make(options: dict[str, Any], device: str, form: str = "blend") -> Callable[..., Tensor]:
    """function(x [n, D], table [entries, F]) -> [n, L*F].

    form: "blend" as above; "sum" over the corners; "fair" blends rows taken by index_select, faster than table[index].
    """
    geometry: GridGeometry = options["geometry"]
    dims, shift, ceil_corner = geometry.dims, geometry.shift, geometry.ceil_corner
    scales = torch.tensor(geometry.scales, device=device)  # [L, D]
    offsets = torch.tensor(geometry.offsets[:-1], device=device)
    sizes = torch.tensor(geometry.sizes, device=device)
    strides = torch.tensor(geometry.strides, device=device)
    primes = torch.tensor(PRIMES[:dims], device=device)
    n_dense = geometry.hashed.index(True) if True in geometry.hashed else geometry.n_levels
    table_size = geometry.sizes[-1]

    def hash_index(corner: Tensor) -> Tensor:
        keys = corner * primes
        index = keys[..., 0]
        for d in range(1, dims):
            index = torch.bitwise_xor(index, keys[..., d])
        index %= table_size
        return index

    def level_index(corner: Tensor) -> Tensor:
        """[n, L, D] int32 -> row of the table [n, L]."""
        if n_dense == 0:
            index = hash_index(corner)
        else:
            dense = (corner[..., :n_dense, :] * strides[:n_dense]).sum(-1) % sizes[:n_dense]
            index = torch.cat([dense, hash_index(corner[..., n_dense:, :])], -1)
        index += offsets
        return index

    def rows(table: Tensor, index: Tensor) -> Tensor:
        return table.index_select(0, index.reshape(-1)).unflatten(0, index.shape) if form == "fair" else table[index]

    def function(x: Tensor, table: Tensor) -> Tensor:
        scaled = x[..., None, :] * scales + shift if shift else x[..., None, :] * scales
        lower = torch.floor(scaled).type(torch.int32)
        upper = torch.ceil(scaled).type(torch.int32) if ceil_corner else lower + 1
        offset = scaled - lower

        def blend(*chosen: Tensor) -> Tensor:
            """Blend over the axes not chosen yet, the last axis outermost."""
            axis = dims - 1 - len(chosen)
            if axis < 0:
                return rows(table, level_index(torch.cat(chosen, -1)))
            t = offset[..., axis : axis + 1]
            one = slice(axis, axis + 1)
            return blend(upper[..., one], *chosen) * t + blend(lower[..., one], *chosen) * (1 - t)

        def corner_sum() -> Tensor:
            total: Tensor | int = 0
            for high in itertools.product((False, True), repeat=dims):
                weight: Tensor | int = 1
                for d in range(dims):
                    weight = weight * (offset[..., d] if high[d] else 1 - offset[..., d])
                corner = torch.stack([(upper if high[d] else lower)[..., d] for d in range(dims)], -1)
                total = total + weight[..., None] * rows(table, level_index(corner))
            return total

        return torch.flatten(corner_sum() if form == "sum" else blend(), -2, -1).to(table.dtype)

    return function
