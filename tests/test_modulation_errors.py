# SPDX-License-Identifier: MIT
"""What is wrong with a call of the modulated MLP family is refused in a sentence, by every function and every layer."""

import pytest
import torch

import camkernels
from camkernels import _backends, _ops
from conftest import backends

X = torch.rand(5, 3)
WEIGHTS = [torch.rand(8, 3), torch.rand(8, 8), torch.rand(2, 8)]
BIASES = [torch.rand(8), torch.rand(8), torch.rand(2)]
MLP = {"x": X, "weights": WEIGHTS, "biases": BIASES, "modulation": torch.rand(5, 2, 2)}
META = torch.rand(8, 3, device="meta")
NAN = float("nan")

MLPS = {
    "a list of points": (TypeError, r"x must be a torch\.Tensor, got list", {"x": X.tolist()}),
    "integer points": (TypeError, r"x must be float32, .*, got torch\.int64; convert", {"x": X.long()}),
    "no axis": (ValueError, r"x must have shape \[\.\.\., in\], got \[\]", {"x": torch.tensor(1.0)}),
    "points of other features": (
        ValueError,
        r"weights\[0\] must have shape \[out, 4\], got \[8, 3\]; x has 4 features",
        {"x": torch.rand(5, 4)},
    ),
    "one tensor for the weights": (TypeError, r"weights must be a list of tensors, .*, got Tensor", {"weights": X}),
    "no weights": (ValueError, r"weights must hold at least one layer", {"weights": []}),
    "a weight that is no tensor": (TypeError, r"weights\[1\] must be a torch\.Tensor", {"weights": [WEIGHTS[0], None]}),
    "layers that do not meet": (
        ValueError,
        r"weights\[1\] must have shape \[out, 8\], got \[8, 7\]; layer 0 gives 8 features",
        {"weights": [WEIGHTS[0], torch.rand(8, 7), WEIGHTS[2]]},
    ),
    "a skip that no weight takes": (
        ValueError,
        r"weights\[2\] must have shape \[out, 11\], got \[2, 8\]; layer 1 gives 8 features and its skip 3",
        {"skips": [1]},
    ),
    "a weight without width": (
        ValueError,
        r"weights\[0\] must have at least one row and column, got \[0, 3\]",
        {"weights": [torch.rand(0, 3), torch.rand(2, 0)], "biases": None},
    ),
    "a bias too few": (ValueError, r"biases must have one item per weight, 3, got 2", {"biases": BIASES[:2]}),
    "a bias of another width": (
        ValueError,
        r"biases\[1\] must have shape \[8\], got \[7\]; weights\[1\] has 8 rows",
        {"biases": [BIASES[0], torch.rand(7), BIASES[2]]},
    ),
    "mixed dtypes": (
        TypeError,
        r"weights and biases must have one dtype, got torch\.float16, torch\.float32; convert",
        {"weights": [w.half() for w in WEIGHTS]},
    ),
    "a weight elsewhere": (
        ValueError,
        r"all tensors must be on one device, got x on cpu, weights\[0\] on meta",
        {"weights": [META, *WEIGHTS[1:]]},
    ),
    "modulation elsewhere": (
        ValueError,
        r"all tensors must be on one device, .*modulation on meta",
        {"modulation": torch.rand(5, 2, 2, device="meta")},
    ),
    "integer modulation": (TypeError, r"modulation must be float32", {"modulation": torch.ones(5, 2, 2).long()}),
    "modulation of three layers": (
        ValueError,
        r"modulation must have shape \[\.\.\., 2, 2\] or \[\.\.\., 2, 2, 8\] .* got \[5, 3, 2\]",
        {"modulation": torch.rand(5, 3, 2)},
    ),
    "modulation of other points": (
        ValueError,
        r"modulation must .* leading axes that broadcast to those of x, \[5\], got \[4, 2, 2\]",
        {"modulation": torch.rand(4, 2, 2)},
    ),
    "modulation of more points": (
        ValueError,
        r"modulation must have .* got \[6, 5, 2, 2\]",
        {"modulation": torch.rand(6, 5, 2, 2)},
    ),
    "modulation of another width": (
        ValueError,
        r"modulation must have shape .* got \[5, 2, 2, 7\]",
        {"modulation": torch.rand(5, 2, 2, 7)},
    ),
    "unknown activation": (ValueError, r"activation must be one of None, 'relu', .*'swish'", {"activation": "swish"}),
    "an unknown one of several": (ValueError, r"activation must be one .*'x'", {"activation": ["relu", "x"]}),
    "an activation too many": (
        ValueError,
        r"activation must be one value or a list of one per hidden layer, 2, got 3 items",
        {"activation": ["relu"] * 3},
    ),
    "unknown output activation": (ValueError, r"output_activation must be one of", {"output_activation": "softmax"}),
    "an output activation without output": (
        ValueError,
        r"output_activation must be None where there is no output layer, got 'tanh'; put it last",
        {"output_activation": "tanh", "output_layer": False},
    ),
    "a sine at the end of several omegas": (
        ValueError,
        r"omega must be one number where output_activation is 'sine'",
        {"output_activation": "sine", "omega": [1.0, 2.0]},
    ),
    "an omega too few": (ValueError, r"omega must be one value or a list .* got 1 items", {"omega": [30.0]}),
    "an omega of NaN": (ValueError, r"omega must be finite, got nan", {"omega": NAN}),
    "omega by name": (TypeError, r"omega must be a number, got 'fast'", {"omega": "fast"}),
    "a skip behind the last layer": (
        ValueError,
        r"skips must name some of the 2 hidden layers, counted from 0, got 2",
        {"skips": [2]},
    ),
    "a skip from the end": (ValueError, r"skips must name .* got -1", {"skips": [-1]}),
    "one skip": (TypeError, r"skips must be a list of hidden layers, got 1; for none leave it empty", {"skips": 1}),
    "a skip that is a flag": (ValueError, r"skips must name .* got True", {"skips": [True]}),
    "an output layer by name": (TypeError, r"output_layer must be True or False, got 'no'", {"output_layer": "no"}),
    "frequencies that are a list": (TypeError, r"frequencies must be a torch.Tensor", {"frequencies": [1.0]}),
    "a norm of images": (ValueError, r"norm must be one of None, 'point', got 'frame'", {"norm": "frame"}),
    "a negative eps": (ValueError, r"eps must be finite and at least 0, got -1", {"eps": -1.0}),
    "no frequencies": (
        ValueError,
        r"frequencies must be given for 'residual_sine', a tensor \[8\]",
        {"activation": "residual_sine"},
    ),
    "frequencies of another width": (
        ValueError,
        r"frequencies must have shape \[8\], got \[7\]",
        {"activation": ["tanh", "residual_sine"], "frequencies": torch.rand(7)},
    ),
    "frequencies that learn": (
        ValueError,
        r"frequencies must be constants, got a tensor that requires a gradient",
        {"activation": "residual_sine", "frequencies": torch.rand(8, requires_grad=True)},
    ),
}

