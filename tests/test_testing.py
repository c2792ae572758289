# SPDX-License-Identifier: MIT
"""What judges everything else: it catches what is wrong and lets pass what is legitimate."""

import itertools

import pytest
import torch

from camkernels import testing
from camkernels._cases import hash_grid as cases
from camkernels._geometry import GridGeometry
from camkernels.reference import hash_grid
from camkernels.testing import Call, Case

ALL = testing.cases("hash_grid")
NAMES = {case.name: case for case in ALL}


def options(**changes):
    base = {
        "dims": 2, "features": 2, "convention": "tcnn", "kind": "hash", "interpolation": "linear", "outside": "clamp",
        "progression": "scale", "max_level": None, "align_corners": False, "log2_hashmap_size": 7, "compat": False,
        "layout": "flat",
    }  # fmt: skip
    return {**base, **changes}


def case_of(**changes):
    return Case("hash_grid", "custom", cases.make, options(**changes))


# ---- pairwise --------------------------------------------------------------------------------------------------------


def test_pairwise_covers_every_pair_and_is_small():
    factors = {"a": (0, 1, 2), "b": "xyz", "c": (True, False), "d": (None, 1.0), "e": (1, 2, 3)}
    cover = testing.pairwise(factors, lambda case: True)
    assert cover == testing.pairwise(factors, lambda case: True)
    for (a, u), (b, v) in itertools.combinations([(k, v) for k in factors for v in factors[k]], 2):
        assert a == b or any(case[a] == u and case[b] == v for case in cover)
    assert all(list(case) == list(factors) for case in cover)
    assert 9 <= len(cover) <= 13  # of 108


def test_pairwise_keeps_to_what_is_legal():
    factors = {"a": (0, 1, 2), "b": (0, 1, 2), "c": (0, 1, 2)}

    def legal(case):
        return len(set(case.values())) == len(case) or case == {"a": 0, "b": 0, "c": 0}

    assert [sorted(case.values()) for case in testing.pairwise(factors, legal)] == [[0, 1, 2]] * 6


def test_hash_grid_cases_cover_every_pair_that_exists():
    cover = [dict(case.options) for case in ALL if "dims" in case.options]
    assert 40 <= len(cover) <= 70
    pairs = {frozenset(pair) for case in cover for pair in itertools.combinations(case.items(), 2)}
    for a, b in itertools.combinations(cases.FACTORS, 2):
        for u, v in itertools.product(cases.FACTORS[a], cases.FACTORS[b]):
            if frozenset([(a, u), (b, v)]) in pairs:
                continue
            free = [name for name in cases.GEOMETRY_FACTORS if name not in (a, b)]
            for values in itertools.product(*(cases.FACTORS[name] for name in free)):
                candidate = options(**dict(zip(free, values, strict=True)), **{a: u, b: v})
                assert not cases._legal(candidate), f"{a}={u}, {b}={v} is legal and not covered"


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_names_are_unique_and_select():
    assert len(NAMES) == len(ALL) and all(str(case) == case.name for case in ALL)
    chosen = testing.cases("hash_grid", dims=3, features=2)
    assert chosen and all(case.options["dims"] == 3 and case.options["features"] == 2 for case in chosen)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_case_is_reproducible_small_and_typed(case):
    call, again = case.make(torch.float16), case.make(torch.float16)
    for name, tensor in call.inputs.items():
        torch.testing.assert_close(tensor, again.inputs[name], rtol=0, atol=0, equal_nan=True)
    x, table = call.inputs["x"], call.inputs["table"]
    assert x.dtype == torch.float32 and table.dtype == torch.float16
    assert case.make(torch.float64).inputs["x"].dtype == torch.float64
    assert 50 <= x.numel() // x.shape[-1] <= 80 and table.numel() < 1_000_000 and table.abs().max() <= 1
    assert not torch.equal(case.make(seed=1).inputs["table"], case.make(seed=0).inputs["table"])


