# SPDX-License-Identifier: MIT
"""What is wrong is refused in a sentence: the op, the argument, what was expected, what was given, the remedy."""

import pytest
import torch

import camkernels
from camkernels import _backends
from conftest import backends

X, GEOMETRY = torch.rand(5, 3), camkernels.GridGeometry.build(3, 4, 2, 8, finest_resolution=40)
TABLE = torch.rand(GEOMETRY.n_entries, 2)
NAN = float("nan")

CALLS = {
    "one coordinate too few": (
        ValueError,
        r"^hash_grid: x must have shape \[\.\.\., 3\], got \[5, 2\]; the geometry has dims=3",
        {"x": X[:, :2]},
    ),
    "no axis": (ValueError, r"^hash_grid: x must have shape \[\.\.\., 3\], got \[\]", {"x": torch.tensor(0.5)}),
    "integer coordinates": (
        TypeError,
        r"^hash_grid: x must be float32, float64, bfloat16 or float16, got torch\.int64; "
        r"convert with \.float\(\)",
        {"x": (X * 9).long()},
    ),
    "complex coordinates": (TypeError, r"^hash_grid: x must be float32.*got torch\.complex64", {"x": X + 0j}),
    "sparse coordinates": (
        TypeError,
        r"^hash_grid: x must be a dense tensor, got torch\.sparse_coo; convert with \.to_dense\(\)",
        {"x": X.to_sparse()},
    ),
    "nested coordinates": (
        TypeError,
        r"^hash_grid: x must be a dense tensor, got a nested one; convert with .* or pad it",
        {"x": torch.nested.nested_tensor([X, X[:2]])},
    ),
    "sparse table": (TypeError, r"^hash_grid: table must be a dense tensor", {"table": TABLE.to_sparse()}),
    "a word for a flag": (
        TypeError,
        r"^hash_grid: return_jacobian must be True or False, got 'yes'",
        {"return_jacobian": "yes"},
    ),
    "a list of coordinates": (
        TypeError,
        r"^hash_grid: x must be a torch\.Tensor, got list; use torch\.as_tensor",
        {"x": X.tolist()},
    ),
    "integer table": (
        TypeError,
        r"^hash_grid: table must be float32.*got torch\.int8",
        {"table": TABLE.to(torch.int8)},
    ),
    "table of another size": (
        ValueError,
        rf"^hash_grid: table must have shape \[{GEOMETRY.n_entries}, 2\], got "
        rf"\[{GEOMETRY.n_entries - 1}, 2\]; the geometry asks for",
        {"table": TABLE[1:]},
    ),
    "table of another width": (
        ValueError,
        r"^hash_grid: table must have shape .*, got \[\d+, 1\]",
        {"table": TABLE[:, :1]},
    ),
    "flat table": (ValueError, r"^hash_grid: table must have shape .*, got \[\d+\]", {"table": TABLE.flatten()}),
    "table elsewhere": (
        ValueError,
        r"^hash_grid: all tensors must be on one device, got x on cpu, table on meta; move them "
        r"with \.to\(device\)",
        {"table": TABLE.to("meta")},
    ),
    "levels elsewhere": (
        ValueError,
        r"^hash_grid: all tensors must be on one device, .*max_level on meta",
        {"max_level": torch.rand(5, device="meta")},
    ),
    "a dict for a geometry": (
        TypeError,
        r"^hash_grid: geometry must be a GridGeometry, got dict; see GridGeometry\.build",
        {"geometry": GEOMETRY.to_dict()},
    ),
    "unknown interpolation": (
        ValueError,
        r"^hash_grid: interpolation must be one of 'linear', 'smoothstep', 'nearest', "
        r"got 'cubic'",
        {"interpolation": "cubic"},
    ),
    "unknown backend": (
        ValueError,
        r"^hash_grid: backend must be one of cpu, cuda, triton, reference, got 'gpu'",
        {"backend": "gpu"},
    ),
    "negative levels": (
        ValueError,
        r"^hash_grid: max_level must be an int between 0 and n_levels=4 or a float between 0 and "
        r"1, got -1",
        {"max_level": -1},
    ),
    "too many levels": (
        ValueError,
        r"^hash_grid: max_level must be an int between 0 and n_levels=4 .* got 5",
        {"max_level": 5},
    ),
    "a share above 1": (ValueError, r"^hash_grid: max_level must be .*, got 1\.5", {"max_level": 1.5}),
    "a share of NaN": (ValueError, r"^hash_grid: max_level must be .*, got nan", {"max_level": NAN}),
    "levels by name": (
        TypeError,
        r"^hash_grid: max_level must be an int, a float or a float tensor, got 'all'",
        {"max_level": "all"},
    ),
    "levels by truth": (
        TypeError,
        r"^hash_grid: max_level must be an int, a float or a float tensor, got True",
        {"max_level": True},
    ),
    "integer levels per point": (
        TypeError,
        r"^hash_grid: max_level as a tensor must be floating point, got torch\.int64",
        {"max_level": torch.ones(5, dtype=torch.long)},
    ),
    "levels of other points": (
        ValueError,
        r"^hash_grid: max_level must broadcast to the leading shape \[5\] of x, got \[4\]",
        {"max_level": torch.rand(4)},
    ),
    "levels with an axis too many": (
        ValueError,
        r"^hash_grid: max_level must broadcast .* got \[1, 5\]",
        {"max_level": torch.rand(1, 5)},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_hash_grid(name):
    error, sentence, changes = CALLS[name]
    with pytest.raises(error, match=sentence):
        camkernels.hash_grid(**{"x": X, "table": TABLE, "geometry": GEOMETRY} | changes)


REFERENCE = (
    "one coordinate too few",
    "integer coordinates",
    "integer table",
    "table of another size",
    "table elsewhere",
    "unknown interpolation",
    "negative levels",
    "too many levels",
    "a share above 1",
    "levels by name",
    "integer levels per point",
    "levels of other points",
)


@pytest.mark.parametrize("name", REFERENCE)
def test_calls_of_the_reference(name):
    error, _, changes = CALLS[name]
    with pytest.raises(error, match=r"^hash_grid: (x|table|interpolation|max_level)"):
        camkernels.reference.hash_grid(**{"x": X, "table": TABLE, "geometry": GEOMETRY} | changes)


SIZES = {"dims": 3, "n_levels": 4, "n_features_per_level": 2, "log2_hashmap_size": 8}
GEOMETRIES = {
    "no axis": (ValueError, r"dims must be between 1 and 7, got 0; the hash defines 7 primes", {"dims": 0}),
    "too many axes": (ValueError, r"dims must be between 1 and 7, got 8", {"dims": 8}),
    "no level": (ValueError, r"n_levels must be between 1 and 128, got 0", {"n_levels": 0}),
    "no feature": (ValueError, r"n_features_per_level must be between 1 and \d+, got 0", {"n_features_per_level": 0}),
    "a level of 2^31 rows": (
        ValueError,
        r"log2_hashmap_size must be between 1 and 30, got 31; a level has at most",
        {"log2_hashmap_size": 31},
    ),
    "half an axis": (TypeError, r"dims must be an int, got 2\.5 \(float\)", {"dims": 2.5}),
    "a truth for a size": (TypeError, r"n_levels must be an int, got True", {"n_levels": True}),
    "a resolution that overflows": (
        ValueError,
        r"per_level_scale gives level 3 resolution 2\^\d+\.\d, expected 1 to 2\^31",
        {"per_level_scale": 1000.0},
    ),
    "a finest resolution that overflows": (
        ValueError,
        r"finest_resolution gives level 3 resolution",
        {"finest_resolution": 2.0**40},
    ),
    "a base that overflows": (
        ValueError,
        r"base_resolution must be between 1 and 2147483648",
        {"base_resolution": 1 << 32},
    ),
    "a level that overflows": (
        ValueError,
        r"level 2 has \(5429, 5429, 5429\) vertices, more than a 32-bit index of "
        r"kind='dense' reaches; use kind='hash' or",
        {"kind": "dense", "finest_resolution": 100000},
    ),
    "finest below base": (
        ValueError,
        r"finest_resolution must be at least base_resolution=16, got 8; give a larger",
        {"finest_resolution": 8},
    ),
    "two sizes": (
        ValueError,
        r"give at most one of per_level_scale, finest_resolution, resolutions; got per_level_scale and "
        r"finest_resolution",
        {"per_level_scale": 1.5, "finest_resolution": 64},
    ),
    "three sizes": (
        ValueError,
        r"got per_level_scale and finest_resolution and resolutions",
        {"per_level_scale": 1.5, "finest_resolution": 64, "resolutions": [4, 5, 6, 7]},
    ),
    "resolutions of fewer levels": (
        ValueError,
        r"resolutions must have n_levels=4 items, got 2",
        {"resolutions": [4, 5]},
    ),
    "resolutions of other axes": (
        ValueError,
        r"resolutions\[0\] must be one int or dims=3 ints",
        {"resolutions": [[4, 5]] * 4},
    ),
    "a resolution of 0": (ValueError, r"resolutions\[1\] must be between 1 and", {"resolutions": [4, 0, 6, 7]}),
    "a scale of NaN": (ValueError, r"per_level_scale must be", {"per_level_scale": NAN}),
    "a negative scale": (ValueError, r"per_level_scale must be", {"per_level_scale": -2.0}),
    "a scale by name": (TypeError, r"per_level_scale must be a", {"per_level_scale": "2"}),
    "unknown convention": (ValueError, r"convention must be one of .*got 'instant'", {"convention": "instant"}),
    "unknown kind": (ValueError, r"kind must be one of .*got 'sparse'", {"kind": "sparse"}),
    "unknown outside": (ValueError, r"outside must be one of .*got 'mirror'", {"outside": "mirror"}),
    "a number for a truth": (TypeError, r"align_corners must be True or False, got 1", {"align_corners": 1}),
    "unknown compat": (ValueError, r"compat name 'x' does not exist for convention='tcnn'", {"compat": ("x",)}),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name):
    error, sentence, changes = GEOMETRIES[name]
    with pytest.raises(error, match=rf"^GridGeometry\.build: .*{sentence}"):
        camkernels.GridGeometry.build(**SIZES | changes)


LAYER_SIZES = (
    "no axis",
    "no level",
    "a level of 2^31 rows",
    "a resolution that overflows",
    "two sizes",
    "unknown kind",
)


@pytest.mark.parametrize("name", LAYER_SIZES)
def test_sizes_of_a_layer(name):
    error, sentence, changes = GEOMETRIES[name]
    with pytest.raises(error, match=sentence):
        camkernels.HashGrid(**SIZES | changes)


def test_arguments_of_a_layer():
    for error, sentence, options in (
        (ValueError, r"^HashGrid: interpolation must be one of .*'nearest', got 'cubic'", {"interpolation": "cubic"}),
        (ValueError, r"^HashGrid: backend must be one of None, 'cpu', .*got 'gpu'", {"backend": "gpu"}),
        (TypeError, r"^HashGrid: dtype must be torch\.float32, .*got torch\.int32", {"dtype": torch.int32}),
        (ValueError, r"^HashGrid: init_scale must be finite and at least 0, got -1", {"init_scale": -1}),
        (ValueError, r"^HashGrid: init_scale must be finite and at least 0, got nan", {"init_scale": NAN}),
        (TypeError, r"^HashGrid: init_scale must be a number, got '1'", {"init_scale": "1"}),
        (TypeError, r"^HashGrid: geometry must be a GridGeometry, got dict", {"geometry": GEOMETRY.to_dict()}),
        (ValueError, r"^HashGrid: geometry replaces the size arguments; .*dims", {"geometry": GEOMETRY, "dims": 2}),
        (ValueError, r"^HashGrid: geometry replaces .*outside", {"geometry": GEOMETRY, "outside": "wrap"}),
    ):
        with pytest.raises(error, match=sentence):
            camkernels.HashGrid(**options)


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep", "nearest"])
@pytest.mark.parametrize("outside", ["clamp", "zero", "wrap"])
@pytest.mark.parametrize("backend", backends("hash_grid"))
def test_a_coordinate_that_is_nan_makes_its_point_nan_and_touches_nothing(backend, outside, interpolation):
    geometry = camkernels.GridGeometry.build(3, 2, 2, 8, finest_resolution=40, outside=outside)
    table = torch.rand(geometry.n_entries, 2, requires_grad=True)
    x = torch.full((6, 3), 0.5)
    x[0, 0] = x[1, 1] = x[2, 2] = x[3] = NAN
    x[4] = torch.tensor([NAN, 7.0, -7.0])
    options = {"geometry": geometry, "interpolation": interpolation, "backend": backend}
    y, jacobian = camkernels.hash_grid(x, table, return_jacobian=True, **options)
    assert y[:5].isnan().all() and y[5].isfinite().all()
    assert jacobian[5].isfinite().all() and jacobian[:5].isnan().any(-1).all()
    (touched,) = torch.autograd.grad(camkernels.hash_grid(x[:5], table, **options).nansum(), table)
    assert not touched.any()
    (touched,) = torch.autograd.grad(camkernels.hash_grid(x, table, **options)[5].sum(), table)
    assert touched.isfinite().all() and touched.any()


# ---- backends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", backends("hash_grid"))
def test_the_level_of_a_point_may_be_any_number_and_nan_is_no_level(backend):
    y = camkernels.hash_grid(
        X, TABLE, GEOMETRY, max_level=torch.tensor([torch.nan, -0.3, 1.7, torch.inf, -torch.inf]), backend=backend
    )
    whole = camkernels.hash_grid(X, TABLE, GEOMETRY, backend=backend)
    assert torch.equal(y, whole * torch.tensor([0, 0, 1, 1, 0]).unsqueeze(-1))


def test_a_backend_that_cannot_run_says_why_and_what_can():
    able = ", ".join(b for b in _backends.BACKENDS if _backends.can_run(b, _backends.Call("hash_grid", "cpu")) is None)
    for backend, reason in (
        ("cuda", "the tensors are on cpu, backend 'cuda' computes on cuda"),
        ("triton", ".+"),
    ):
        sentence = rf"^hash_grid: backend '{backend}' cannot run: {reason}; available: {able}$"
        with pytest.raises(RuntimeError, match=sentence):
            camkernels.hash_grid(X, TABLE, GEOMETRY, backend=backend)
        with pytest.raises(RuntimeError, match=sentence):
            camkernels.HashGrid(geometry=GEOMETRY, backend=backend)(X)


def test_the_cpu_backend_and_tensors_elsewhere():
    with pytest.raises(
        RuntimeError, match=r"backend 'cpu' cannot run: the tensors are on meta, backend 'cpu' computes on cpu"
    ):
        camkernels.hash_grid(X.to("meta"), TABLE.to("meta"), GEOMETRY, backend="cpu")


@pytest.mark.parametrize("value", ["", "cpu", "reference", "cuda", "gpu"])
def test_the_environment_variable(value, monkeypatch):
    monkeypatch.setenv("CAMKERNELS_BACKEND", value)
    if value == "cuda":
        with pytest.raises(RuntimeError, match=r"^hash_grid: backend 'cuda' cannot run: the tensors are on cpu"):
            camkernels.hash_grid(X, TABLE, GEOMETRY)
    elif value == "gpu":
        with pytest.raises(ValueError, match=r"^hash_grid: CAMKERNELS_BACKEND must be one of cpu, .*, got 'gpu'"):
            camkernels.hash_grid(X, TABLE, GEOMETRY)
        camkernels.hash_grid(X, TABLE, GEOMETRY, backend="reference")  # an argument goes before
    elif value == "cpu" and "cpu" not in backends("hash_grid"):
        with pytest.raises(RuntimeError, match=r"^hash_grid: backend 'cpu' cannot run: "):
            camkernels.hash_grid(X, TABLE, GEOMETRY)
    else:
        y = camkernels.hash_grid(X, TABLE.requires_grad_(), GEOMETRY)
        by_operator = "_CallBackward" in str(y.grad_fn.next_functions)
        assert by_operator == (value != "reference" and "cpu" in backends("hash_grid"))
