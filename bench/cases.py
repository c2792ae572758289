# SPDX-License-Identifier: MIT
"""What is measured: the cases of every op.

A new op adds a file with a function that yields its cases and names it in `OPS`; nothing else in this folder needs to
change, except providers where the op has competitors of its own (`providers.py`).
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator

from . import hash_grid_cases, modulated_mlp_cases, modulation_cases, radial_basis_cases
from .case import Case

OPS: dict[str, Callable[[], Iterator[Case]]] = {
    "hash_grid": hash_grid_cases.make,
    "modulated_mlp": modulated_mlp_cases.make,
    "radial_basis": radial_basis_cases.make,
    "coordinate_modulation": functools.partial(modulation_cases.make, modulation_cases.lookup),
    "modulate": functools.partial(modulation_cases.make, modulation_cases.rows),
    "hash_grid_mlp": functools.partial(modulation_cases.make, modulation_cases.encoded),
}


@functools.cache
def all_cases() -> tuple[Case, ...]:
    return tuple(case for make in OPS.values() for case in make())


def select(pattern: str | None = None, tag: str | None = None) -> list[Case]:
    """Cases with a tag whose name matches a shell pattern, or one of several with commas. ValueError without any."""
    patterns = [part.strip() for part in (pattern or "*").split(",")]
    found = [
        case
        for case in all_cases()
        if any(fnmatch.fnmatchcase(case.name, one) for one in patterns) and (tag is None or tag in case.tags)
    ]
    if not found:
        raise ValueError(f"no case matches {pattern or tag!r}; `python -m bench.run --list` shows them")
    return found


def find(name: str) -> Case:
    """The case of that name."""
    return next(case for case in all_cases() if case.name == name)
