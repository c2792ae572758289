# SPDX-License-Identifier: MIT
"""The definition of hash_grid agrees with recorded results of public code, with itself, and with plain geometry."""

import itertools

import pytest
import torch

from camkernels import testing
from camkernels._geometry import GridGeometry
from camkernels.reference import hash_grid
from camkernels.reference.hash_grid import count_levels

GOLDENS = testing.golden_names("hashgrid_")
CASES = testing.cases("hash_grid")
NAN, INF = float("nan"), float("inf")


def build(dims=2, n_levels=2, features=2, log2_size=8, **options):
    options = {"base_resolution": 4, "per_level_scale": 1.5, **options}
    return GridGeometry.build(dims, n_levels, features, log2_size, **options)


def random_table(geometry, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = geometry.n_entries, geometry.n_features_per_level
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1).to(dtype)


# ---- recorded results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name, dtype):
    assert len(GOLDENS) == 23
    golden = testing.load_golden(name)
    call = testing.golden_call(golden, dtype)
    geometry = call.options["geometry"]
    assert list(geometry.offsets) == golden.arrays["aux.offsets"].tolist()
    x, table = (call.inputs[key].requires_grad_() for key in ("x", "table"))
    ct = golden.tensor("ct.y", dtype).requires_grad_()
    y, jacobian = hash_grid(x, table, **call.options, return_jacobian=True)
    dx, dtable = torch.autograd.grad(y, (x, table), ct, create_graph=True)
    found = {"out.y": y, "g.in.x": dx, "g.p.table": dtable}
    found["g.in.x by jacobian"] = torch.einsum("nod,no->nd", jacobian, ct)
    if "gg.in.x" in golden:
        for label, gradient in (("", dx), (" by jacobian", found["g.in.x by jacobian"])):
            h = (golden.tensor("v.in.x", dtype) * gradient).sum()
            second = torch.autograd.grad(h, (table, x, ct), retain_graph=True)
            found |= {f"gg.{key}{label}": grad for key, grad in zip(("p.table", "in.x", "ct.y"), second, strict=True)}
    for key, result in found.items():
        testing.assert_close_golden(result, golden, key.split(" ")[0], dtype)


# ---- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_jacobian_equals_autograd(case):
    call = case.make(torch.float64)
    call.inputs["x"].requires_grad_()
    y, jacobian = call.run(hash_grid, return_jacobian=True)
    assert jacobian.shape == (*y.shape, call.options["geometry"].dims)
    torch.testing.assert_close(y, call.run(hash_grid), rtol=0, atol=0, equal_nan=True)
    for column in range(y.shape[-1]):
        (row,) = torch.autograd.grad(y[..., column].sum(), call.inputs["x"], retain_graph=True)
        broken = jacobian.isnan().flatten(-2).any(-1)  # there every level's NaN reaches x, through a cotangent of 0 too
        assert row[broken].isnan().all()
        torch.testing.assert_close(jacobian[~broken, column], row[~broken], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES[::4], ids=str)
def test_gradients_by_finite_differences(case):
    call = case.make(torch.float64, points="safe")
    x, table = call.inputs["x"], call.inputs["table"]
    keep = slice(0, 4)
    options = dict(call.options)
    if torch.is_tensor(options["max_level"]):
        options["max_level"] = options["max_level"][keep]
    rows = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))[:40]

    def function(x, some):
        return hash_grid(x, table.index_copy(0, rows, some), **options)

    inputs = x[keep].detach().clone().requires_grad_(), table[rows].clone().requires_grad_()
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep"])
@pytest.mark.parametrize("convention", ["tcnn", "torch-ngp", "nerfstudio"])
def test_gradcheck_of_value_and_jacobian(convention, interpolation):
    geometry = build(dims=2, log2_size=4, convention=convention)
    x = testing.safe_points(geometry, 3).requires_grad_()
    table = random_table(geometry).requires_grad_()

    def function(x, table):
        return hash_grid(x, table, geometry, interpolation=interpolation, return_jacobian=True)

    assert torch.autograd.gradcheck(function, (x, table))
    assert torch.autograd.gradgradcheck(function, (x, table))


