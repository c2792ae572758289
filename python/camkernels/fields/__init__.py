# SPDX-License-Identifier: MIT
"""Models assembled from the layers. `MODELS` names those that `python -m camkernels fit --model` offers.

A model is built from its `config`, plain numbers and strings that are all a checkpoint needs to build it again.
"""

from torch import nn

from .image import HashImageField

__all__ = ["MODELS", "HashImageField"]

MODELS: dict[str, type[nn.Module]] = {"hash": HashImageField}