def test_mixed_points_contain_the_awkward_ones():
    call = case_of().make(torch.float32)
    x, geometry = call.inputs["x"], call.options["geometry"]
    assert x.isnan().any() and x.isinf().any()
    assert (x == 0).all(-1).any() and (x == 1).all(-1).any()
    assert ((x < 0) & x.isfinite()).any() and ((x > 1) & x.isfinite()).any()
    inside = ((x >= 0) & (x <= 1)).all(-1)
    near = (testing.face_distance(x, geometry) <= cases.face_width(x, geometry).amax(-1)).any(-1) & inside
    assert 4 <= near.sum() <= 30
    unique = x[inside].unique(dim=0, return_counts=True)[1]
    assert unique.max() >= 10


@pytest.mark.parametrize("case", ALL[::3], ids=str)
def test_safe_points_are_safe(case):
    call = case.make(torch.float64, points="safe")
    x, geometry = call.inputs["x"], call.options["geometry"]
    outside = ((x < 0) | (x > 1)).any(-1)
    assert 0 < outside.sum() <= x[..., 0].numel() / 2
    assert ((x.abs() > 1e-4) & ((x - 1).abs() > 1e-4)).all()
    if geometry.outside == "clamp":  # a coordinate that is clamped moves nothing, and may be on a face
        x = x[~outside]
    assert testing.face_distance(x, geometry).min() >= 1e-3


def test_safe_points_say_when_there_are_none():
    geometry = GridGeometry.build(1, 1, 1, 4, resolutions=[4])
    with pytest.raises(RuntimeError, match=r"found 0 of 5 points 0\.51 cells away"):
        testing.safe_points(geometry, 5, margin=0.51)


def test_layouts():
    assert case_of(layout="grid").make().inputs["x"].ndim == 3
    assert not case_of(layout="strided").make().inputs["x"].is_contiguous()


def test_evaluate():
    call = case_of(dims=1).make(torch.float64, points="safe")
    out = testing.evaluate(hash_grid, call, order=2, jacobian=True)
    names = ["value", "jacobian", "grad.x", "grad.table", "second.ct", "second.x", "second.table"]
    assert list(out) == names
    assert list(testing.evaluate(hash_grid, call, order=0)) == ["value"]
    quiet = torch.zeros(len(call.inputs["x"]), dtype=torch.bool)
    quiet[3:] = True
    muted = testing.evaluate(hash_grid, call, quiet=quiet)
    assert (muted["grad.x"][3:] == 0).all() and torch.equal(muted["grad.x"][:3], out["grad.x"][:3])


# ---- closeness -------------------------------------------------------------------------------------------------------


def test_spread():
    assert testing.spread(torch.tensor([0.0, 1.0, -2.0, float("nan"), float("inf")])) == 2.0
    assert testing.spread(torch.tensor([1.0] * 9 + [1e6])) == 20.0
    assert testing.spread(torch.zeros(3)) == 0.0 == testing.spread(torch.empty(0))


def test_assert_close():
    close = {"rtol": 1e-3, "atol": 0.0}
    b = torch.tensor([1.0, -1.0, float("nan"), float("inf"), 0.0])
    testing.assert_close(b + 0.9e-3, b, **close)
    testing.assert_close(torch.empty(0), torch.empty(0), **close)
    for index, value in ((0, 1.1), (1, float("nan")), (2, 0.0), (3, -float("inf")), (3, 1.0), (4, float("inf"))):
        wrong = b.clone()
        wrong[index] = value
        with pytest.raises(AssertionError, match=rf"y: 1 of 5 items differ; worst at \({index},\): got .* expected"):
            testing.assert_close(wrong, b, **close, name="y")
    with pytest.raises(AssertionError, match="shape is"):
        testing.assert_close(b[:4], b, **close)
    with pytest.raises(AssertionError, match=r"dtype is torch.float64, expected torch.float32"):
        testing.assert_close(b.double(), b, **close)


def test_tolerances_are_ordered():
    for quantity in testing.TOLERANCES[torch.float32]:
        by_dtype = [
            testing.tolerance(dtype, quantity)[0]
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        ]
        assert by_dtype == sorted(by_dtype)


# ---- check: wrong implementations are caught -------------------------------------------------------------------------


def wrong_weight(x, table, geometry, **kwargs):
    return hash_grid(x * (1 + 1e-4), table, geometry, **kwargs)


def wrong_level_order(x, table, geometry, **kwargs):
    y = hash_grid(x, table, geometry, **kwargs)
    return y.unflatten(-1, (geometry.n_levels, -1)).flip(-2).flatten(-2)


