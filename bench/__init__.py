# SPDX-License-Identifier: MIT
"""Measures camkernels against other ways of computing the same thing: `python -m bench.run` in the repository root."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

try:
    import camkernels  # noqa: F401
except ImportError:  # a checkout whose package is not installed
    sys.path.insert(0, str(ROOT / "python"))
