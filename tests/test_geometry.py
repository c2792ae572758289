# SPDX-License-Identifier: MIT
"""GridGeometry lays grids out as the public codes do, and refuses what it cannot lay out with a sentence."""

import copy
import dataclasses
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch

from camkernels import reference, testing
from camkernels._geometry import GridGeometry, geometry_support, geometry_table

ROWS = testing.load_json("grid_layout__tables")["rows"]
EVERY_COMPAT = {"tcnn": ("tcnn_index_overflow",), "torch-ngp": ("ngp_tiled_leading_axes", "ngp_stride_overflow")}


def row_geometry(row, **changes):
    convention = row["convention"].replace("_", "-")
    arguments = dict(
        base_resolution=row.get("base_resolution", row.get("min_res")),
        convention=convention,
        kind=row.get("grid_type", "hash"),
        align_corners=row.get("align_corners", False),
        compat=EVERY_COMPAT.get(convention, ()),
    )
    if convention == "nerfstudio":
        arguments["finest_resolution"] = row["max_res"]
    elif row.get("desired_resolution"):
        arguments["finest_resolution"] = row["desired_resolution"]
    else:
        arguments["per_level_scale"] = row["per_level_scale"]
    return GridGeometry.build(
        row["dim"], row["levels"], row["features"], row["log2_hashmap_size"], **{**arguments, **changes}
    )


@pytest.mark.parametrize("index", range(len(ROWS)))
def test_layout_table(index):
    row = ROWS[index]
    geometry = row_geometry(row)
    assert list(geometry.offsets) == row["offsets"]
    assert geometry.n_entries * geometry.n_features_per_level == row["n_params"]
    np.testing.assert_allclose(geometry.scales, np.repeat(np.array(row["scale"])[:, None], row["dim"], 1), rtol=2e-6)
    assert all(float(np.float32(s)) == s for scale in geometry.scales for s in scale)
    if row["convention"] == "tcnn":
        assert [r[0] for r in geometry.resolutions] == row["resolution"]
        assert list(geometry.sizes) == row["entries"]
    if row["convention"] == "torch_ngp":
        extra = 0 if row["align_corners"] else 1
        assert [r[0] - extra for r in geometry.resolutions] == row["resolution_kernel"]


def test_the_table_has_every_convention():
    count = {name: sum(row["convention"] == name for row in ROWS) for name in ("tcnn", "torch_ngp", "nerfstudio")}
    assert count == {"tcnn": 14, "torch_ngp": 10, "nerfstudio": 6}