def wrong_nan(x, table, geometry, **kwargs):
    return hash_grid(x, table, geometry, **kwargs).nan_to_num(0.0)


def wrong_rounding(x, table, geometry, **kwargs):
    return hash_grid(x, table, geometry, **kwargs).to(torch.bfloat16).to(table.dtype)


def wrong_table_gradient(x, table, geometry, **kwargs):
    return hash_grid(x, table * 0.999 + table.detach() * 0.001, geometry, **kwargs)


def wrong_x_gradient(x, table, geometry, **kwargs):
    return hash_grid(x * 0.999 + x.detach() * 0.001, table, geometry, **kwargs)


def wrong_second_order(x, table, geometry, **kwargs):
    frozen = hash_grid(x, table.detach(), geometry, **kwargs)  # the mixed terms of x and table are missing
    return frozen + hash_grid(x.detach(), table, geometry, **kwargs) - frozen.detach()


@pytest.mark.parametrize(
    ("function", "order", "quantity"),
    [
        (wrong_weight, 0, "value"),
        (wrong_level_order, 0, "value"),
        (wrong_nan, 0, "value"),
        (wrong_rounding, 0, "value"),
        (wrong_table_gradient, 1, "grad.table"),
        (wrong_x_gradient, 1, "grad.x"),
        (wrong_second_order, 2, "second.x"),
    ],
)
def test_check_catches(function, order, quantity):
    case = case_of()
    testing.check(case, hash_grid, hash_grid, order=order)
    with pytest.raises(AssertionError, match=f"hash_grid custom torch.float32 {quantity}: .* items differ"):
        testing.check(case, function, hash_grid, order=order)
    if order:
        testing.check(case, function, hash_grid, order=order - 1)


@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
def test_the_definition_passes_its_own_check(dtype):
    for case in ALL[::5]:
        testing.check(case, hash_grid, hash_grid, dtype=dtype, order=2, jacobian=True)


# ---- check: cell faces -----------------------------------------------------------------------------------------------


def other_side(points, ulps=2.0):
    """An implementation which sees the given points a little to the left."""

    def function(x, table, geometry, **kwargs):
        left = torch.zeros_like(x)
        left[points] = -ulps * torch.finfo(x.dtype).eps
        return hash_grid(x + left, table, geometry, **kwargs)

    return function


def on_faces(call, n):
    """Indices of n points inside [0, 1] that lie on a face, distinct in x."""
    x, geometry = call.inputs["x"], call.options["geometry"]
    near = testing.face_distance(x, geometry) <= cases.face_width(x, geometry).amax(-1)
    inside = ((x > 0.05) & (x < 0.95)).all(-1)
    found = (near.any(-1) & inside).nonzero().squeeze(-1)
    assert len(found) >= n
    return found[:n]


