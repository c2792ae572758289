# SPDX-License-Identifier: MIT
"""Numbers of parameters of NeuRBF's published fields beside the paper's: `python -m bench.neurbf_parameters`."""

from __future__ import annotations

import sys

import torch

from camkernels.fields import KPlanesKernels, NeuRBFField, NeuRBFImageField, TensoRFKernels
from camkernels.fields.hash import BASE_RESOLUTION
from camkernels.fields.neurbf import affordable_kernels, hash_grid_parameters

PICTURES = {(8000, 8000): "57.46 M", (3734, 6114): "34.62 M", (2040, 1356): "4.31 M (mean of 100)", (256, 256): "128 K"}
SHAPES = {15: "856 K", 14: "448 K", 13: "", 12: "", 16: ""}  # log2 of the rows of a level
# Beside volumes and planes that are not of this package: (field, features of the grid, kernels, the paper's numbers).
RADIANCE = {
    "TensoRF, synthetic scenes": (TensoRFKernels, 144, 41_564, "1.33 M"),
    "TensoRF, small": (TensoRFKernels, 144, 2_125, "0.068 M"),
    "K-planes, LLFF": (KPlanesKernels, 63, 31_457, "0.50 M"),
}
FINEST = 2048  # of a shape's grid


def picture(size: tuple[int, int]) -> tuple[int, NeuRBFField]:
    """(parameters of the hash grid it is measured by, the field) without memory."""
    with torch.device("meta"):
        field = NeuRBFImageField(size=size)
    config = field.config
    finest = config["finest_resolution"]
    return hash_grid_parameters(2, 3, config["log2_hashmap_size"], min(BASE_RESOLUTION, finest), finest), field


def shape(log2_size: int) -> tuple[int, NeuRBFField]:
    """The same for a signed distance."""
    options = {"features": 16, "kind": "nlin", "shape": "isotropic", "n_levels": 16, "n_features_per_level": 1}
    options |= {"neighbors": 8, "log2_hashmap_size": log2_size, "finest_resolution": FINEST}
    budget, extent = hash_grid_parameters(3, 1, log2_size, BASE_RESOLUTION, FINEST), (1.0, 1.0, 1.0)
    with torch.device("meta"):
        return budget, NeuRBFField(extent, 1, affordable_kernels(budget, extent, 1, **options), **options)


def kernels(field: type, grid_features: int, count: int, published: str) -> str:
    """Cells of the second table: kernels, features of a kernel, of all, what the paper's code counts."""
    with torch.device("meta"):
        features = field(count, grid_features).basis.features
    return f"{count:,} | {features.shape[1]} | {features.numel():,} | {published}"


def row(name: str, budget: int, field: NeuRBFField, published: str) -> str:
    """A line of the table."""
    trained = sum(p.numel() for p in field.parameters() if p.requires_grad)
    numbers = (budget, field.grid.table.numel(), len(field.basis.centers), field.basis.features.numel(), trained)
    return f"| {name} | {' | '.join(f'{n:,}' for n in numbers)} | {published} |"


def main() -> int:
    print("| field | hash grid and MLP | hash kept | kernels | their features | trained | paper |")
    print("|---|---|---|---|---|---|---|")
    for (width, height), published in PICTURES.items():
        print(row(f"picture {width} x {height}", *picture((width, height)), published))
    for log2_size, published in SHAPES.items():
        print(row(f"shape, 2^{log2_size} rows a level", *shape(log2_size), published))
    print("\n| radial kernels of | kernels | features of one | of all | public code |\n|---|---|---|---|---|")
    for name, options in RADIANCE.items():
        print(f"| {name} | {kernels(*options)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