def test_third_derivative_exists():
    geometry = build(dims=1, n_levels=1, features=1)
    x = testing.safe_points(geometry, 4).requires_grad_()
    value = hash_grid(x, random_table(geometry), geometry, interpolation="smoothstep").sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        value = gradient.sum()
    assert gradient.abs().min() > 0


# ---- independent truth -----------------------------------------------------------------------------------------------


def vertex_table(geometry, function):
    """Table whose dense levels hold function(position of the vertex in [0, 1]^D) [n] -> [n, F]."""
    table = torch.full((geometry.n_entries, geometry.n_features_per_level), NAN, dtype=torch.float64)
    for level, vertices in enumerate(geometry.resolutions):
        corner = torch.tensor(list(itertools.product(*map(range, vertices))), dtype=torch.float64)
        index = (corner.long() * torch.tensor(geometry.strides[level])).sum(-1)
        scale = torch.tensor(geometry.scales[level], dtype=torch.float64)
        table[geometry.offsets[level] + index] = function((corner - geometry.shift) / scale)
    return table


@pytest.mark.parametrize("dims", range(1, 6))
@pytest.mark.parametrize(
    "options",
    [
        {"convention": "torch-ngp"},
        {"convention": "torch-ngp", "align_corners": True},
        {"convention": "nerfstudio"},
        {"convention": "tcnn", "align_corners": True},
    ],
    ids=str,
)
def test_linear_interpolation_reproduces_an_affine_function(dims, options):
    geometry = GridGeometry.build(
        dims, 2, 2, 4, resolutions=[3, [4 + d % 2 for d in range(dims)]], kind="dense", **options
    )
    slope = torch.linspace(-1, 2, 2 * dims, dtype=torch.float64).reshape(2, dims)
    table = vertex_table(geometry, lambda x: x @ slope.T + 0.25)
    x = testing.safe_points(geometry, 20, seed=dims)
    y, jacobian = hash_grid(x, table, geometry, return_jacobian=True)
    torch.testing.assert_close(y, (x @ slope.T + 0.25).repeat(1, 2), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(jacobian, slope.repeat(2, 1).expand(20, -1, -1), rtol=1e-11, atol=1e-11)


def test_linear_reproduction_inside_the_outer_half_cells_of_tcnn():
    geometry = build(dims=3, kind="dense", base_resolution=6)
    table = vertex_table(geometry, lambda x: x.sum(-1, keepdim=True).repeat(1, 2))
    table = table.nan_to_num(7.0)
    x = testing.safe_points(geometry, 50)
    x = x[((x > 0.1) & (x < 0.9)).all(-1)]  # beyond, p + 1 may leave the row
    torch.testing.assert_close(
        hash_grid(x, table, geometry), x.sum(-1, keepdim=True).repeat(1, 4), rtol=1e-12, atol=1e-12
    )


def test_smoothstep_between_two_vertices():
    geometry = GridGeometry.build(1, 1, 1, 4, resolutions=[2], convention="torch-ngp", align_corners=True)
    assert geometry.scales == ((1.0,),)
    table = torch.zeros(geometry.n_entries, 1, dtype=torch.float64)
    table[0], table[1] = 0.5, 2.0
    x = torch.linspace(0.01, 0.99, 9, dtype=torch.float64).unsqueeze(-1)
    y, jacobian = hash_grid(x, table, geometry, interpolation="smoothstep", return_jacobian=True)
    torch.testing.assert_close(y, 0.5 + 1.5 * (3 * x**2 - 2 * x**3))
    torch.testing.assert_close(jacobian[..., 0], 1.5 * (6 * x - 6 * x**2))


def test_nearest_reads_the_nearest_vertex_of_tcnn():
    geometry = GridGeometry.build(2, 1, 1, 8, resolutions=[5], kind="dense")
    table = torch.arange(32.0).unsqueeze(-1)
    x = torch.tensor([[0.0, 0.0], [0.24, 0.26], [1.0, 0.6], [0.12, 0.13]])  # vertices at multiples of 1/4
    y, jacobian = hash_grid(x, table, geometry, interpolation="nearest", return_jacobian=True)
    assert y.flatten().tolist() == [0.0, 1 + 5 * 1, 4 + 5 * 2, 0 + 5 * 1]
    assert (jacobian == 0).all()


def test_hash_by_hand():
    geometry = GridGeometry.build(3, 1, 1, 10, resolutions=[100])
    p = (3, 70, 98)
    x = torch.tensor([[(v + 0.25 - 0.5) / 99 for v in p]], dtype=torch.float64)
    index = (p[0] ^ (p[1] * 2654435761) ^ (p[2] * 805459861)) % 1024
    table = torch.arange(1024.0, dtype=torch.float64).unsqueeze(-1)
    assert hash_grid(x, table, geometry, interpolation="nearest").item() == index


# ---- borders, outside, not finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep"])
def test_clamp(interpolation):
    geometry = build(outside="clamp", align_corners=True)
    table = random_table(geometry)
    x = torch.tensor([[-0.5, 0.3], [0.3, 1.5], [INF, -INF], [2.0, 0.6]], dtype=torch.float64, requires_grad=True)
    y, jacobian = hash_grid(x, table, geometry, interpolation=interpolation, return_jacobian=True)
    inner, inner_jacobian = hash_grid(
        x.detach().clamp(0, 1), table, geometry, interpolation=interpolation, return_jacobian=True
    )
    assert torch.equal(y, inner)
    outside = (x < 0) | (x > 1)
    assert torch.equal(jacobian, torch.where(outside.unsqueeze(-2), 0.0, inner_jacobian))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (dx[outside] == 0).all() and (dx[~outside] != 0).all()


def test_at_zero_and_one_the_derivative_is_that_of_the_cell_to_the_right():
    geometry = GridGeometry.build(1, 1, 1, 4, resolutions=[3], convention="torch-ngp", align_corners=True)
    table = torch.tensor([0.0, 1.0, 3.0, 7.0] + [0.0] * 4, dtype=torch.float64).unsqueeze(-1)  # vertices at 0, 1/2, 1
    x = torch.tensor([[0.0], [0.25], [0.5], [1.0]], dtype=torch.float64)
    _, jacobian = hash_grid(x, table, geometry, return_jacobian=True)
    assert jacobian.flatten().tolist() == [2.0, 2.0, 4.0, 8.0]


def test_zero_outside():
    geometry = build(outside="zero")
    table = random_table(geometry).requires_grad_()
    x = torch.tensor([[-1e-6, 0.5], [0.5, 1.0001], [INF, 0.5], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    y, jacobian = hash_grid(x, table, geometry, return_jacobian=True)
    assert (y[:3] == 0).all() and (jacobian[:3] == 0).all() and (y[3] != 0).all()
    dx, dtable = torch.autograd.grad(y, (x, table), torch.full_like(y, INF).index_fill(0, torch.tensor(3), 0.0))
    assert (dx[:3] == 0).all() and (dtable == 0).all()


def test_wrap_continues_modulo_two_to_the_32():
    geometry = GridGeometry.build(2, 1, 1, 3, resolutions=[5], kind="dense", outside="wrap")
    table = torch.arange(float(geometry.n_entries)).unsqueeze(-1)
    x = torch.tensor([[-0.5, 0.0], [1e15, 0.0], [-1e15, 0.0]])
    y = hash_grid(x, table, geometry, interpolation="nearest")
    cells = [-2, 2147483520, -2147483648]
    assert y.flatten().tolist() == [float(cell % 2**32 % geometry.n_entries) for cell in cells]


@pytest.mark.parametrize("interpolation", ["linear", "smoothstep", "nearest"])
@pytest.mark.parametrize("outside", ["clamp", "zero", "wrap"])
def test_points_that_are_not_finite(outside, interpolation):
    geometry = build(outside=outside, n_levels=3)
    table = random_table(geometry, torch.float32).requires_grad_()
    x = torch.tensor([[NAN, 0.3], [NAN, NAN], [0.3, NAN], [NAN, 2.0], [0.3, 0.6]], requires_grad=True)
    y, jacobian = hash_grid(x, table, geometry, interpolation=interpolation, max_level=2, return_jacobian=True)
    assert y[:4, :4].isnan().all() and (y[:, 4:] == 0).all() and y[4].isfinite().all()
    assert jacobian[:4, :4].isnan().all() and (jacobian[:, 4:] == 0).all() and jacobian[4].isfinite().all()
    for cotangent in (1.0, 0.0, NAN):
        dx, dtable = torch.autograd.grad(y[:4], (x, table), torch.full_like(y[:4], cotangent), retain_graph=True)
        assert dx[:4].isnan().all() and (dx[4] == 0).all()
        assert (dtable == 0).all(), "a NaN point adds nothing to the table, whatever its cotangent"


def test_infinite_points_in_wrap_are_not_finite():
    geometry = build(outside="wrap")
    table = random_table(geometry, torch.float32).requires_grad_()
    x = torch.tensor([[INF, 0.3], [0.2, -INF], [1.01e28, 0.3], [0.2, -3e38]], requires_grad=True)
    y = hash_grid(x, table, geometry)
    dx, dtable = torch.autograd.grad(y.sum(), (x, table))
    assert y.isnan().all() and dx.isnan().all() and (dtable == 0).all()


def test_poisoned_rows_spread_only_to_points_that_read_them():
    geometry = build(n_levels=1, kind="dense")
    table = random_table(geometry)
    table[5] = NAN
    x = testing.safe_points(geometry, 40)
    y = hash_grid(x, table, geometry, interpolation="nearest")
    reads = ((x * 3 + 0.5).floor() @ torch.tensor([1.0, 4.0], dtype=torch.float64)) == 5
    assert 0 < reads.sum() < 40
    assert torch.equal(y.isnan().any(-1), reads)
    masked = hash_grid(x, table, geometry, max_level=0)
    assert (masked == 0).all()


def test_upper_corner_by_ceil_has_no_slope_on_its_faces():
    geometry = GridGeometry.build(2, 1, 2, 6, resolutions=[8], convention="nerfstudio")
    x = torch.tensor([[0.25, 0.3], [0.26, 0.5]], dtype=torch.float64)
    _, jacobian = hash_grid(x, random_table(geometry), geometry, return_jacobian=True)
    assert jacobian[0, :, 0].abs().max() < 1e-15 and jacobian[1, :, 1].abs().max() < 1e-15
    assert jacobian[0, :, 1].abs().min() > 1e-3 and jacobian[1, :, 0].abs().min() > 1e-3


# ---- levels, types, shapes -------------------------------------------------------------------------------------------


def test_max_level():
    geometry = build(n_levels=4, base_resolution=3)
    x, table = testing.safe_points(geometry, 8), random_table(geometry)
    full = hash_grid(x, table, geometry).reshape(8, 4, 2)

    def active(max_level):
        y, jacobian = hash_grid(x, table, geometry, max_level=max_level, return_jacobian=True)
        y, on = y.reshape(8, 4, 2), (y.reshape(8, 4, 2) != 0).all(-1)
        assert torch.equal(y, torch.where(on.unsqueeze(-1), full, 0.0))
        assert torch.equal(jacobian.reshape(8, 4, 2, 2).ne(0).flatten(2).all(-1), on)
        return on

    def first(n):
        return (torch.arange(4) < n).expand(8, 4)

    for n in range(5):
        assert torch.equal(active(n), first(n))
    for m, n in ((0.0, 1), (0.25, 2), (0.5, 3), (0.2, 1), (0.9, 4), (1.0, 4)):  # l < m L + 1e-3
        assert torch.equal(active(m), first(n))
        assert torch.equal(active(torch.tensor(m)), first(n))
    per_point = torch.linspace(0, 1, 8)
    assert torch.equal(active(per_point), torch.arange(4) < (per_point * 4 + 1e-3).unsqueeze(-1))


def test_count_levels():
    assert [count_levels(m, 4, (), torch.float32) for m in (None, 0, 3, 0.0, 0.5, 1.0)] == [4, 0, 3, 1, 3, 4]
    per_point = torch.linspace(0, 1, 11)
    counts = count_levels(per_point, 4, (2, 11), torch.float32)
    assert counts[1].tolist() == [count_levels(float(m), 4, (), torch.float32) for m in per_point]


def test_masked_levels_get_no_gradient():
    geometry = build(n_levels=3)
    table = random_table(geometry).requires_grad_()
    y = hash_grid(testing.safe_points(geometry, 30), table, geometry, max_level=torch.full((30,), 0.4))
    (dtable,) = torch.autograd.grad(y, table, torch.full_like(y, NAN).nan_to_num(1.0))
    assert (dtable[geometry.offsets[2] :] == 0).all() and (dtable[: geometry.offsets[1]] != 0).any()


@pytest.mark.parametrize(
    ("x_dtype", "table_dtype", "compute"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtypes(x_dtype, table_dtype, compute):
    geometry = build()
    x = testing.safe_points(geometry, 6).to(x_dtype).requires_grad_()
    table = random_table(geometry, table_dtype).requires_grad_()
    y, jacobian = hash_grid(x, table, geometry, return_jacobian=True)
    assert y.dtype == table_dtype and jacobian.dtype == compute
    exact = hash_grid(x.detach().to(compute), table.detach().to(compute), geometry)
    assert torch.equal(y, exact.to(table_dtype))
    dx, dtable = torch.autograd.grad(y.sum(), (x, table))
    assert dx.dtype == x_dtype and dtable.dtype == table_dtype


@pytest.mark.parametrize("shape", [(0,), (), (1,), (2, 0), (2, 3)])
def test_leading_dimensions(shape):
    geometry = build()
    table = random_table(geometry).requires_grad_()
    x = torch.rand(*shape, 2, dtype=torch.float64, requires_grad=True)
    y, jacobian = hash_grid(x, table, geometry, return_jacobian=True)
    assert y.shape == (*shape, 4) and jacobian.shape == (*shape, 4, 2)
    flat = hash_grid(x.reshape(-1, 2), table, geometry)
    assert torch.equal(y.reshape(-1, 4), flat)
    dx, dtable = torch.autograd.grad(y.sum(), (x, table))
    assert dx.shape == x.shape and dtable.shape == table.shape


def test_function_transforms():
    geometry = build(convention="nerfstudio", outside="wrap")
    x, table = testing.safe_points(geometry, 5), random_table(geometry)
    y, jacobian = hash_grid(x, table, geometry, return_jacobian=True)

    def one(point):
        return hash_grid(point, table, geometry)

    torch.testing.assert_close(torch.vmap(one)(x), y)
    torch.testing.assert_close(torch.vmap(torch.func.jacrev(one))(x), jacobian)
    torch.testing.assert_close(torch.vmap(torch.func.jacfwd(one))(x), jacobian)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"interpolation": "cubic"},
            ValueError,
            "interpolation must be one of linear, .* got 'cubic'",
        ),
        ({"x": torch.zeros(3, 3)}, ValueError, r"x must have shape \[\.\.\., 2\], got \[3, 3\]"),
        ({"x": torch.tensor(0.5)}, ValueError, r"x must have shape \[\.\.\., 2\], got \[\]"),
        ({"x": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        ({"table": torch.zeros(3, 2)}, ValueError, r"table must have shape \[\d+, 2\] for this geometry, got \[3, 2\]"),
        ({"max_level": 3}, ValueError, "max_level must be an int between 0 and n_levels=2 or a float .* got 3"),
        ({"max_level": -1}, ValueError, "got -1"),
        ({"max_level": 1.5}, ValueError, "a float between 0 and 1, got 1.5"),
        ({"max_level": True}, TypeError, "max_level must be an int, a float or a float tensor, got True"),
        ({"max_level": torch.zeros(5, dtype=torch.int32)}, TypeError, "max_level as a tensor must be floating point"),
        ({"max_level": torch.zeros(4)}, ValueError, r"max_level must broadcast to .* \[5\] of x, got \[4\]"),
        ({"max_level": torch.zeros(2, 5)}, ValueError, r"max_level must broadcast to .* \[5\] of x, got \[2, 5\]"),
    ],
)
def test_refusals(change, error, sentence):
    geometry = build()
    arguments = {"x": torch.zeros(5, 2), "table": torch.zeros(geometry.n_entries, 2), "geometry": geometry, **change}
    with pytest.raises(error, match=f"^hash_grid: .*{sentence}"):
        hash_grid(**arguments)