@pytest.mark.parametrize("interpolation", ["linear", "nearest"])
@pytest.mark.parametrize("convention", ["tcnn", "torch-ngp", "nerfstudio"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_point_may_show_the_other_side_of_a_face(dims, convention, interpolation):
    case = case_of(dims=dims, convention=convention, interpolation=interpolation)
    point = on_faces(case.make(), 1)
    for jacobian in (False, True):
        call = case.make()
        expected = testing.evaluate(hash_grid, call, jacobian=jacobian)
        actual = testing.evaluate(other_side(point), call, jacobian=jacobian)
        differs = [k for k in expected if not torch.allclose(actual[k], expected[k], rtol=1e-4, equal_nan=True)]
        assert differs, "the move crosses the face"
        for results in (actual, expected):
            results.pop("grad.table")  # sums over points are not sided: a caller excludes those points with quiet=
        testing.compare(case, call, actual, expected)


def test_quiet_points_do_not_disturb_sums():
    case = case_of(interpolation="nearest")
    call = case.make()
    point = on_faces(call, 1)
    quiet = torch.zeros(len(call.inputs["x"]), dtype=torch.bool)
    quiet[point] = True
    loud = [testing.evaluate(f, call)["grad.table"] for f in (hash_grid, other_side(point))]
    calm = [testing.evaluate(f, call, quiet=quiet)["grad.table"] for f in (hash_grid, other_side(point))]
    assert not torch.allclose(*loud) and torch.allclose(*calm)


def test_too_many_flips_are_refused():
    case = case_of()
    call = case.make()
    points = on_faces(call, 5)
    expected = testing.evaluate(hash_grid, call, order=0, jacobian=True)
    actual = testing.evaluate(other_side(points), call, order=0, jacobian=True)
    with pytest.raises(AssertionError, match=r": [345] of 68 points show the other side of a cell face, 1 may"):
        testing.compare(case, call, actual, expected)
    testing.compare(case, call, actual, expected, max_flips=0.1)


def test_a_wrong_derivative_on_a_face_is_neither_side():
    case = case_of()
    call = case.make()
    expected = testing.evaluate(hash_grid, call, jacobian=True)
    point = on_faces(call, 1)
    for name in ("jacobian", "grad.x"):
        actual = dict(expected)
        actual[name] = actual[name].clone()
        actual[name][point] += 0.05 * actual[name].nan_to_num(0.0).abs().max()
        with pytest.raises(AssertionError, match=rf"{name} \(neither side of a cell face\): "):
            testing.compare(case, call, actual, expected)


def test_a_flip_away_from_any_face_is_refused():
    case = case_of()
    call = case.make()
    expected = testing.evaluate(hash_grid, call, order=0, jacobian=True)
    geometry = call.options["geometry"]
    cell = 1 / geometry.scales[0][0]
    point = torch.tensor([0])
    assert testing.face_distance(call.inputs["x"][:1], geometry).min() > 1e-3

    def neighbour(x, table, geometry, **kwargs):  # the derivative of the cell to the left
        y, jacobian = hash_grid(x, table, geometry, **kwargs)
        jacobian[point] = hash_grid(x - cell, table, geometry, **kwargs)[1][point]
        return y, jacobian

    actual = testing.evaluate(neighbour, call, order=0, jacobian=True)
    with pytest.raises(AssertionError, match=r"jacobian: \d+ of \d+ items differ"):
        testing.compare(case, call, actual, expected)


# ---- goldens ---------------------------------------------------------------------------------------------------------


def test_goldens_are_loaded_and_judged():
    names = testing.golden_names("hashgrid_tcnn")
    assert len(names) == 12 and "hashgrid_tcnn__d2f2_hash_linear" in names
    golden = testing.load_golden("hashgrid_tcnn__d2f2_hash_linear")
    assert golden.hyper["levels"] == 5 and golden.tolerance(torch.float32) == (1e-5, 1e-5)
    assert "out.y" in golden and "out.z" not in golden
    y = golden.tensor("out.y", torch.float64)
    testing.assert_close_golden(y, golden, "out.y", torch.float32)
    y[4, 2] += 1e-3
    with pytest.raises(
        AssertionError, match=r"hashgrid_tcnn__d2f2_hash_linear out.y: 1 of 370 items differ; worst at \(4, 2\)"
    ):
        testing.assert_close_golden(y, golden, "out.y", torch.float32)
    with pytest.raises(AssertionError, match="shape is"):
        testing.assert_close_golden(y[:3], golden, "out.y", torch.float32)


def test_rows_which_a_golden_excludes_do_not_count():
    golden = testing.load_golden("hashgrid_tcnn__d2f2_hash_linear")
    golden.meta["skip_rows"] = {"out.y": [4]}
    golden.arrays["out.y"][5, 0] = float("nan")
    y = golden.tensor("out.y", torch.float64).nan_to_num(3.0)
    y[4] = 100.0
    testing.assert_close_golden(y, golden, "out.y", torch.float32)
    y[6, 0] = float("nan")
    with pytest.raises(AssertionError, match=r"worst at \(6, 0\)"):
        testing.assert_close_golden(y, golden, "out.y", torch.float32)


def test_unknown_goldens():
    with pytest.raises(FileNotFoundError, match=r"load_golden: no .*nothing\.npz; fixtures lie in tests/data"):
        testing.load_golden("nothing")
    golden = testing.load_golden("hashgrid_tcnn__d2f2_hash_linear")
    with pytest.raises(ValueError, match="belongs to no family"):
        testing.golden_call(testing.Golden("other__x", golden.meta, golden.arrays), torch.float32)


def test_a_call_runs_with_extra_arguments():
    call = case_of().make()
    assert isinstance(call, Call)
    y, jacobian = call.run(hash_grid, return_jacobian=True)
    assert jacobian.shape[:-1] == y.shape
