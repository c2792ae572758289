# SPDX-License-Identifier: MIT
"""Compiles the Triton kernels for GPUs that are not there and reads the machine code; run alone, it prints a table.

Needs no driver: cuobjdump comes with Triton. Not in Triton's interpreter (TRITON_INTERPRET unset), which is chosen when
the kernels are decorated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any, NamedTuple

KERNELS = ("rows", "jacobian", "table", "coordinates")
DTYPES = ("fp32", "fp16", "fp64", "bf16")
ARCHITECTURES = (80, 90)
MEMORY = ("LD", "ST", "RED", "ATOM", "SHFL", "BAR")


class Variant(NamedTuple):
    """A kernel and what it is compiled for. dtype: of the table; coordinates are fp64 beside fp64, else fp32."""

    kernel: str
    dims: int
    features: int
    dtype: str
    arch: int
    interpolation: int = 0
    outside: int = 0
    ceil_corner: bool = False
    per_point: bool = False

    def __str__(self) -> str:
        return f"{self.kernel}-d{self.dims}f{self.features}-{self.dtype}-sm_{self.arch}"


class Facts(NamedTuple):
    registers: int
    stack: int
    shared: int
    opcodes: dict[str, int]

    def count(self, start: str) -> int:
        return sum(n for name, n in self.opcodes.items() if name.startswith(start))


def cover() -> list[Variant]:
    """Every kernel, dims 2 to 4, features 1, 2, 4, 8 and architecture; dtypes and options take turns."""
    variants = []
    sizes = product(enumerate(KERNELS), enumerate((2, 3, 4)), enumerate((1, 2, 4, 8)), enumerate(ARCHITECTURES))
    for (k, kernel), (d, dims), (f, features), (a, arch) in sizes:
        turn = d + f + k
        options = {"interpolation": turn % 2, "outside": (turn + a) % 3, "ceil_corner": turn % 3 == 1}
        dtype = DTYPES[(d + 2 * f + k + a) % 4]
        variants.append(Variant(kernel, dims, features, dtype, arch, **options, per_point=(f + a) % 2 == 1))
    return variants


SIZES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}


def compile_kernel(
    kernel: Any, arch: int, constants: dict[str, Any], types: dict[str, str], options: dict[str, int]
) -> Facts:
    """types: of pointers, by name; other arguments that are no constants are int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from camkernels import _machine_code

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # as a launch says of PyTorch's allocations; without it loads are not vectorised
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (found,) = _machine_code.read(Path(file.name))
    return Facts(found.registers, found.stack, compiled.metadata.shared, found.opcodes)


def compile_variant(variant: Variant) -> Facts:
    import torch

    from camkernels.triton import hash_grid

    name = {"jacobian": "rows"}.get(variant.kernel, variant.kernel)
    kernel = getattr(hash_grid, f"{name}_kernel")
    settings = hash_grid.Settings(
        scales=(), shift=0.5, layout=(), ceil_corner=variant.ceil_corner, outside=variant.outside,
        interpolation=variant.interpolation, active_levels=16, deterministic=False,
    )  # fmt: skip
    itemsize = max(SIZES[variant.dtype], 4) if variant.kernel == "table" else SIZES[variant.dtype]
    constants = hash_grid.constants(settings, variant.dims, variant.features, itemsize)
    constants |= {"counts_ptr": None} if not variant.per_point else {}
    constants |= {"j_ptr": None} if variant.kernel == "rows" else {}
    x = "fp64" if variant.dtype == "fp64" else "fp32"
    types = dict.fromkeys(("table_ptr", "grad_ptr", "y_ptr"), f"*{variant.dtype}")
    types |= dict.fromkeys(("x_ptr", "j_ptr", "gx_ptr", "sums_ptr"), f"*{x}")
    types |= {"counts_ptr": "*i32", "scales_ptr": "*fp32", "layout_ptr": "*i64"}
    options = hash_grid.OPTIONS[torch.float64 if x == "fp64" else torch.float32]
    return compile_kernel(kernel, variant.arch, constants, types, options)


LOOKUP_KERNELS = ("value", "grids", "coordinates")


class Lookup(NamedTuple):
    """A kernel of coordinate_modulation: dims 0 stands for a product of planes; dtype: of the grids."""

    kernel: str
    dims: int
    width: int
    dtype: str
    arch: int
    zeros: bool = False

    def __str__(self) -> str:
        return f"{self.kernel}-d{self.dims}w{self.width}-{self.dtype}-sm_{self.arch}"


def cover_lookups() -> list[Lookup]:
    """Every kernel, planes and dims 1 to 3, and architecture; dtypes, widths and paddings take turns."""
    sizes = product(enumerate(LOOKUP_KERNELS), range(4), enumerate(ARCHITECTURES))
    return [
        Lookup(kernel, dims, (16, 6)[(dims + k) % 2], DTYPES[(dims + k + a) % 4], arch, zeros=(dims + a) % 2 == 1)
        for (k, kernel), dims, (a, arch) in sizes
    ]


def compile_lookup(variant: Lookup) -> Facts:
    import torch

    from camkernels.triton import coordinate_modulation as lookup

    planes = variant.dims == 0
    settings = lookup.Settings(variant.zeros, align_corners=True, planes=planes, deterministic=False)
    shape = lookup.Shape(variant.width, 3 if planes else 1, (), (32,) * (2 if planes else variant.dims))
    u, dtype = ("fp64", torch.float64) if variant.dtype == "fp64" else ("fp32", torch.float32)
    types = dict.fromkeys(("rows_ptr", "grad_ptr", "y_ptr"), f"*{variant.dtype}")
    types |= dict.fromkeys(("u_ptr", "gu_ptr", "sums_ptr"), f"*{u}")
    kernel = getattr(lookup, f"{variant.kernel}_kernel")
    return compile_kernel(kernel, variant.arch, lookup.constants(settings, shape, dtype), types, lookup.OPTIONS[dtype])


def compile_any(variant: Variant | Lookup) -> Facts:
    return compile_variant(variant) if isinstance(variant, Variant) else compile_lookup(variant)


def compile_all(variants: Sequence[Variant | Lookup]) -> dict[Variant | Lookup, Facts]:
    """In a few processes: the compiler is not parallel by itself."""
    with ProcessPoolExecutor(min(4, cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return dict(zip(variants, pool.map(compile_any, variants, chunksize=4), strict=True))


def table(facts: dict[Variant | Lookup, Facts]) -> str:
    lines = [f"{'kernel':28} registers stack shared  memory instructions"]
    for variant, found in facts.items():
        counted = ", ".join(f"{n} {name}" for name, n in found.opcodes.items() if name.startswith(MEMORY))
        lines.append(f"{variant!s:28} {found.registers:9} {found.stack:5} {found.shared:6}  {counted}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(compile_all([*cover(), *cover_lookups()])))
