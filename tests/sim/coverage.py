# SPDX-License-Identifier: MIT
"""Line coverage of kernels: which lines of csrc/cuda a simulated test run executed.

`library.load(build.production("cov", namespace="camkernels_cov"))`, run operators of `torch.ops.camkernels_cov`, then
`measure` that library. One process may load it beside the plain one. What a process of its own recorded, as variant
'checked' needs, is there when it has ended: `forget` before, `read` after.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from . import build, toolkit
from .library import Library


@dataclass(frozen=True)
class FileCoverage:
    """Lines of one file that hold code, and those of them that never ran. A template's line counts as run if any
    instantiation ran it."""

    path: Path
    lines: int
    uncovered: tuple[int, ...]

    @property
    def percent(self) -> float:
        return 100.0 * (self.lines - len(self.uncovered)) / max(self.lines, 1)

    def __str__(self) -> str:
        missed = f", not run: {', '.join(map(str, self.uncovered))}" if self.uncovered else ""
        return f"{self.path.name}: {self.percent:.1f} % of {self.lines} lines{missed}"


def gcov() -> str | None:
    """The gcov of the compiler in use (its version must match)."""
    compiler = toolkit.compiler()
    if compiler is None:
        return None
    beside = re.sub(r"g\+\+(?=[^/]*$)", "gcov", compiler)
    return shutil.which(beside) or shutil.which("gcov")


def reset(library: Library) -> None:
    """Forgets earlier runs, also what this process counted so far."""
    library.write_coverage()
    forget(library.path)


def forget(library: Path) -> None:
    for file in _data(library):
        file.unlink()


def _data(library: Path) -> list[Path]:
    counters = (path.with_suffix(".gcda") for path in build.made_from(library))
    return sorted(path for path in counters if path.is_file())


def measure(library: Library, under: Path = build.ROOT) -> list[FileCoverage]:
    """Coverage by this process and those before it."""
    library.write_coverage()
    return read(library.path, under)


def read(library: Path, under: Path = build.ROOT) -> list[FileCoverage]:
    """Coverage of every project file (.cu, .cuh, .h below `under`, the simulator left out) of a library on disk."""
    data = _data(library)
    tool = gcov()
    if not data or tool is None:
        raise RuntimeError("no coverage was recorded: build with variant 'cov' or 'checked', and have gcov beside g++")
    hits: dict[Path, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for line in build.run((tool, "--json-format", "--stdout", *data), "gcov").splitlines():
        for file in json.loads(line)["files"] if line.startswith("{") else ():
            path = Path(file["file"]).resolve()
            if not path.is_relative_to(under) or path.parent == build.SIM:
                continue
            for entry in file["lines"]:
                hits[path][entry["line_number"]] += entry["count"]
    found = []
    for path, lines in sorted(hits.items()):
        missed = tuple(sorted(number for number, count in lines.items() if count == 0))
        found.append(FileCoverage(path, len(lines), missed))
    return found
