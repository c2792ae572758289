# SPDX-License-Identifier: MIT
"""What a GPU would run, read from a compiled library or kernel without one: for the tests and `bench.kernels`.

Needs cuobjdump, which comes with the CUDA toolkit and with Triton.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MISSING = "there is no cuobjdump: install the CUDA toolkit or Triton, or set CUDA_HOME"


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture; sizes in bytes per block (shared) or thread (stack); opcodes with suffixes."""

    name: str
    symbol: str  # the name as the compiler made it
    arch: int
    registers: int
    stack: int
    shared: int
    opcodes: dict[str, int]

    def count(self, *parts: str) -> int:
        """Instructions whose opcode is the first part and has the others among its suffixes."""
        words = ((name.split("."), n) for name, n in self.opcodes.items())
        return sum(n for found, n in words if found[0] == parts[0] and set(parts) <= set(found))

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


def dump(file: Path, option: str) -> str:
    """Output of cuobjdump; RuntimeError with its message if it fails, or is not there."""
    tool = find_tool()
    if tool is None:
        raise RuntimeError(MISSING)
    done = subprocess.run([str(tool), option, str(file)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"cuobjdump {option} {file}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def architectures(library: Path) -> list[str]:
    """Machine code in a library ("sm_80", ...), and PTX for later GPUs ("compute_90", ...)."""
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


def read(file: Path) -> list[Kernel]:
    """Every kernel in a library, or in the machine code of one architecture (.cubin)."""
    opcodes = _opcodes(dump(file, "-sass"))
    kernels = []
    for (arch, symbol), numbers in _usage(dump(file, "-res-usage")).items():
        arch = arch or next(iter(opcodes))[0]  # a .cubin does not say it twice
        kernels.append(Kernel(demangle(symbol), symbol, arch, *numbers, dict(sorted(opcodes[arch, symbol].items()))))
    return sorted(kernels, key=lambda kernel: (kernel.name, kernel.arch))


def _usage(text: str) -> dict[tuple[int, str], tuple[int, int, int]]:
    """{(arch, symbol): (registers, stack, shared)} from -res-usage; arch 0 where it is not said."""
    arch, symbol, found = 0, "", {}
    for line in text.splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.match(r"\s*Function (\S+):", line):
            symbol = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            found[arch, symbol] = int(match[1]), int(match[2]), int(match[3])
    return found


def _opcodes(text: str) -> dict[tuple[int, str], Counter[str]]:
    """Opcodes with suffixes per (arch, symbol) from -sass."""
    arch, found, current = 0, {}, Counter()
    for line in text.splitlines():
        if match := re.match(r"\s*code for sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function : (\S+)", line):
            current = found.setdefault((arch, match[1]), Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", line):
            current[match[1]] += 1
    return found