H = torch.rand(5, 4, 3)
MODULATE = {"h": H, "gamma": torch.rand(5, 1, 1), "beta": torch.rand(3)}
MODULATES = {
    "a list of features": (TypeError, r"h must be a torch\.Tensor", {"h": H.tolist()}),
    "integer gamma": (TypeError, r"gamma must be float32, .* got torch\.int64", {"gamma": torch.ones(3).long()}),
    "beta of other channels": (
        ValueError,
        r"beta must broadcast to h, \[5, 4, 3\], got \[4\]; scalars per point",
        {"beta": torch.rand(4)},
    ),
    "gamma that would enlarge h": (
        ValueError,
        r"gamma must broadcast .* \[2, 5, 4, 3\]",
        {"gamma": torch.rand(2, 5, 4, 3)},
    ),
    "unknown norm": (ValueError, r"norm must be one of None, 'point', 'ray', 'frame', got 'layer'", {"norm": "layer"}),
    "a ray without samples": (
        ValueError,
        r"h must have shape \[\.\.\., S, C\] for norm='ray', none of size 0, got \[3\]",
        {"h": torch.rand(3), "norm": "ray", "gamma": torch.rand(1)},
    ),
    "a flat frame": (ValueError, r"h must have shape \[\.\.\., C, H, W\]", {"h": H[0], "norm": "frame"}),
    "no channels": (ValueError, r"h must have shape \[\.\.\., C\] .* \[5, 4, 0\]", {"h": H[..., :0]}),
    "unknown activation": (ValueError, r"activation must be one of", {"activation": "Relu"}),
    "several omegas": (TypeError, r"omega must be a number, got \[1\.0\]", {"omega": [1.0]}),
    "no frequencies": (ValueError, r"frequencies must be given .* \[3\]", {"activation": "residual_sine"}),
    "gamma elsewhere": (ValueError, r"all tensors must be on one device", {"gamma": torch.rand(1, device="meta")}),
}

