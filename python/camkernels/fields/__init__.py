# SPDX-License-Identifier: MIT
"""Models assembled from the layers. `MODELS` names those that `python -m camkernels fit --model` offers.

A model keeps its arguments, plain numbers and strings, in `config`, from which a checkpoint builds it again, and names
its parameters with their learning rates in `parameter_groups(lr)`.
"""

from torch import nn

from .image import HashImageField

__all__ = ["MODELS", "HashImageField"]

MODELS: dict[str, type[nn.Module]] = {"hash": HashImageField}
