# SPDX-License-Identifier: MIT
"""Inputs for checking each op: one file per family, no comparison in it. `camkernels.testing` makes cases of them."""
