# SPDX-License-Identifier: MIT
"""The Triton backend in Triton's interpreter: run by test_triton_interpreted.py, or alone with TRITON_INTERPRET=1."""

import os

import pytest
import torch
import triton
import triton.language as tl

import triton_interpreter
from camkernels import _ops, testing
from camkernels.triton import hash_grid as kernels
from camkernels.triton.hash_grid import _entry, _levels_on
from conftest import DTYPES, definition_of, function_of, require
from test_operators import Recorder

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
triton_interpreter.repair()

CASES = [case for op in ("hash_grid", "modulated_mlp", "radial_basis") for case in testing.cases(op)]
GRIDS = testing.cases("hash_grid")
TRITON, REFERENCE = function_of("hash_grid", "triton"), definition_of("hash_grid")

# An operation costs the same for one number as for thousands: all features of a point in one tile, but for one test.
TILE_BYTES, kernels.TILE_BYTES = kernels.TILE_BYTES, 128


def dims_of(case):
    return case.options.get("dims", 2) if case.op == "hash_grid" else 0


def with_dtypes():
    """(case, dtype): cases in one and two dimensions in two dtypes, others, which cost 2^dims, in one; in turn."""
    ordered = sorted(CASES, key=lambda case: -dims_of(case))
    pairs = [
        (case, DTYPES[(i + j) % 4]) for i, case in enumerate(ordered) for j in range(2 if dims_of(case) < 4 else 1)
    ]
    return [pytest.param(*pair, id=f"half{i % 2}-{pair[0].op}-{pair[0]}-{pair[1]}") for i, pair in enumerate(pairs)]


def with_jacobian():
    return [p for p in with_dtypes() if testing.has_jacobian(p.values[0].op)]


def agree(case, dtype, **options):
    testing.check(case, function_of(case.op, "triton"), definition_of(case.op), dtype=dtype, **options)


@pytest.fixture
def shortcut(case, monkeypatch):
    """Beyond five dimensions, 2^dims corners choose their sides without an operation, which takes half the time."""
    if dims_of(case) > 5:
        monkeypatch.setattr(kernels, "_side", lambda c, d, sides: sides[(c >> d) & 1][d])


@pytest.mark.usefixtures("shortcut")
@pytest.mark.parametrize(("case", "dtype"), with_dtypes())
def test_value_and_gradients(case, dtype):
    agree(case, dtype, order=1)


@pytest.mark.parametrize(("case", "dtype"), [p for p in with_jacobian() if dims_of(p.values[0]) < 6])
def test_jacobian(case, dtype):
    agree(case, dtype, order=0, jacobian=True)


@pytest.mark.parametrize(("case", "dtype"), [p for p in with_dtypes() if dims_of(p.values[0]) < 4][::7])
def test_second_order_by_the_reference_formula(case, dtype):
    agree(case, dtype, order=2)


@pytest.mark.parametrize(("case", "dtype"), [p for p in with_jacobian() if dims_of(p.values[0]) < 4][::7])
def test_derivatives_of_the_jacobian_by_the_reference_formula(case, dtype):
    agree(case, dtype, order=1, jacobian=True)


@pytest.mark.parametrize("features", [5, 8, 16])
def test_features_in_tiles(monkeypatch, features):
    monkeypatch.setattr(kernels, "TILE_BYTES", TILE_BYTES)
    case = next(c for c in GRIDS if dims_of(c) < 3 and c.options["features"] == features)
    agree(case, torch.float32, order=1)
    agree(case, torch.float64, order=0, jacobian=True)


def test_coordinates_wider_than_the_table():
    call = GRIDS[0].make(torch.bfloat16)
    call.inputs["x"] = GRIDS[0].make(torch.float64).inputs["x"]
    results = [testing.evaluate(f, call, order=2) for f in (TRITON, REFERENCE)]
    testing.compare(GRIDS[0], call, *results)


# ---- one small call in every way it can be made ----------------------------------------------------------------------


@pytest.fixture
def call():
    case = next(c for c in GRIDS if c.options.get("dims") == 2 and c.options["interpolation"] == "smoothstep")
    return case.make(torch.float32, points="safe")


def gradients(function, call, mask="both"):
    inputs = require(call, mask)
    y = function(**inputs, **call.options)
    wanted = [t for t in inputs.values() if t.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), wanted)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [0, 1, 300])
def test_any_number_of_points(call, n):
    call.inputs["x"] = torch.rand(n, 2)
    call.options["max_level"] = None
    assert_same(gradients(TRITON, call), gradients(REFERENCE, call))


@pytest.mark.parametrize("mask", ["points", "parameters"])
def test_one_gradient_alone(call, mask):
    assert_same(gradients(TRITON, call, mask), gradients(REFERENCE, call, mask))


def test_no_level_at_all(call):
    call.options["max_level"] = 0
    assert_same(gradients(TRITON, call), gradients(REFERENCE, call))