LOOKUP = {"coords": torch.rand(5, 2), "grids": torch.rand(3, 2, 4, 5)}
LOOKUPS = {
    "a list of coordinates": (TypeError, r"coords must be a torch\.Tensor", {"coords": [[0.0, 0.0]]}),
    "integer coordinates": (TypeError, r"coords must be float32", {"coords": torch.zeros(5, 2).long()}),
    "no axis": (ValueError, r"coords must have shape \[\.\.\., d\], d from 1 to 7,", {"coords": torch.tensor(0.5)}),
    "eight axes": (ValueError, r"coords must .* d from 1 to 7, .* got \[5, 8\]", {"coords": torch.rand(5, 8)}),
    "integer grids": (TypeError, r"grids must be float32", {"grids": torch.ones(3, 2, 4, 5).long()}),
    "grids of other axes": (
        ValueError,
        r"grids must have shape \[layers, 2, \*nodes\] or \[layers, 2, C, \*nodes\] with 4 axes of nodes",
        {"coords": torch.rand(5, 4)},
    ),
    "three numbers per layer": (
        ValueError,
        r"grids must have .* got \[3, 3, 4, 5\]",
        {"grids": torch.rand(3, 3, 4, 5)},
    ),
    "an axis without nodes": (
        ValueError,
        r"grids must .* no size 0, got \[3, 2, 0, 5\]",
        {"grids": torch.rand(3, 2, 0, 5)},
    ),
    "unknown padding": (ValueError, r"padding must be one of 'border', 'zeros', got 'wrap'", {"padding": "wrap"}),
    "unknown combine": (ValueError, r"combine must be one of", {"combine": "sum"}),
    "a number for a truth": (TypeError, r"align_corners must be True or False, got 1", {"align_corners": 1}),
    "planes for two axes": (
        ValueError,
        r"coords must have shape \[\.\.\., 3\] for combine='plane_product', got \[5, 2\]",
        {"combine": "plane_product"},
    ),
    "planes that are a volume": (
        ValueError,
        r"grids must have shape \[layers, 2, 3, \*nodes\] .* with 2 axes of nodes",
        {"coords": torch.rand(5, 3), "combine": "plane_product", "grids": torch.rand(3, 2, 4, 5, 6)},
    ),
    "grids elsewhere": (
        ValueError,
        r"all tensors must be on one device",
        {"grids": torch.rand(3, 2, 4, 5, device="meta")},
    ),
}
CALLS = [
    pytest.param(op, arguments | changes, error, sentence, id=f"{op}-{name}")
    for op, arguments, table in (
        ("modulated_mlp", MLP, MLPS),
        ("modulate", MODULATE, MODULATES),
        ("coordinate_modulation", LOOKUP, LOOKUPS),
    )
    for name, (error, sentence, changes) in table.items()
]


