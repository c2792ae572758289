# SPDX-License-Identifier: MIT
"""The Triton kernels compile for sm_80 and sm_90 without a GPU, and their machine code is what the design counts on."""

import os

import pytest

pytest.importorskip("triton")

from triton_ahead_of_time import (
    KERNELS,
    SIZES,
    Basis,
    Variant,
    compile_all,
    compile_basis,
    cover,
    cover_bases,
    cover_lookups,
    cover_mlp,
    published_bases,
)

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" in os.environ, reason="the interpreter, which TRITON_INTERPRET chooses, does not compile"
)
GATED = cover()
MLPS = cover_mlp()
OTHERS = [  # more dims, features that are no power of two, no upper corner
    Variant("table", 7, 3, "fp32", 90),
    Variant("coordinates", 5, 16, "bf16", 80, interpolation=1, outside=2),
    Variant("jacobian", 3, 5, "fp16", 90, interpolation=2, ceil_corner=True),
]
LOOKUPS = cover_lookups()
PUBLISHED = published_bases()
ALL = GATED + OTHERS + LOOKUPS + MLPS + PUBLISHED + cover_bases()


@pytest.fixture(scope="module")
def facts():
    return compile_all(ALL)


def test_the_cover_has_every_size_on_both_architectures_and_every_dtype():
    assert len({(v.kernel, v.dims, v.features, v.arch) for v in GATED}) == len(KERNELS) * 3 * 4 * 2
    assert len({(v.kernel, v.features, v.dtype) for v in GATED}) == len(KERNELS) * 4 * 4


@pytest.mark.parametrize("variant", ALL, ids=str)
def test_nothing_spills(facts, variant):
    found = facts[variant]
    assert found.stack == 0 and found.count("LDL") == 0 and found.count("STL") == 0


@pytest.mark.parametrize("variant", GATED + OTHERS, ids=str)
def test_three_blocks_fit_on_a_multiprocessor(facts, variant):
    found = facts[variant]
    if variant.dtype != "fp64":
        assert found.registers * 128 * 3 <= 65536


@pytest.mark.parametrize("variant", GATED, ids=str)
def test_nothing_goes_through_shared_memory(facts, variant):
    """Points and features share a layout, so that no corner's index waits at a barrier."""
    found = facts[variant]
    assert found.shared == 0 and found.count("BAR") == 0


@pytest.mark.parametrize("variant", GATED, ids=str)
def test_a_table_row_is_one_access_per_corner(facts, variant):
    found = facts[variant]
    size = SIZES[variant.dtype]
    if variant.kernel == "table":
        size = max(size, 4)  # the sums
        width = min(variant.features, 16 // size)
        if variant.arch >= 90 and size == 4 and width > 1:
            assert found.count(f"REDG.E.ADD.F32x{width}") == found.count("RED") > 0
        else:
            assert found.count("RED") > 0
        assert found.count("ATOM") == 0  # which would return the old value
    else:
        bits = 8 * min(variant.features * size, 16)
        name = {16: "LDG.E.U16", 32: "LDG.E", 64: "LDG.E.64", 128: "LDG.E.128"}[bits]
        assert found.opcodes.get(name, 0) >= 1
        if bits == 128:  # scalars of the geometry are narrower
            assert found.opcodes[name] >= (1 << variant.dims if variant.dims < 4 else 1)


@pytest.mark.parametrize("variant", LOOKUPS, ids=str)
def test_a_lookup_reads_and_adds_in_words_and_waits_for_no_corner(facts, variant):
    """Rows are packed to whole tiles; only where those of a value are not does its store change the layout, once."""
    found = facts[variant]
    rows_are_tiles = variant.width % 4 == 0 or variant.dtype == "fp64"
    assert found.count("BAR") == (0 if rows_are_tiles or variant.kernel != "value" else 1)
    if variant.kernel == "grids":
        vectors = found.count("REDG.E.ADD.F32x4")
        assert (vectors == found.count("RED") > 0) == (variant.arch >= 90 and variant.dtype != "fp64")
        assert found.count("ATOM") == 0
    else:
        corners = 12 if variant.dims == 0 else 1 << variant.dims
        wide = {2: "LDG.E.64", 4: "LDG.E.128", 8: "LDG.E.128"}[SIZES[variant.dtype]]
        assert found.opcodes[wide] >= corners


@pytest.mark.parametrize("variant", MLPS, ids=str)
def test_products_are_those_of_tensor_cores(facts, variant):
    """On sm_90 those of a group of warps (wgmma), but for sums over points: a narrow layer has no 64 rows."""
    found = facts[variant]
    assert found.count("HMMA") + found.count("HGMMA") > 0
    if variant.arch >= 90 and variant.kernel != "sums":
        assert found.count("HGMMA") > 0 and found.count("HMMA") == 0
    assert found.shared <= {80: 163 << 10, 90: 227 << 10}[variant.arch]


@pytest.mark.parametrize("variant", PUBLISHED, ids=str)
def test_radial_features_are_read_and_added_to_in_words(facts, variant):
    found = facts[variant]
    if variant.kernel != "features":
        assert found.opcodes["LDG.E.128"] >= 1
    if variant.kernel != "value" and variant.arch >= 90:
        assert found.count("REDG.E.ADD.F32x4") >= 1
    assert found.count("ATOM") == 0


@pytest.mark.parametrize("variant", [v for v in PUBLISHED if v.kernel != "gradients"], ids=str)
def test_a_weight_is_computed_by_one_thread_for_all_features(facts, variant):
    """A pair of point and kernel per thread: one division by the normaliser, of the inverse quadratic one more."""
    assert facts[variant].count("MUFU") == {"ivq": 2, "nlin": 1}[variant.kind]


def test_waves_of_float64_have_the_stack_of_the_library():
    found = compile_basis(Basis("gradients", "gauss", "full", 3, 4, 16, "fp64", 90))
    assert 0 < found.stack <= 48
