# SPDX-License-Identifier: MIT
"""Models assembled from the layers. `MODELS` names those that `python -m camkernels fit image --model` offers,
`SHAPE_MODELS` those of `fit shape`.

A model keeps its arguments, plain numbers and strings, in `config`, from which a checkpoint builds it again, and names
its parameters with their learning rates in `parameter_groups(lr)`, of which `learning_rate` is a good one to start
with; those of the two lists name the ops that compute them in `ops`, and what modulates them, or None, is `modulation`.
Models of a public code take over its parameters by `load_official`; `drop_in` has replacements for its classes.
"""

from torch import nn

from .encodings import RandFourierFeature, SinusoidalEncoder
from .field import Field, parameter_groups
from .fourier import CAMImageField, FourierImageField
from .hash_cam import HashCAMField
from .image import HashImageField
from .mipnerf import MipNeRFField, RayModulation, spherical
from .neurbf import NeuRBFField
from .neurbf_image import NeuRBFImageField
from .neurbf_radiance import KPlanesKernels, TensoRFKernels
from .neurbf_shape import NeuRBFSDFField
from .radiance import DynamicRadianceField, RadianceField
from .shape import HashSDFField
from .signal import SignalField
from .video import VideoField

__all__ = [
    "MODELS",
    "SHAPE_MODELS",
    "CAMImageField",
    "DynamicRadianceField",
    "Field",
    "FourierImageField",
    "HashCAMField",
    "HashImageField",
    "HashSDFField",
    "KPlanesKernels",
    "MipNeRFField",
    "NeuRBFField",
    "NeuRBFImageField",
    "NeuRBFSDFField",
    "RadianceField",
    "RandFourierFeature",
    "RayModulation",
    "SignalField",
    "SinusoidalEncoder",
    "TensoRFKernels",
    "VideoField",
    "parameter_groups",
    "spherical",
]

MODELS: dict[str, type[nn.Module]] = {
    "hash": HashImageField,
    "hash-cam": HashCAMField,
    "cam": CAMImageField,
    "fourier": FourierImageField,
    "neurbf": NeuRBFImageField,
}

SHAPE_MODELS: dict[str, type[nn.Module]] = {"hash": HashSDFField, "neurbf": NeuRBFSDFField}
