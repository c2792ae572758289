# SPDX-License-Identifier: MIT
"""Centres sorted into cells, on the device where they are, for the kernels that search in them."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

_CELL_CENTRES = 3  # in a cell, on average: faster than 6 for 4 of 20,000 in two axes, as fast for 8 of 100,000 in three
_CUT_SAMPLE = 32  # coordinates that are sorted to place one cut


class Cells(NamedTuple):
    """Centres [n, d] by cells. Cuts, coordinates of some centres in order, divide axis i into slabs[i] slabs, the lower
    cut of each included: a cell is one slab of every axis, and those of the last axis follow each other."""

    points: Tensor  # [d, n] the centres in the order of their cells, those of a cell by their rows
    rows: Tensor  # int32 [n] where they stood
    starts: Tensor  # int32 [cells + 1] where each cell begins
    cuts: Tensor  # float64, axis by axis
    slabs: list[int]


def build(centers: Tensor) -> Cells:
    """Of finite centers [n, d]. The host waits 1 + d times for the device: for d numbers, and for how many cuts an axis
    has."""
    count, dims = centers.shape
    columns = centers.mT.contiguous()
    per_axis = int(count ** (1 / dims))
    step = max(1, count // max(_CUT_SAMPLE * per_axis, 1024))
    sample = columns[:, ::step].double().sort(-1).values
    cell = torch.zeros(count, dtype=torch.int64, device=centers.device)
    slabs, cuts = [], []
    for column, ordered, wanted in zip(columns, sample, _slab_counts(_spreads(sample).tolist(), count), strict=True):
        places = torch.arange(1, wanted, device=centers.device) * len(ordered) // wanted
        cuts.append(ordered[places].unique_consecutive())
        slabs.append(len(cuts[-1]) + 1)
        cell = cell * slabs[-1] + torch.searchsorted(cuts[-1], column.double(), right=True)
    cell, rows = cell.int().sort(stable=True)
    numbers = torch.arange(math.prod(slabs) + 1, dtype=torch.int32, device=centers.device)
    starts = torch.searchsorted(cell, numbers, out_int32=True)
    return Cells(columns[:, rows], rows.int(), starts, torch.cat(cuts), slabs)


def _spreads(ordered: Tensor) -> Tensor:
    """How far coordinates [d, n] in order spread, without the outermost sixteenths, or with them if that is not at
    all."""
    margin = ordered.shape[1] // 16
    inner, outer = ordered[:, -1 - margin] - ordered[:, margin], ordered[:, -1] - ordered[:, 0]
    return torch.where(inner > 0, inner, outer).clamp(max=sys.float_info.max)


def _slab_counts(spreads: list[float], count: int) -> list[int]:
    """Into how many slabs each axis is cut, so that cells are about cubes."""
    counts = [1] * len(spreads)
    cells = max(1.0, count / _CELL_CENTRES)
    narrow_first = sorted(range(len(spreads)), key=spreads.__getitem__)
    while narrow_first:
        axis = narrow_first[0]
        if spreads[axis] > 0:  # spread * (cells / product of the spreads left)^(1 / axes left)
            ratios = [math.log(spreads[axis]) - math.log(spreads[other]) for other in narrow_first]
            slabs = math.floor(math.exp((math.log(cells) + sum(ratios)) / len(narrow_first)) + 1e-9)
            counts[axis] = max(1, min(slabs, int(cells)))
            cells = max(1.0, cells / counts[axis])
        narrow_first = narrow_first[1:]
    return counts
