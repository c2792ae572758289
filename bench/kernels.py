# SPDX-License-Identifier: MIT
"""What a GPU would run, read from the built library: `python -m bench.kernels [LIBRARY]`.

    python -m bench.kernels                            every kernel: registers, stack, shared memory, instructions
    python -m bench.kernels --arch 90 --name table     of one architecture, with "table" in the name
    python -m bench.kernels --json                     the same, every opcode counted

Needs cuobjdump, which comes with the CUDA toolkit and with Triton; no GPU. "shared" is what is declared, on sm_90 with
1024 bytes of the system's. "local" counts instructions on local memory (LDL, STL): arrays indexed at run time, and
registers that spill, of which the build allows none. `python -m sim.report` in tests/ compiles single sources and tells
spills apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from camkernels import _machine_code, _ops
from camkernels._machine_code import Kernel

# Opcodes worth telling: sums in global memory (REDG, or RED on sm_80), loads and stores of global, shared and local
# memory, tensor cores. Sums of vectors and LDG.128 are what the kernels' layout was made for.
VECTORS = ("F32x2", "F32x4", "F16x2", "BF16x2", "BF16_V2")
COLUMNS = ("REDG", "RED", "ATOMG", "ATOM", "ATOMS", "LDG", "STG", "LDS", "STS", "LDL", "STL", "HMMA")


def missing(library: Path) -> str | None:
    """Why a library cannot be read; None if it can."""
    if not library.exists():
        return f"{library} does not exist: CAMKERNELS_CUDA=1 python setup.py build_ext --inplace builds it"
    return None if _machine_code.find_tool() else _machine_code.MISSING


def notable(kernel: Kernel) -> str:
    """Counts of the columns, with those of the widest forms beside them."""
    told = []
    for opcode in COLUMNS:
        total, wide = kernel.count(opcode), kernel.count(opcode, "128")
        vectors = sum(kernel.count(opcode, form) for form in VECTORS)
        if total:
            extra = [f"{wide} of 128 bits"] * (wide > 0) + [f"{vectors} vectors"] * (vectors > 0)
            told.append(f"{opcode} {total}" + (f" ({', '.join(extra)})" if extra else ""))
    return ", ".join(told)


def table(kernels: list[Kernel]) -> str:
    """A line per kernel, and how many use local memory."""
    lines = [f"{'registers':>9} {'stack':>5} {'shared':>6} {'local':>6}  {'arch':5} kernel: instructions"]
    for k in kernels:
        lines.append(f"{k.registers:9} {k.stack:5} {k.shared:6} {k.local:6}  sm_{k.arch} {k.name}: {notable(k)}")
    return "\n".join([*lines, f"{len(kernels)} kernels, {sum(k.local > 0 for k in kernels)} of them use local memory"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", nargs="?", type=Path, default=_ops.FOLDER / "_cuda.so")
    parser.add_argument("--arch", type=int, help="80 or 90, ...")
    parser.add_argument("--name", default="", help="part of the kernel's name")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    if (reason := missing(options.library)) is not None:
        print(f"bench.kernels: {reason}", file=sys.stderr)
        return 2
    kernels = [
        k for k in _machine_code.read(options.library) if options.arch in (None, k.arch) and options.name in k.name
    ]
    print(json.dumps([dataclasses.asdict(k) for k in kernels], indent=1) if options.json else table(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
