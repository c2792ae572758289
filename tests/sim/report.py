# SPDX-License-Identifier: MIT
"""What a device would run: kernels compiled for real architectures; registers, spills, shared memory, instructions.

python -m sim.report [--arch 80 --arch 90] [FILE.cu ...]     prints the table (run in tests/; default: csrc/cuda)
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from camkernels import _machine_code

from . import build, toolkit

ARCHITECTURES = (80, 90)
# Opcodes worth a column: sums in global memory, tensor cores, matrix loads, asynchronous copies, local memory.
NOTABLE = ("RED", "REDG", "ATOMG", "ATOM", "ATOMS", "HMMA", "LDSM", "LDGSTS", "LDG", "STG", "LDL", "STL", "SHFL")


class SpillError(build.BuildError):
    """A kernel that must not spill registers to memory does."""


@dataclass(frozen=True)
class Kernel(_machine_code.Kernel):
    """With what the assembler said of registers that went to memory, in bytes."""

    spill_stores: int
    spill_loads: int

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


def _spills(log: str) -> dict[str, tuple[int, int]]:
    """{symbol: bytes stored and loaded} from ptxas -v."""
    found, symbol = {}, ""
    for line in log.splitlines():
        if match := re.search(r"Function properties for (\w+)", line):
            symbol = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[symbol] = int(match[1]), int(match[2])
    return found


def _compile(source: Path, arch: int, defines: Sequence[str]) -> list[Kernel]:
    found = toolkit.toolkit()
    if (reason := toolkit.why_no_nvcc()) or found is None:
        raise build.BuildError(str(reason))
    place = build.folder() / f"cubin-sm{arch}"
    place.mkdir(exist_ok=True)
    name = "-".join((source.stem, *(re.sub(r"\W", "_", text) for text in defines)))
    binary, log = place / f"{name}.cubin", place / f"{name}.log"
    if not (log.is_file() and build.up_to_date(binary)):
        command = (found.nvcc, "-cubin", "-std=c++20", "-O3", f"-arch=sm_{arch}", "-Xptxas=-v", f"-I{build.CSRC}")
        makefile = binary.with_suffix(".d")
        extra = (f"-I{build.SIM}", *(f"-D{text}" for text in defines), "-MMD", "-MF", makefile, "-o", binary)
        log.write_text(build.run((*command, *extra, source), f"nvcc sm_{arch}, {source.name}"))  # type: ignore[arg-type]
        build.record(binary, [source, *build.dependencies(makefile)])
    spills = _spills(log.read_text())
    return [Kernel(*vars(k).values(), *spills[k.symbol]) for k in _machine_code.read(binary)]


def compile_kernels(
    sources: Sequence[Path],
    architectures: Sequence[int] = ARCHITECTURES,
    may_spill: Callable[[str], bool] = lambda name: False,
    defines: Sequence[str] = (),
) -> list[Kernel]:
    """Compiles every file for every architecture.

    Raises SpillError if a kernel spills, unless `may_spill(demangled name)`; BuildError if nvcc refuses.
    """
    jobs = [(source, arch) for source in sources for arch in architectures]
    with ThreadPoolExecutor(max_workers=2) as pool:
        kernels = [kernel for found in pool.map(lambda job: _compile(*job, defines), jobs) for kernel in found]
    spilling = [k for k in kernels if k.spills and not may_spill(k.name)]
    if spilling:
        each = (f"{k.name} on sm_{k.arch}: {k.spill_stores} bytes stored, {k.spill_loads} loaded" for k in spilling)
        raise SpillError("register spills: " + "; ".join(each))
    return kernels


def table(kernels: Sequence[Kernel]) -> str:
    lines = [f"{'kernel':60} {'arch':>5} {'registers':>9} {'spills':>6} {'stack':>5} {'shared':>6}  instructions"]
    for k in kernels:
        notable = ", ".join(f"{opcode} {k.count(opcode)}" for opcode in NOTABLE if k.count(opcode))
        lines.append(f"{k.name:60} sm_{k.arch} {k.registers:9} {k.spills:6} {k.stack:5} {k.shared:6}  {notable}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Registers, spills, shared memory and instructions of every kernel.")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--arch", type=int, action="append")
    options = parser.parse_args()
    files = options.files or build.production().sources
    print(table(compile_kernels(files, options.arch or ARCHITECTURES, may_spill=lambda name: True)))


if __name__ == "__main__":
    main()
