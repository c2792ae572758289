# SPDX-License-Identifier: MIT
"""The version, written here once: the packaging metadata and `camkernels.__version__` read it."""

__version__ = "0.1.0"
