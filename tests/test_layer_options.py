# SPDX-License-Identifier: MIT
"""Layers refuse what is no value of an option, and name the option."""

import inspect
import math

import pytest
import torch

import camkernels

SIZES = {
    "HashGrid": {"dims": 2, "n_levels": 3, "log2_hashmap_size": 6},
    "ModulatedMLP": {"in_features": 2, "out_features": 3},
    "CoordinateModulation": {"hidden_layers": 2},
    "Modulate": {},
    "RadialBasis": {"count": 9, "dims": 2, "features": 4},
}
WRONG = (object(), 1j, "wrong", [None], {"wrong": 1}, torch.tensor(1.5), [[1.0]], math.nan)
NONE_IS_A_VALUE = ("activation", "neighbors")  # beside the options whose default it is
OPTIONS = [
    (layer, option)
    for layer in SIZES
    for option in inspect.signature(getattr(camkernels, layer)).parameters.values()
    if option.name != "device"  # of which PyTorch speaks
]
IDS = [f"{layer}-{option.name}" for layer, option in OPTIONS]


@pytest.mark.parametrize(("layer", "option"), OPTIONS, ids=IDS)
def test_what_is_no_value_is_refused_by_name(layer, option):
    may_be_none = option.default is None or option.name in NONE_IS_A_VALUE
    for value in WRONG if may_be_none else (*WRONG, None):
        with pytest.raises((TypeError, ValueError), match=rf"^({layer}|GridGeometry\.build): {option.name}\b"):
            getattr(camkernels, layer)(**SIZES[layer] | {option.name: value})