@pytest.mark.parametrize(("op", "arguments", "error", "sentence"), CALLS)
def test_calls(op, arguments, error, sentence):
    with pytest.raises(error, match=f"^{op}: {sentence}"):
        getattr(camkernels, op)(**arguments)
    if isinstance(arguments[next(iter(arguments))], torch.Tensor):  # the definition refuses the same
        with pytest.raises(error, match=f"^{op}: {sentence}"):
            getattr(camkernels.reference, op)(**arguments)


@pytest.mark.parametrize(
    ("op", "arguments"), [("modulated_mlp", MLP), ("modulate", MODULATE), ("coordinate_modulation", LOOKUP)]
)
def test_what_the_errors_are_made_from_is_right(op, arguments):
    assert getattr(camkernels, op)(**arguments).isfinite().all()


# ---- layers ----------------------------------------------------------------------------------------------------------

SIZES = {"in_features": 3, "out_features": 2}
LAYERS = [
    ("ModulatedMLP", ValueError, r"width must be at least 1, got 0", SIZES | {"width": 0}),
    ("ModulatedMLP", ValueError, r"in_features must be at least 1, got 0", SIZES | {"in_features": 0}),
    ("ModulatedMLP", TypeError, r"out_features must be an int, got 2\.0", SIZES | {"out_features": 2.0}),
    ("ModulatedMLP", ValueError, r"hidden_layers must be at least 0, got -1", SIZES | {"hidden_layers": -1}),
    (
        "ModulatedMLP",
        ValueError,
        r"hidden_layers must be at least 1, got 0",
        SIZES | {"hidden_layers": 0, "output_layer": False},
    ),
    ("ModulatedMLP", ValueError, r"activation must be one of", SIZES | {"activation": "swish"}),
    (
        "ModulatedMLP",
        ValueError,
        r"activation must be one value or a list .* 2, got 3",
        SIZES | {"activation": ["relu"] * 3},
    ),
    ("ModulatedMLP", ValueError, r"norm must be one of None, 'point', got 'ray'", SIZES | {"norm": "ray"}),
    ("ModulatedMLP", ValueError, r"skips must name some of the 2 hidden layers, .* got 5", SIZES | {"skips": (5,)}),
    ("ModulatedMLP", ValueError, r"frequencies must be given", SIZES | {"activation": "residual_sine"}),
    (
        "ModulatedMLP",
        ValueError,
        r"frequencies must have shape \[64\], got \[3\]",
        SIZES | {"activation": "residual_sine", "frequencies": [1.0, 2.0, 3.0]},
    ),
    ("ModulatedMLP", TypeError, r"skips must be a list of hidden layers, got 1", SIZES | {"skips": 1}),
    ("ModulatedMLP", TypeError, r"bias must be True or False, got None", SIZES | {"bias": None}),
    ("ModulatedMLP", ValueError, r"backend must be one of None, 'cpu'", SIZES | {"backend": "gpu"}),
    ("ModulatedMLP", TypeError, r"dtype must be torch\.float32", SIZES | {"dtype": torch.int32}),
    ("CoordinateModulation", ValueError, r"hidden_layers must be at least 1, got 0", {"hidden_layers": 0}),
    (
        "CoordinateModulation",
        ValueError,
        r"resolution must be at least 1, got 0",
        {"hidden_layers": 2, "resolution": (4, 0)},
    ),
    (
        "CoordinateModulation",
        ValueError,
        r"resolution must be from 1 to 7 sizes .* got \(\)",
        {"hidden_layers": 2, "resolution": ()},
    ),
    (
        "CoordinateModulation",
        ValueError,
        r"resolution must be two sizes \(h, w\) of a plane for combine='plane_product', got \(4, 4, 4\)",
        {"hidden_layers": 2, "resolution": (4, 4, 4), "combine": "plane_product"},
    ),
    (
        "CoordinateModulation",
        TypeError,
        r"resolution must be an int or a list of them, got 4\.0",
        {"hidden_layers": 2, "resolution": 4.0},
    ),
    (
        "CoordinateModulation",
        ValueError,
        r"resolution must be from 1 to 7 sizes",
        {"hidden_layers": 2, "resolution": (2,) * 8},
    ),
    ("CoordinateModulation", ValueError, r"channels must be at least 1, got 0", {"hidden_layers": 2, "channels": 0}),
    ("CoordinateModulation", ValueError, r"padding must be one of", {"hidden_layers": 2, "padding": "wrap"}),
    ("CoordinateModulation", ValueError, r"combine must be one of", {"hidden_layers": 2, "combine": "sum"}),
    (
        "CoordinateModulation",
        ValueError,
        r"beta_init must be one of 'auto', 'zeros'",
        {"hidden_layers": 2, "beta_init": "x"},
    ),
    (
        "CoordinateModulation",
        TypeError,
        r"align_corners must be True or False",
        {"hidden_layers": 2, "align_corners": None},
    ),
    ("Modulate", ValueError, r"norm must be one of", {"norm": "batch"}),
    ("Modulate", ValueError, r"activation must be one of", {"activation": "swish"}),
    ("Modulate", ValueError, r"eps must be finite and at least 0", {"eps": -1.0}),
    ("Modulate", TypeError, r"omega must be a number", {"omega": None}),
    ("Modulate", TypeError, r"frequencies must be a tensor or a list of numbers, .* got 1\.0", {"frequencies": 1.0}),
    ("Modulate", ValueError, r"frequencies must be given for 'residual_sine'", {"activation": "residual_sine"}),
    ("Modulate", ValueError, r"backend must be one of", {"backend": "gpu"}),
]


