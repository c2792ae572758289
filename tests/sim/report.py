# SPDX-License-Identifier: MIT
"""What a device would run: kernels compiled for real architectures; registers, spills, shared memory, instructions.

python -m sim.report [--arch 80 --arch 90] [FILE.cu ...]     prints the table (run in tests/; default: csrc/cuda)
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from . import build, toolkit

ARCHITECTURES = (80, 90)
# Opcodes worth a column: sums in global memory, tensor cores, matrix loads, asynchronous copies, local memory.
NOTABLE = ("RED", "REDG", "ATOMG", "ATOM", "ATOMS", "HMMA", "LDSM", "LDGSTS", "LDG", "STG", "LDL", "STL", "SHFL")


class SpillError(build.BuildError):
    """A kernel that must not spill registers to memory does."""


@dataclass(frozen=True)
class Kernel:
    """Resources of one kernel on one architecture; sizes in bytes. `instructions` counts opcodes with modifiers."""

    name: str
    arch: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    instructions: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads

    def count(self, opcode: str) -> int:
        """Instructions whose opcode is `opcode` or begins with it and a dot."""
        return sum(n for name, n in self.instructions.items() if name == opcode or name.startswith(opcode + "."))


@lru_cache(maxsize=4096)
def demangle(name: str) -> str:
    done = subprocess.run(["c++filt", name], capture_output=True, text=True)
    text = done.stdout.strip() or name
    return text.replace("(anonymous namespace)::", "").removeprefix("void ")


def _parse(log: str, arch: int) -> list[Kernel]:
    kernels, name, numbers = [], "", (0, 0, 0)
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            numbers = (int(match[1]), int(match[2]), int(match[3]))
        elif (match := re.search(r"Used (\d+) registers", line)) and name:
            shared = re.search(r"(\d+) bytes smem", line)
            kernels.append(Kernel(name, arch, int(match[1]), *numbers, int(shared[1]) if shared else 0))
            name, numbers = "", (0, 0, 0)
    return kernels


def _disassemble(binary: Path) -> dict[str, Counter[str]]:
    """Opcode counts per mangled kernel name; empty without cuobjdump."""
    tool = toolkit.binary_tool("cuobjdump")
    if tool is None:
        return {}
    text = build.run((tool, "-sass", binary), "cuobjdump")
    found: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = found.setdefault(match[1], Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*([A-Z][A-Z0-9_.x]*)", line):
            current[match[1]] += 1
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
    opcodes = _disassemble(binary)
    kernels = _parse(log.read_text(), arch)
    return [replace(k, name=demangle(k.name), instructions=opcodes.get(k.name, Counter())) for k in kernels]


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
        name = k.name.split("(")[0]
        lines.append(f"{name:60} sm_{k.arch} {k.registers:9} {k.spills:6} {k.stack:5} {k.shared:6}  {notable}")
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
