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
SIZES = {"fp64": 8, "fp32": 4, "fp16": 2, "bf16": 2}
MLP_DTYPES = ("fp32", "fp16", "bf16")
ARCHITECTURES = (80, 90)
MEMORY = ("HGMMA", "HMMA", "LD", "ST", "RED", "ATOM", "SHFL", "BAR")


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


class MLPVariant(NamedTuple):
    """A kernel of the MLP, alone or fused with the grid. dtype: of the parameters; x is fp32."""

    kernel: str  # "value", "gradients" or "sums"
    width: int
    dtype: str
    arch: int
    fused: bool = False
    precision: str = "tf32x3"

    def __str__(self) -> str:
        name = "hash_grid_mlp" if self.fused else "mlp"
        return f"{name}-{self.kernel}-{self.width}-{self.dtype}-{self.precision}-sm_{self.arch}"


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


def cover_mlp() -> list[MLPVariant]:
    """Every kernel at every width, alone and behind a grid; dtypes take turns, float32 where there are most registers.

    Sums are of the same pieces from 32 channels on."""
    variants = []
    for (k, kernel), (w, width), (a, arch) in product(
        enumerate(("value", "gradients")), enumerate((16, 32, 64, 128, 256)), enumerate(ARCHITECTURES)
    ):
        variants.append(MLPVariant(kernel, width, MLP_DTYPES[(k + w + a) % 3], arch))
    variants += [MLPVariant("sums", width, "fp32", arch) for width in (16, 32) for arch in ARCHITECTURES]
    variants += [MLPVariant(kernel, 256, "fp32", arch) for kernel in ("value", "gradients") for arch in ARCHITECTURES]
    variants += [MLPVariant("value", width, "fp32", 90) for width in (64, 128)]
    variants += [MLPVariant(kernel, 64, "fp16", 90, fused=True) for kernel in ("value", "gradients")]
    variants += [MLPVariant("value", 16, "fp32", 90, fused=True), MLPVariant("gradients", 256, "fp32", 80, fused=True)]
    variants += [MLPVariant("value", 128, dtype, 90, fused=True) for dtype in ("fp32", "bf16")]
    variants += [MLPVariant("gradients", 128, dtype, 80, fused=True) for dtype in ("fp32", "bf16")]
    variants += [MLPVariant("value", 64, "fp32", 90, precision="tf32")]
    return list(dict.fromkeys(variants))


def compile_grid(variant: Variant) -> Facts:
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
    return compile_kernel(kernel, types, constants, variant.arch, options)


def compile_mlp(variant: MLPVariant) -> Facts:
    """An MLP of two hidden layers, normalised and with modulation, behind 32 features or a grid of 16 levels of 2."""
    import triton.language as tl

    from camkernels.triton import hash_grid, hash_grid_mlp, modulated_mlp

    module = hash_grid_mlp if variant.fused else modulated_mlp
    outs = (variant.width, variant.width, 3)
    is_value = variant.kernel == "value"
    shape = modulated_mlp.FORWARD[variant.arch >= 90][variant.width] if is_value else modulated_mlp.THROUGH_MEMORY
    if variant.fused:
        shape = hash_grid_mlp.encoding_shape(shape)
    plan = modulated_mlp.Plan(
        features=32, outs=outs, activations=(1, 1, 0), omegas=(1.0,) * 3, skips=(False,) * 3, hidden=2, channels=1,
        point_norm=True, eps=1e-5, number=tl.float32, precision=variant.precision, block=shape.block,
        chunk=shape.chunk, in_memory=shape.in_memory, keeps=not is_value,
        group=(2, 2) if variant.fused else None,
    )  # fmt: skip
    settings = hash_grid.Settings((1.0,) * 48, 0.5, (), False, 0, 0, 16, False)
    constants = {"PLAN": plan, "GRID": hash_grid_mlp.grid_of(settings, 3, 2), "frequencies_ptr": None}
    constants |= {"counts_ptr": None} | ({} if shape.in_memory else {"rows_ptr": None})
    parameters = ("table_ptr", "weights", "biases", "modulation_ptr", "y_ptr", "g_ptr")
    types = dict.fromkeys(parameters, f"*{variant.dtype}")
    numbers = ("x_ptr", "gx_ptr", "gradient_ptr", "rows_ptr", "biases_ptr", "sums_ptr", "table_sums_ptr", "scales_ptr")
    types |= dict.fromkeys(numbers, "*fp32") | {"layout_ptr": "*i64"}
    types |= {name: (types[name],) * len(outs) for name in ("weights", "biases")}
    kernel = modulated_mlp.sums_kernel if variant.kernel == "sums" else getattr(module, f"{variant.kernel}_kernel")
    options = modulated_mlp.SUM_OPTIONS if variant.kernel == "sums" else shape.options
    return compile_kernel(kernel, types, constants, variant.arch, options)