@pytest.mark.parametrize(("layer", "error", "sentence", "arguments"), LAYERS)
def test_layers(layer, error, sentence, arguments):
    with pytest.raises(error, match=f"^{layer}: {sentence}"):
        getattr(camkernels, layer)(**arguments)


# ---- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
@pytest.mark.parametrize(("op", "arguments"), [("modulate", MODULATE), ("coordinate_modulation", LOOKUP)])
def test_a_backend_that_cannot_run_says_why_and_what_can(op, arguments, backend, monkeypatch):
    for missing in ("cpu_missing", "cuda_missing"):  # a library that could not help is no reason
        monkeypatch.setattr(_ops, missing, "was not built")
    reason = _backends.can_run(backend, _backends.Call(op, "cpu"))
    if reason is None:
        pytest.skip(f"{op} runs on {backend} here")
    with pytest.raises(
        RuntimeError, match=rf"^{op}: backend '{backend}' cannot run: .*; available: .*reference$"
    ) as caught:
        getattr(camkernels, op)(**arguments, backend=backend)
    assert reason in str(caught.value) and "was not built" not in reason


def test_the_pair_of_ops_refuses_before_it_computes():
    geometry = camkernels.GridGeometry.build(3, 2, 2, 8, finest_resolution=40)
    with pytest.raises(RuntimeError, match=r"^hash_grid_mlp: backend 'cuda' cannot run: the tensors are on cpu"):
        camkernels.hash_grid_mlp(X, torch.rand(geometry.n_entries, 2), geometry, WEIGHTS, backend="cuda")
    with pytest.raises(ValueError, match=r"^modulated_mlp: weights\[0\] must have shape \[out, 4\]"):
        camkernels.hash_grid_mlp(X, torch.rand(geometry.n_entries, 2), geometry, WEIGHTS)


@pytest.mark.skipif("cpu" not in backends("coordinate_modulation"), reason="the CPU library is not built")
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64], ids=str)
def test_the_operator_refuses_grids_of_other_types_before_its_threads_begin(dtype):
    coords, grids = torch.rand(5, 2), torch.ones(2, 2, 4, 4, dtype=dtype)
    with pytest.raises(RuntimeError, match="coordinate_modulation: parameters must be float16"):
        torch.ops.camkernels.coordinate_modulation(coords, grids, True, True, False, False)
