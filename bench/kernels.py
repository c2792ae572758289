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
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from camkernels import _ops

# Opcodes worth telling: sums in global memory (REDG, or RED on sm_80), loads and stores of global, shared and local
# memory, tensor cores. Sums of vectors and LDG.128 are what the kernels' layout was made for.
VECTORS = ("F32x2", "F32x4", "F16x2", "BF16x2", "BF16_V2")
COLUMNS = ("REDG", "RED", "ATOMG", "ATOM", "ATOMS", "LDG", "STG", "LDS", "STS", "LDL", "STL", "HMMA")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; sizes in bytes per block (shared) or thread (stack); opcodes with suffixes."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    opcodes: dict[str, int]

    def count(self, *parts: str) -> int:
        """Instructions whose opcode begins with the first part and has the others among its suffixes."""
        return sum(
            n
            for name, n in self.opcodes.items()
            if name.split(".")[0] == parts[0] and set(parts) <= set(name.split("."))
        )

    @property
    def local(self) -> int:
        """Instructions on local memory: arrays indexed at run time, and spilled registers."""
        return self.count("LDL") + self.count("STL")


def find_tool(name: str = "cuobjdump") -> Path | None:
    """cuobjdump: of CUDA_HOME, on PATH, in the usual folder, or inside Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = [Path(place) / "bin" / name for place in places if place]
    found.insert(1, Path(shutil.which(name) or ""))
    if spec is not None and spec.origin:
        found.append(Path(spec.origin).parent / "backends/nvidia/bin" / name)
    return next((path for path in found if path.is_file()), None)


def missing(library: Path) -> str | None:
    """Why a library cannot be read; None if it can."""
    if not library.exists():
        return f"{library} does not exist: CAMKERNELS_CUDA=1 python setup.py build_ext --inplace builds it"
    if find_tool() is None:
        return "there is no cuobjdump: install the CUDA toolkit or Triton, or set CUDA_HOME"
    return None


def dump(library: Path, option: str) -> str:
    """Output of cuobjdump; RuntimeError with its message if it fails."""
    done = subprocess.run([str(find_tool()), option, str(library)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump {option} {library}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def architectures(library: Path) -> list[str]:
    """Machine code in the library ("sm_80", ...), and PTX for later GPUs ("compute_90", ...)."""
    machine = re.findall(r"\.(sm_\d+\w?)\.cubin", dump(library, "--list-elf"))
    portable = re.findall(r"\.sm_(\d+\w?)\.ptx", dump(library, "--list-ptx"))
    return sorted(set(machine)) + [f"compute_{number}" for number in sorted(set(portable))]


@cache
def demangle(name: str) -> str:
    """A C++ name without return type, arguments and anonymous namespaces; as it is where c++filt is missing."""
    try:
        text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return name
    text = re.sub(
        r"\(anonymous namespace\)::|\((?:unsigned |signed )?\w+(?:::\w+)*\)(?=[\w-])|camk::(?:\w+::)?", "", text
    )
    return text.removeprefix("void ").partition("(")[0]


def _usage(text: str) -> Iterator[tuple[tuple[int, str], tuple[int, int, int]]]:
    """((arch, mangled name), (registers, stack, shared)) from -res-usage."""
    arch, name = 0, ""
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            yield (arch, name), (int(match[1]), int(match[2]), int(match[3]))


def _opcodes(text: str) -> dict[tuple[int, str], Counter[str]]:
    """Opcodes with suffixes per (arch, mangled name) from -sass."""
    arch, found, current = 0, {}, Counter()
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function : (\S+)", line):
            current = found.setdefault((arch, match[1]), Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", line):
            current[match[1]] += 1
    return found


def read(library: Path) -> list[Kernel]:
    """Every kernel in a library."""
    opcodes = _opcodes(dump(library, "-sass"))
    kernels = []
    for (arch, name), numbers in _usage(dump(library, "-res-usage")):
        kernels.append(Kernel(demangle(name), arch, *numbers, dict(sorted(opcodes[arch, name].items()))))
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.arch))


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
    kernels = [k for k in read(options.library) if options.arch in (None, k.arch) and options.name in k.name]
    print(json.dumps([dataclasses.asdict(k) for k in kernels], indent=1) if options.json else table(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