def test_third_order_refuses(call):
    inputs = require(call, "points")
    x = inputs["x"]
    g = TRITON(**inputs, **call.options).square().sum()
    for _ in range(2):
        (g,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivatives beyond"):
        torch.autograd.grad(g.sum(), x)


def test_compiled(call):
    def loss(x, table):
        y, jacobian = TRITON(x, table, **call.options, return_jacobian=True)
        return TRITON(x, table, **call.options).square().sum() + y.sum() + jacobian.square().sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        inputs = require(call, "both").values()
        results.append(torch.autograd.grad(function(*inputs), list(inputs)))
    assert_same(*results)


def test_functorch(call):
    x, table = call.inputs["x"].reshape(-1, 2)[:6], call.inputs["table"]
    options = call.options | {"max_level": None}

    def value(function):
        return lambda x, table: function(x, table, **options)

    def transformed(function):
        f = value(function)
        square = torch.func.grad(lambda x, table: f(x, table).square().sum(), argnums=(0, 1))
        yield torch.func.vmap(f, (0, None))(x, table)
        yield from square(x, table)
        yield torch.func.vmap(torch.func.jacrev(f), (0, None))(x, table)
        yield torch.func.grad(lambda x: torch.func.grad(lambda x: f(x, table).square().sum())(x).square().sum())(x)

    assert_same(list(transformed(TRITON)), list(transformed(REFERENCE)))


def test_opcheck(call):
    with Recorder() as recorder:
        testing.evaluate(TRITON, call, order=2)
        testing.evaluate(TRITON, call, order=1, jacobian=True)
    assert len(recorder.calls) == 5
    for operator, arguments in recorder.calls.items():
        assert operator._schema.name.startswith("camkernels::triton_hash_grid")
        torch.library.opcheck(operator, arguments[0])


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_deterministic_algorithms(call):
    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(TRITON, call, "points"), gradients(TRITON, call, "points")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(
            RuntimeError, match=r"does not have a deterministic implementation, but you set .*'reference'"
        ):
            gradients(TRITON, call, "parameters")
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="does not have a deterministic implementation"):
            gradients(TRITON, call, "parameters")
    finally:
        torch.use_deterministic_algorithms(False)


def test_geometries_that_cannot_be_taken(monkeypatch):
    with pytest.raises(RuntimeError, match=r"less than 2\^32 rows"):
        _levels_on(torch.device("cpu"), 2, (1.0, 1.0), (1, 1 << 16, 1 << 32, 0, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="make one call before the capture"):
        _levels_on(torch.device("cuda"), 2, (1.0, 1.0), (1, 4, 16, 0, 0))


def test_a_geometry_on_a_device_stays_where_it_is():
    """A CUDA graph reads it there when it is replayed, however many geometries came in between."""
    first, rows = (_levels_on(torch.device("cpu"), 1, (1.0,), (1, 4, 0, 0)) for _ in range(2))
    for size in range(5, 600):
        _levels_on(torch.device("cpu"), 1, (1.0,), (1, size, 0, 0))
    assert _levels_on(torch.device("cpu"), 1, (1.0,), (1, 4, 0, 0))[0] is first[0] is rows[0]


@triton.jit
def remainder(index_ptr, size, inverse, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    index = tl.load(index_ptr + i).to(tl.uint32)
    extent = (size.to(tl.uint32), inverse.to(tl.uint32), 0, i < 0)
    tl.store(out_ptr + i, _entry(0, ((index,), (index,)), extent, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4097, 2200, 1 << 19, (1 << 31) + 1, (1 << 32) - 1])
def test_the_remainder_of_an_index_is_exact(size):
    generator = torch.Generator().manual_seed(size)
    near = torch.tensor([0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, (1 << 32) // size * size])
    top = torch.tensor([(1 << 32) - 1, (1 << 32) // size * size - 1])
    index = torch.cat([near, top, torch.randint(0, 1 << 32, (1014,), generator=generator)]) & 0xFFFFFFFF
    inverse = int(_levels_on(torch.device("cpu"), 1, (1.0,), (1, size, 0, 0))[1][0, 2])
    out = torch.empty_like(index)
    remainder[(1,)](index, size, inverse, out, len(index))
    assert torch.equal(out, index % size)


# ---- the interpreter's repairs ---------------------------------------------------------------------------------------


@triton.jit
def arithmetic(x_ptr, y_ptr, sum_ptr, wide_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x * x + x)
    tl.store(sum_ptr, tl.sum(x, 0))
    tl.store(wide_ptr + i, (x.to(tl.float32) * 3.1).to(tl.bfloat16))


def test_bfloat16_is_computed_as_numbers():
    x = torch.linspace(-3, 3, 64).bfloat16()
    y, total, wide = torch.empty_like(x), torch.empty(1, dtype=torch.bfloat16), torch.empty_like(x)
    arithmetic[(1,)](x, y, total, wide, 64)
    assert torch.equal(y, x * x + x)
    torch.testing.assert_close(total[0], x.float().sum().bfloat16(), rtol=2**-7, atol=2**-7)
    assert torch.equal(wide, (x.float() * 3.1).bfloat16())  # rounded to nearest even


def test_bfloat16_patterns_are_pytorchs():
    x = torch.cat([torch.randn(1000), torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3.4e38, 1 + 2**-8])])
    ours = torch.from_numpy(triton_interpreter.narrow(x.numpy()).view("int16")).view(torch.bfloat16)
    assert torch.equal(ours.nan_to_num(7), x.bfloat16().nan_to_num(7))


@triton.jit
def fused(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.fma(tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)))


def test_a_fused_multiply_add_rounds_once():
    x, y, z = (torch.rand(1024, generator=torch.Generator().manual_seed(i)) * 1000 for i in range(3))
    out = torch.empty_like(x)
    fused[(1,)](x, y, -z, out, 1024)
    assert torch.equal(out, (x.double() * y.double() - z.double()).float())
    assert not torch.equal(out, x * y - z)


def test_the_operators_are_registered_for_the_cpu_here_only():
    assert _ops.has_kernel("triton_hash_grid", "cpu")