@pytest.mark.parametrize(
    ("options", "entries"),
    [
        ({}, 6_098_120),
        ({"convention": "torch-ngp"}, 6_119_864),
        ({"convention": "torch-ngp", "align_corners": True}, 6_098_120),
        ({"convention": "nerfstudio"}, 8_388_608),
        ({"finest_resolution": None, "per_level_scale": 2.0}, 14_229_504 // 2),
        ({"finest_resolution": None, "per_level_scale": 1.447}, 12_599_920 // 2),
        ({"dims": 2, "finest_resolution": None, "per_level_scale": 2.0}, 11_184_640 // 2),
    ],
)
def test_published_entry_counts(options, entries):
    arguments = {"dims": 3, "n_levels": 16, "n_features_per_level": 2, "log2_hashmap_size": 19, **options}
    arguments.setdefault("finest_resolution", 2048)
    assert GridGeometry.build(**arguments).n_entries == entries


def test_sizes_of_tiny_cuda_nn_own_test():
    stored = testing.load_json("external/tcnn_sizes")
    for item in (stored, *stored["also"]):
        config = item["config"]
        geometry = GridGeometry.build(
            item["n_input_dims"],
            config["n_levels"],
            config["n_features_per_level"],
            config["log2_hashmap_size"],
            base_resolution=config["base_resolution"],
            per_level_scale=config["per_level_scale"],
        )
        assert geometry.n_entries * geometry.n_features_per_level == item["n_params"]
        for level, count in item.get("level_n_params", {}).items():
            assert geometry.sizes[int(level)] == count
            assert geometry.offsets[int(level)] == item["level_params_offset"][level]


def linear_table_case(item, config, compat=()):
    geometry = GridGeometry.build(
        3, 16, 2, config["log2_hashmap_size"], base_resolution=16, per_level_scale=2.0, outside="wrap", compat=compat
    )
    assert geometry.n_entries * 2 == item["n_params"]
    return geometry


def test_dr_jit_recorded_values():
    stored = testing.load_json("external/drjit_tcnn_hashgrid_3d")
    geometry = linear_table_case(stored, stored["config"])
    table = torch.linspace(0, 1000, stored["n_params"]).reshape(-1, 2)
    y = reference.hash_grid(torch.tensor(stored["x"]), table, geometry)
    torch.testing.assert_close(y, torch.tensor(stored["y"]), rtol=stored["rtol"], atol=stored["atol"])


@pytest.mark.parametrize("legacy", [False, True])
def test_tiny_dpcpp_nn_recorded_values(legacy):
    item = testing.load_json("external/dpcpp_encodings")["cases"][0]
    geometry = linear_table_case(item, item["config"], ("tcnn_legacy_overflow",) if legacy else ())
    n = item["n_params"]
    table = (torch.arange(n, dtype=torch.float64) / (n / 2) - 1).float().reshape(-1, 2)
    y = reference.hash_grid(torch.tensor(item["x"]), table, geometry)
    expected = torch.tensor(item["y"])
    if not legacy:  # the rule since June 2025 hashes levels 12 and 13, which were dense by an overflow
        expected[0, 24:28] = torch.tensor([0.48417, 0.48417, 0.63155, 0.63155])
    torch.testing.assert_close(y, expected, rtol=0, atol=item["atol"])
    dense = [level for level in range(16) if not geometry.hashed[level]]
    assert dense == ([0, 1, 2, 12, 13, 14, 15] if legacy else [0, 1, 2])


# ---- rules that the tables do not show -------------------------------------------------------------------------------


def test_strides_of_dense_levels():
    build = GridGeometry.build
    tcnn = build(3, 1, 1, 19, base_resolution=8)
    assert tcnn.strides == ((1, 8, 64),) and tcnn.scales == ((7.0,) * 3,) and tcnn.shift == 0.5
    ngp = build(3, 1, 1, 19, base_resolution=8, convention="torch-ngp")
    assert ngp.strides == ((1, 9, 81),) and ngp.scales == ((7.0,) * 3,) and ngp.shift == 0.5
    aligned = build(3, 1, 1, 19, base_resolution=8, convention="torch-ngp", align_corners=True)
    assert aligned.strides == ((1, 8, 64),) and aligned.shift == 0.0
    dense = build(3, 1, 1, 4, base_resolution=8, convention="nerfstudio", kind="dense")
    assert dense.strides == ((1, 9, 81),) and dense.scales == ((8.0,) * 3,) and dense.shift == 0.0
    assert dense.ceil_corner and dense.sizes == (736,)
    hashed = build(3, 1, 1, 19, base_resolution=8, convention="nerfstudio")
    assert hashed.hashed == (True,) and hashed.strides == ((0, 0, 0),) and hashed.sizes == (1 << 19,)


@pytest.mark.parametrize(
    ("convention", "scale", "vertices"), [("tcnn", 3.0, 4), ("torch-ngp", 3.0, 5), ("nerfstudio", 4.0, 5)]
)
def test_explicit_resolutions(convention, scale, vertices):
    geometry = GridGeometry.build(2, 2, 1, 19, resolutions=[4, (4, 6)], convention=convention)
    assert geometry.scales == ((scale, scale), (scale, scale + 2))
    assert geometry.resolutions == ((vertices, vertices), (vertices, vertices + 2))
    assert geometry.per_level_scale is None
    if convention != "nerfstudio":
        assert geometry.strides == ((1, vertices), (1, vertices))


def test_one_level_has_the_base_resolution():
    for convention in ("tcnn", "torch-ngp", "nerfstudio"):
        geometry = GridGeometry.build(2, 1, 1, 8, base_resolution=9, finest_resolution=40, convention=convention)
        assert geometry.scales[0][0] == (9.0 if convention == "nerfstudio" else 8.0)


def test_default_finest_resolution():
    default = GridGeometry.build(3, 16, 2, 19)
    assert default == GridGeometry.build(3, 16, 2, 19, finest_resolution=2048)
    assert default.resolutions[-1] == (2048, 2048, 2048)
    assert GridGeometry.build(3, 16, 2, 19, convention="nerfstudio").scales[-1][0] == 2047.0  # floor in float32


def test_outside_by_convention():
    found = {c: GridGeometry.build(3, 2, 2, 8, convention=c, outside="convention").outside for c in EVERY_COMPAT}
    assert found == {"tcnn": "wrap", "torch-ngp": "zero"}
    assert GridGeometry.build(3, 2, 2, 8, convention="nerfstudio", outside="convention").outside == "wrap"
    assert GridGeometry.build(3, 2, 2, 8, convention="torch-ngp").outside == "clamp"


def test_two_roundings_hash_a_level_sized_as_dense():
    geometry = GridGeometry.build(3, 2, 2, 12, base_resolution=2, per_level_scale=6.0, convention="torch-ngp")
    assert geometry.sizes[1] == 2200  # (ceil(2 * 6) + 1)^3 in float64, rounded up to 8
    assert geometry.resolutions[1] == (14, 14, 14) and geometry.hashed[1]  # ceil(12.000001 - 1) + 2 in float32


def test_how_often_two_roundings_disagree():
    """Two levels, as in NeuRBF's image grid: sizes and strides disagree for about half of the finest resolutions."""
    differ = 0
    for finest in range(64, 4096, 4):
        geometry = GridGeometry.build(
            2, 2, 2, 24, base_resolution=16, finest_resolution=finest, convention="torch-ngp", align_corners=True
        )
        differ += math.ceil(16 * geometry.per_level_scale) != geometry.resolutions[1][0]
    assert 300 < differ < 700  # of 1008; which ones depends on the last bit of exp2 and log2


def test_stride_product_beyond_32_bits():
    arguments = dict(resolutions=[4096], convention="torch-ngp", align_corners=True)
    mended = GridGeometry.build(3, 1, 1, 24, **arguments)
    assert mended.hashed == (True,)
    wrapped = GridGeometry.build(3, 1, 1, 24, **arguments, compat=("ngp_stride_overflow",))
    assert wrapped.hashed == (False,) and wrapped.strides == ((1, 4096, 1 << 24),)


def test_tiled_torch_ngp_ignores_axes_only_on_request():
    arguments = dict(base_resolution=16, kind="tiled", convention="torch-ngp")
    geometry = GridGeometry.build(3, 16, 2, 19, **arguments, compat=("ngp_tiled_leading_axes",))
    ignores_z = [level for level in range(16) if geometry.strides[level][2] == 0]
    assert ignores_z == [12, 13, 14, 15]
    with pytest.raises(ValueError, match=r"ignores its last axes .* level 12 .*compat=\('ngp_tiled_leading_axes',\)"):
        GridGeometry.build(3, 16, 2, 19, **arguments)


def test_tcnn_index_overflow_only_on_request():
    row = next(r for r in ROWS if r.get("grid_type") == "tiled" and r["convention"] == "tcnn" and r["levels"] == 15)
    geometry = row_geometry(row)
    constant = [level for level in range(15) if geometry.strides[level] == (0, 0, 0)]
    assert constant == [level for level in range(15) if geometry.resolutions[level][0] > 1625]
    with pytest.raises(
        ValueError, match=r"level 9 has \(3072, 3072, 3072\) vertices.*compat=\('tcnn_index_overflow',\)"
    ):
        row_geometry(row, compat=())


def test_cube_of_vertices_at_the_limit_of_32_bits():
    build = GridGeometry.build
    assert build(3, 1, 1, 8, resolutions=[1625], kind="tiled").strides == ((1, 1625, 1625**2),)
    with pytest.raises(ValueError, match="more than a 32-bit index"):
        build(3, 1, 1, 8, resolutions=[1626], kind="tiled")
    assert build(2, 1, 1, 8, resolutions=[65535], kind="dense").sizes == (1 << 31,)
    with pytest.raises(ValueError, match="more than a 32-bit index"):
        build(2, 1, 1, 8, resolutions=[65536], kind="dense")


# ---- a plain value ---------------------------------------------------------------------------------------------------


def some_geometries():
    yield GridGeometry.build(3, 16, 2, 19)
    yield GridGeometry.build(2, 2, 4, 8, resolutions=[(4, 6), 9], convention="torch-ngp", compat=("ngp_host_ceil",))
    yield GridGeometry.build(3, 4, 1, 10, convention="nerfstudio", kind="dense", finest_resolution=40)


@pytest.mark.parametrize("geometry", list(some_geometries()), ids=["tcnn", "torch-ngp", "nerfstudio"])
def test_round_trips(geometry):
    as_dict = geometry.to_dict()
    assert GridGeometry.from_dict(as_dict) == geometry
    assert GridGeometry.from_dict(json.loads(json.dumps(as_dict))) == geometry
    assert hash(GridGeometry.from_dict(as_dict)) == hash(geometry)
    assert pickle.loads(pickle.dumps(geometry)) == geometry == copy.deepcopy(geometry)
    stored = io.BytesIO()
    torch.save({"geometry": as_dict}, stored)
    stored.seek(0)
    assert GridGeometry.from_dict(torch.load(stored, weights_only=True)["geometry"]) == geometry
    assert "entries=" in repr(geometry) and len(repr(geometry)) < 400
    with pytest.raises(dataclasses.FrozenInstanceError):
        geometry.dims = 2


def test_from_dict_refuses_what_to_dict_cannot_return():
    good = GridGeometry.build(3, 2, 2, 8).to_dict()
    with pytest.raises(ValueError, match=r"fields \['shift'\] are missing or unknown"):
        GridGeometry.from_dict({name: value for name, value in good.items() if name != "shift"})
    with pytest.raises(ValueError, match=r"fields \['extra'\] are missing or unknown"):
        GridGeometry.from_dict({**good, "extra": 1})
    with pytest.raises(ValueError, match="expected a dict, got None"):
        GridGeometry.from_dict(None)
    with pytest.raises(ValueError, match="offsets must be the running sum"):
        GridGeometry.from_dict({**good, "offsets": [0, 8, 16]})
    with pytest.raises(ValueError, match=r"sizes must have n_levels=2 items, got \(8,\)"):
        GridGeometry.from_dict({**good, "sizes": [8]})
    with pytest.raises(ValueError, match=r"every item of strides must have dims=3 items, got \(0, 0\)"):
        GridGeometry.from_dict({**good, "strides": [[0, 0], [0, 0]]})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dims": 9, "scales": [[1] * 9] * 2, "strides": [[1] * 9] * 2}, "dims must be ints between 1 and 7"),
        ({"dims": 3.0}, "dims must be ints"),
        ({"n_levels": 0}, "n_levels must be ints between 1 and 128"),
        ({"n_features_per_level": 0}, "n_features_per_level must be ints between 1"),
        ({"scales": 5}, "scales must have n_levels=2 items, got 5"),
        ({"scales": [[float("nan")] * 3] * 2}, "scales must hold finite numbers"),
        ({"scales": [["1"] * 3] * 2}, "scales must hold finite numbers"),
        ({"shift": None}, "shift must hold finite numbers"),
        ({"strides": [[0, -1, 0]] * 2}, "strides must be ints between 0 and 4294967295"),
        ({"sizes": [1 << 32] * 2, "offsets": [0, 1 << 32, 1 << 33]}, "sizes must be ints between 1 and 2147483648"),
        ({"sizes": [0, 8], "offsets": [0, 0, 8]}, "sizes must be ints between 1"),
        ({"outside": "convention"}, "outside must be clamp, zero or wrap"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_from_dict_refuses_numbers_that_no_kernel_could_work_with(changes, sentence):
    good = GridGeometry.build(3, 2, 2, 8).to_dict()
    with pytest.raises(ValueError, match=f"^GridGeometry: {sentence}"):
        GridGeometry.from_dict(good | changes)


def test_numpy_numbers_are_accepted_and_stored_plain():
    geometry = GridGeometry.build(np.int64(3), np.int32(2), np.int64(2), np.int8(8), per_level_scale=np.float32(1.5))
    assert geometry == GridGeometry.build(3, 2, 2, 8, per_level_scale=1.5)
    assert all(type(value) in (int, float, str, bool, list) for value in geometry.to_dict().values())


# ---- refusals --------------------------------------------------------------------------------------------------------

BASIC = {"dims": 3, "n_levels": 4, "n_features_per_level": 2, "log2_hashmap_size": 8}
REFUSED = [
    ({"dims": 0}, "dims must be between 1 and 7, got 0; the hash defines 7 primes"),
    ({"dims": 8}, "dims must be between 1 and 7, got 8"),
    ({"n_levels": 0}, "n_levels must be between 1 and 128, got 0"),
    ({"n_levels": 129}, "n_levels must be between 1 and 128, got 129; use fewer levels"),
    ({"n_features_per_level": 0}, "n_features_per_level must be between 1 and 65536, got 0"),
    ({"log2_hashmap_size": 0}, "log2_hashmap_size must be between 1 and 30, got 0"),
    ({"log2_hashmap_size": 31}, "log2_hashmap_size must be between 1 and 30, got 31"),
    ({"base_resolution": 0}, "base_resolution must be between 1 and 2147483648, got 0"),
    ({"base_resolution": 4096}, "finest_resolution must be at least base_resolution=4096, got 2048"),
    ({"per_level_scale": 0.0}, "per_level_scale must be positive and finite, got 0.0"),
    ({"per_level_scale": -2}, "per_level_scale must be positive and finite, got -2"),
    ({"per_level_scale": math.nan}, "per_level_scale must be positive and finite, got nan"),
    ({"finest_resolution": math.inf}, "finest_resolution must be positive and finite, got inf"),
    ({"per_level_scale": 1e30}, r"per_level_scale gives level 3 resolution 2\^303.0, expected 1 to 2\^31"),
    ({"per_level_scale": 1e-30}, r"per_level_scale gives level 3 resolution 2\^-295.0, expected 1 to 2\^31"),
    ({"finest_resolution": 2**33}, r"finest_resolution gives level 3 resolution 2\^33.0"),
    ({"per_level_scale": 2.0, "finest_resolution": 64}, "at most one of .* got per_level_scale and finest_resolution"),
    ({"per_level_scale": 2.0, "resolutions": [4] * 4}, "at most one of .* got per_level_scale and resolutions"),
    ({"resolutions": [4, 5]}, "resolutions must have n_levels=4 items, got 2"),
    ({"resolutions": [4, 5, 6, (7, 8)]}, r"resolutions\[3\] must be one int or dims=3 ints, got \(7, 8\)"),
    ({"resolutions": [4, 5, 6, 0]}, r"resolutions\[3\] must be between 1 and 2147483648, got 0"),
    ({"resolutions": [4, 5, 6, 2**32]}, r"resolutions\[3\] must be between 1 and 2147483648"),
    ({"convention": "instant"}, "convention must be one of tcnn, torch-ngp, nerfstudio, got 'instant'"),
    ({"kind": "sparse"}, "kind must be one of hash, dense, tiled, got 'sparse'"),
    ({"outside": "mirror"}, "outside must be one of clamp, zero, wrap, convention, got 'mirror'"),
    ({"compat": ("magic",)}, "compat name 'magic' does not exist for convention='tcnn', which has tcnn_index"),
    ({"compat": ("ngp_host_ceil",)}, "compat name 'ngp_host_ceil' does not exist for convention='tcnn'"),
    ({"compat": ("tcnn_index_overflow", "tcnn_legacy_overflow")}, "exclude each other"),
    ({"convention": "nerfstudio", "compat": ("ngp_host_ceil",)}, "convention='nerfstudio', which has none"),
    ({"convention": "nerfstudio", "kind": "tiled"}, "nerfstudio defines no tile size; use kind='hash'"),
    ({"convention": "nerfstudio", "align_corners": True}, "nerfstudio has one lattice"),
    ({"convention": "torch-ngp", "kind": "dense"}, "level 3 has .* vertices, more than a 32-bit index of kind='dense'"),
    ({"kind": "dense", "dims": 2, "n_levels": 1, "resolutions": [2**20]}, "more than a 32-bit index of kind='dense'"),
]
WRONG_TYPES = [
    ({"dims": 3.0}, r"dims must be an int, got 3.0 \(float\)"),
    ({"n_levels": True}, r"n_levels must be an int, got True \(bool\)"),
    ({"log2_hashmap_size": "19"}, r"log2_hashmap_size must be an int, got '19' \(str\)"),
    ({"per_level_scale": "2"}, "per_level_scale must be a number, got '2'"),
    ({"resolutions": 16}, "resolutions must list one item per level, got 16"),
    ({"resolutions": [4.0] * 4}, r"resolutions\[0\] must be an int, got 4.0"),
    ({"align_corners": 1}, "align_corners must be True or False, got 1"),
    ({"compat": "tcnn_index_overflow"}, r"compat must be a tuple of names.*compat=\('name',\)"),
]


@pytest.mark.parametrize(("change", "sentence"), REFUSED)
def test_refusals(change, sentence):
    with pytest.raises(ValueError, match=f"^GridGeometry.build: .*{sentence}"):
        GridGeometry.build(**{**BASIC, **change})


@pytest.mark.parametrize(("change", "sentence"), WRONG_TYPES)
def test_wrong_types(change, sentence):
    with pytest.raises(TypeError, match=f"^GridGeometry.build: {sentence}"):
        GridGeometry.build(**{**BASIC, **change})


def test_table_size_limit():
    many = dict(dims=1, n_features_per_level=1, log2_hashmap_size=8, kind="dense")
    assert GridGeometry.build(n_levels=128, resolutions=[2**31] * 128, **many).n_entries == 2**38
    limit = "camkernels._geometry.MAX_ENTRIES"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="the table would have 1024 rows"):
        patch.setattr(limit, 1000)
        GridGeometry.build(1, 1, 1, 8, resolutions=[1024], kind="dense")


def test_support_table_agrees_with_build():
    for row in geometry_table():
        for dims in range(1, 8):
            kind, align = row["kind"], row["align_corners"]
            reason = geometry_support(row["convention"], kind, dims, align_corners=align)
            assert (reason is None) == (dims in row["dims"])
            arguments = dict(resolutions=[3, 4], convention=row["convention"], kind=kind, align_corners=align)
            if reason is None:
                GridGeometry.build(dims, 2, 1, 18, **arguments)
            else:
                assert reason == row["reason"]
                with pytest.raises(ValueError, match=reason.split(";")[0]):
                    GridGeometry.build(dims, 2, 1, 18, **arguments)
    assert len(geometry_table()) == 18
    assert "convention must be one of" in geometry_support("x", "hash", 3)
    assert "kind must be one of" in geometry_support("tcnn", "x", 3)
    assert "dims must be between" in geometry_support("tcnn", "hash", 9)
