# SPDX-License-Identifier: MIT
"""The main job: fit a field to data, with progress, metrics, checkpoints and pictures."""