def compile_kernel(kernel: Any, types: dict[str, Any], constants: dict[str, Any], arch: int, options: dict) -> Facts:
    """types: of the tensors, or of the tensors of a list; other arguments are int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from camkernels import _machine_code

    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    paths = [(i,) for i, name in enumerate(names) if isinstance(signature[name], str) and name.endswith("_ptr")]
    paths += [(i, k) for i, kind in enumerate(signature.values()) if isinstance(kind, tuple) for k in range(len(kind))]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # as a launch says of PyTorch's allocations; without it loads are not vectorised
        attrs={path: [["tt.divisibility", 16]] for path in paths},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (found,) = _machine_code.read(Path(file.name))
    return Facts(found.registers, found.stack, compiled.metadata.shared, found.opcodes)


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
    return compile_kernel(kernel, types, lookup.constants(settings, shape, dtype), variant.arch, lookup.OPTIONS[dtype])


class Basis(NamedTuple):
    """A kernel of radial_basis: per_point 0 stands for all kernels; dtype: of the features."""

    kernel: str  # "value", "features" (their gradient alone) or "gradients"
    kind: str
    shape: str
    dims: int
    per_point: int
    features: int
    dtype: str
    arch: int
    waves: bool = True
    true_normalizer: bool = False

    def __str__(self) -> str:
        sizes = f"d{self.dims}k{self.per_point}f{self.features}"
        return f"{self.kernel}-{self.kind}_{self.shape}-{sizes}-{self.dtype}-sm_{self.arch}"


def published_bases() -> list[Basis]:
    """NeuRBF's image and shape, features in float32."""
    fields = (("ivq", "full", 2, 4, 32), ("nlin", "isotropic", 3, 8, 16))
    return [
        Basis(kernel, *field, "fp32", arch)
        for kernel, field, arch in product(("value", "features", "gradients"), fields, ARCHITECTURES)
    ]


def cover_bases() -> list[Basis]:
    """The gradients of every kind; all else takes turns. Waves of float64 are left out: they are the device library's,
    which has a stack."""
    from camkernels._radial_basis import KINDS, SHAPES

    variants = []
    for i, kind in enumerate(KINDS):
        dtype = DTYPES[(i + i // 4) % 4]
        sizes = SHAPES[i % 5], 1 + i % 4, (0, 10, 64)[i % 3], (5, 64, 16)[(i + i // 3) % 3]
        options = {"waves": dtype != "fp64", "true_normalizer": i % 2 == 1}
        variants.append(Basis("gradients", kind, *sizes, dtype, ARCHITECTURES[i // 2 % 2], **options))
    return variants


def compile_basis(variant: Basis) -> Facts:
    from dataclasses import replace

    import torch

    from camkernels._radial_basis import KINDS, SHAPES
    from camkernels.triton import radial_basis

    place = KINDS.index(variant.kind), SHAPES.index(variant.shape)
    settings = radial_basis.Settings(*place, True, not variant.true_normalizer, 1e-8, 0, False)
    number, dtype = ("fp64", torch.float64) if variant.dtype == "fp64" else ("fp32", torch.float32)
    plan = radial_basis.plan_of(settings, variant.dims, variant.features, variant.per_point, dtype)
    all_gradients = variant.kernel == "gradients"
    constants = {"PLAN": replace(plan, along=all_gradients)}
    absent = {
        "neighbors_ptr": variant.per_point == 0,
        "frequencies_ptr": not variant.waves,
        "phase_ptr": not variant.waves,
        "gx_ptr": not all_gradients,
        "of_centers_ptr": not all_gradients,
        "of_shapes_ptr": not all_gradients or plan.width == 0,
        "of_phase_ptr": not (all_gradients and variant.waves),
    }
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    kernel = radial_basis.value_kernel if variant.kernel == "value" else radial_basis.gradients_kernel
    types = dict.fromkeys((name for name in kernel.arg_names if name.endswith("_ptr")), f"*{number}")
    types |= dict.fromkeys(("features_ptr", "g_ptr", "y_ptr"), f"*{variant.dtype}") | {"neighbors_ptr": "*i32"}
    return compile_kernel(kernel, types, constants, variant.arch, radial_basis.OPTIONS)


AnyVariant = Variant | Lookup | MLPVariant | Basis


def compile_any(variant: AnyVariant) -> Facts:
    compilers = {Variant: compile_grid, Lookup: compile_lookup, MLPVariant: compile_mlp, Basis: compile_basis}
    return compilers[type(variant)](variant)


def compile_all(variants: Sequence[AnyVariant]) -> dict[AnyVariant, Facts]:
    """In a few processes: the compiler is not parallel by itself."""
    with ProcessPoolExecutor(min(4, cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return dict(zip(variants, pool.map(compile_any, variants, chunksize=4), strict=True))


def table(facts: dict[AnyVariant, Facts]) -> str:
    lines = [f"{'kernel':40} registers stack shared  memory instructions"]
    for variant, found in facts.items():
        counted = ", ".join(f"{n} {name}" for name, n in found.opcodes.items() if name.startswith(MEMORY))
        lines.append(f"{variant!s:40} {found.registers:9} {found.stack:5} {found.shared:6}  {counted}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(compile_all([*cover(), *cover_lookups(), *cover_mlp(), *published_bases(), *cover_bases()])))
