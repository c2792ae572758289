# SPDX-License-Identifier: MIT
"""The formulas of csrc/math and the number types of csrc/cpu, one call at a time, against independent arithmetic."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from camkernels import _radial_basis
from camkernels.reference.hash_grid import PRIMES

LINEAR, SMOOTHSTEP, NEAREST = range(3)
INSIDE, CLAMPED, ZEROED, NOT_FINITE = range(4)
NAN, INF = math.nan, math.inf
STEP = 1e-6


def slope_of(function, x, step=STEP):
    return (function(x + step) - function(x - step)) / (2 * step)


# ---- interpolation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LINEAR, SMOOTHSTEP])
def test_blend_and_its_derivatives(probe, kind):
    assert probe.blend(kind, 0.0) == 0.0 and probe.blend(kind, 1.0) == 1.0 and probe.blend(kind, 0.5) == 0.5
    for t in np.linspace(0.01, 0.99, 23):
        assert probe.blend_first(kind, t) == pytest.approx(slope_of(lambda t: probe.blend(kind, t), t), abs=1e-8)
        assert probe.blend_second(kind, t) == pytest.approx(slope_of(lambda t: probe.blend_first(kind, t), t), abs=1e-7)
    if kind == SMOOTHSTEP:  # a continuous first derivative
        assert probe.blend_first(kind, 0.0) == probe.blend_first(kind, 1.0) == 0.0


# ---- coordinates -----------------------------------------------------------------------------------------------------

SETTLED = [
    (0.0, 0, (0.0, INSIDE)), (1.0, 0, (1.0, INSIDE)), (0.25, 2, (0.25, INSIDE)), (-0.0, 1, (0.0, INSIDE)),
    (-0.5, 0, (0.0, CLAMPED)), (1.5, 0, (1.0, CLAMPED)), (INF, 0, (1.0, CLAMPED)), (-INF, 0, (0.0, CLAMPED)),
    (-0.5, 1, (0.0, ZEROED)), (INF, 1, (1.0, ZEROED)), (-0.5, 2, (-0.5, INSIDE)), (7.25, 2, (7.25, INSIDE)),
    (INF, 2, (0.0, NOT_FINITE)), (NAN, 0, (0.0, NOT_FINITE)), (NAN, 1, (0.0, NOT_FINITE)), (NAN, 2, (0.0, NOT_FINITE)),
    (1.01e28, 2, (0.0, NOT_FINITE)), (-3e38, 2, (0.0, NOT_FINITE)), (-(2.0**93), 2, (-(2.0**93), INSIDE)),
]  # fmt: skip


@pytest.mark.parametrize(("x", "mode", "expected"), SETTLED)
def test_settle(probe, x, mode, expected):
    assert probe.settle(x, mode) == expected == probe.settle_float(x, mode)


CELLS = [(0, 0), (5, 5), (-1, 2**32 - 1), (-2147483648, 2**31), (2147483520, 2147483520)]
BEYOND = [(3e9, 2147483520), (1e30, 2147483520), (-3e9, 2**31), (-1e30, 2**31), (INF, 2147483520), (-INF, 2**31)]


def test_cells_saturate(probe, lanes_probe):
    whole, cells = (np.array(column, dtype=np.float64) for column in zip(*CELLS, *BEYOND, strict=True))
    assert probe.to_cell(whole).tolist() == probe.to_cell_float(whole.astype(np.float32)).tolist() == cells.tolist()
    n = lanes_probe.lanes
    for value, cell in (*CELLS, *BEYOND):
        lanes = np.zeros(n, np.float32)
        lanes[-1] = value
        assert lanes_probe.lanes_to_cell(lanes).tolist() == [0] * (n - 1) + [int(cell)]


def test_lanes_round_and_compare_as_numpy(lanes_probe):
    x = np.array([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.999, -2.001, 1e-30, -1e-30, 8388609.0, -1e20, 7.0, 3e9, -7.5, 1e9])
    x = x.astype(np.float32)
    assert lanes_probe.lanes_round_down(x).tolist() == np.floor(x).tolist()
    assert lanes_probe.lanes_where_positive(x).tolist() == (3 * (x > 0)).tolist()


def exact_multiply_add(x, y, z):
    """x * y + z rounded once to float32; the operands keep clear of overflow and subnormal numbers."""
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    if exact == 0:
        return np.float32(0)
    exponent = math.frexp(float(exact))[1] - 24
    scaled = exact / Fraction(2) ** exponent
    return np.float32(math.ldexp(round(scaled), exponent))  # round() takes halves to even


def test_multiply_add_rounds_once(probe, lanes_probe):
    generator = np.random.default_rng(0)
    x = generator.random(480).astype(np.float32)
    y = (generator.random(480) * 2048).astype(np.float32)
    z = np.full(480, 0.5, np.float32)
    exact = [exact_multiply_add(*item) for item in zip(x, y, z, strict=True)]
    assert lanes_probe.lanes_multiply_add(x, y, z).tolist() == [float(v) for v in exact]
    twice = x * y + z
    assert (twice != np.array(exact)).any()  # two roundings would show
    y[:] = 1977.3
    exact = [exact_multiply_add(v, y[0], 0.5) for v in x]
    # without the instruction the product is exact in double, the sum may round twice: once in 2^29
    assert probe.multiply_add(x, float(y[0]), 0.5).tolist() == [float(v) for v in exact]


def test_remainders(probe, lanes_probe):
    words = [0, 1, 6, 7, 8, 13, 14, 15, 2**31 - 1, 2**31, 2**31 + 5, 2**32 - 1, 12345, 7**9, 99, 2**20]
    for size in (1, 2, 7, 8, 100, 2**20, 2**30, 2**31 - 1, 2**31, 2**31 + 11, 2**32 - 1):
        expected = [i % size for i in words]
        assert [probe.remainder_of(i, size) for i in words] == expected
        assert lanes_probe.lanes_remainder_of(np.array(words, np.uint32), size).tolist() == expected


# ---- the stencil of a level ------------------------------------------------------------------------------------------


def test_primes(probe):
    assert tuple(probe.hash_prime(axis) for axis in range(7)) == PRIMES


class Level:
    """One level and one point, with the arithmetic written anew in Python."""

    def __init__(self, dims, kind, hashed, ceil_corner=False, size=None, seed=0):
        generator = np.random.default_rng(seed + 10 * dims)
        self.dims, self.kind, self.hashed, self.ceil_corner = dims, kind, hashed, ceil_corner
        self.scale = [5.0 + d for d in range(dims)]
        self.shift = 0.0 if ceil_corner else 0.5
        self.stride = [0] * dims if hashed else [9**d for d in range(dims)]
        self.size = size or (64 if hashed else 9**dims)
        self.x = [(generator.integers(1, 4) + 0.1 + 0.8 * generator.random() - self.shift) / s for s in self.scale]
        self.table = (generator.random((self.size, 2)) * 2 - 1).tolist()
        self.g, self.v = (generator.random(2) - 0.5).tolist(), (generator.random(dims) - 0.5).tolist()
        self.gj = (generator.random((dims, 2)) - 0.5).tolist()

    def point(self, probe, x=None):
        settings = (self.scale, self.stride, self.size, self.shift, self.hashed, self.ceil_corner, self.kind)
        return probe.Point(*settings, self.x if x is None else x)

    def corners(self):
        """{corner: (row, weight)} with unbounded integers."""
        positions = [x * s + self.shift for x, s in zip(self.x, self.scale, strict=True)]
        found = {}
        for sides in itertools.product((0, 1), repeat=self.dims):
            if self.kind == NEAREST and any(sides):
                continue
            weight, index = 1.0, 0
            for d, side in enumerate(sides):
                cell, t = math.floor(positions[d]), positions[d] - math.floor(positions[d])
                g = t * t * (3 - 2 * t) if self.kind == SMOOTHSTEP else t
                weight *= 1.0 if self.kind == NEAREST else g if side else 1 - g
                corner = math.ceil(positions[d]) if side and self.ceil_corner else cell + side
                term = corner * (PRIMES[d] if self.hashed else self.stride[d]) % 2**32
                index = index ^ term if self.hashed else (index + term) % 2**32
            found[sum(side << d for d, side in enumerate(sides))] = (index % self.size, weight)
        return [found[c] for c in sorted(found)]


KINDS = [LINEAR, SMOOTHSTEP, NEAREST]
DIMS = [
    pytest.param(dims, general, id=f"{dims}{'-any' if general else ''}") for dims in (1, 2, 3) for general in (0, 1)
]
DIMS += [pytest.param(dims, 1, id=f"{dims}-any") for dims in (4, 5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dims", "general"), DIMS)
@pytest.mark.parametrize(("hashed", "ceil_corner", "size"), [(0, 0, None), (1, 0, None), (1, 0, 37), (0, 1, 50)])
def test_rows_and_weights(probe, dims, general, kind, hashed, ceil_corner, size):
    level = Level(dims, kind, bool(hashed), bool(ceil_corner), size)
    index, weight, slope, curve = probe.corners(level.point(probe), bool(general))
    expected = level.corners()
    assert index == [row for row, _ in expected]
    assert weight == pytest.approx([w for _, w in expected], abs=1e-14) and sum(weight) == pytest.approx(1.0)
    if kind == NEAREST:
        assert not np.any(slope) and not np.any(curve)
        return

    def moved(a, h, part):
        x = list(level.x)
        x[a] += h
        return np.array(probe.corners(level.point(probe, x), bool(general))[part])

    for a in range(dims):
        numeric = (moved(a, STEP, 1) - moved(a, -STEP, 1)) / (2 * STEP)
        np.testing.assert_allclose(np.array(slope)[:, a], numeric, atol=1e-7)
        numeric = (moved(a, STEP, 2) - moved(a, -STEP, 2)) / (2 * STEP)
        np.testing.assert_allclose(np.array(curve).reshape(-1, dims, dims)[:, a], numeric, atol=1e-6)


def test_a_whole_position_and_the_ceiling(probe):
    for ceil_corner, upper in ((True, 3), (False, 4)):
        point = probe.Point([4.0], [1], 100, 0.0, False, ceil_corner, LINEAR, [0.75])
        index, weight, *_ = probe.corners(point, False)
        assert index == [3, upper] and weight == [1.0, 0.0]


def test_cells_below_zero_and_strides_that_wrap(probe):
    point = probe.Point([4.0, 4.0], [1, 2**31 + 3], 2**32 - 1, 0.0, False, False, LINEAR, [-0.3, 1.2])
    index = probe.corners(point, False)[0]
    expected = [((x - 2) + (y + 4) * (2**31 + 3)) % 2**32 % (2**32 - 1) for y in (0, 1) for x in (0, 1)]
    assert index == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dims", "general"), DIMS)
def test_formulas(probe, dims, general, kind):
    level = Level(dims, kind, hashed=True)
    g, v, gj, table = np.array(level.g), np.array(level.v), np.array(level.gj), np.array(level.table)

    def at(x, g=level.g):
        return probe.formulas(level.point(probe, list(x)), bool(general), level.table, list(g), level.gj, level.v)

    def slopes(name, function=lambda value: value):
        columns = []
        for a in range(dims):
            h = np.eye(dims)[a] * STEP
            columns.append((function(at(level.x + h)[name]) - function(at(level.x - h)[name])) / (2 * STEP))
        return np.array(columns)

    out, close = at(level.x), lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6)
    close(out["value"], sum(w * table[row] for row, w in level.corners()))
    close(out["value again"], out["value"])
    close(out["jacobian"], slopes("value", np.array))
    close(out["backward_x"], np.array(out["jacobian"]) @ g)
    close(out["jacobian_backward_x"], slopes("jacobian", lambda j: (gj * np.array(j)).sum()))
    close(out["along"], v @ np.array(out["jacobian"]))
    close(out["along_backward_x"], slopes("backward_x", lambda gx: v @ np.array(gx)))
    # towards the table all is linear: <sums, table> is what the sums are the gradient of
    for name, whole in (
        ("backward_table", g @ np.array(out["value"])),
        ("jacobian_backward_table", (gj * np.array(out["jacobian"])).sum()),
        ("along_backward_table", v @ np.array(out["backward_x"])),
    ):
        assert set(out[name]) == {row for row, _ in level.corners()}
        assert sum(np.dot(row, table[i]) for i, row in out[name].items()) == pytest.approx(whole, abs=1e-12)


# ---- grids of nodes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "border"])
@pytest.mark.parametrize(("dims", "general"), DIMS)
def test_nodes_around_a_point(probe, dims, general, zeros, align_corners):
    sizes = [3, 4, 2, 1, 5][:dims]
    rows = math.prod(sizes)
    generator = np.random.default_rng(dims)
    table = np.append(generator.random(rows) - 0.5, 0.0)  # the last row stands for nodes beyond

    def of(u):
        return probe.nodes(list(u), sizes, zeros, align_corners, bool(general))[:4]

    def dot(u, part):
        found = of(u)
        return np.tensordot(table[found[0]], np.array(found[part]).reshape(len(found[0]), -1), 1)

    for u in generator.uniform(-1.4, 1.4, (12, dims)):
        index, weight, *_ = of(u)
        assert max(index) <= rows and sum(weight) == pytest.approx(1.0)
        tensor = torch.tensor(table[:-1]).reshape(1, 1, *reversed(sizes))
        options = {"padding_mode": "zeros" if zeros else "border", "align_corners": align_corners}
        if dims in (2, 3):
            where = torch.tensor(u).reshape(*[1] * (dims + 1), dims)
            assert dot(u, 1) == pytest.approx(F.grid_sample(tensor, where, **options).item(), abs=1e-14)
        for a in range(dims):
            step = STEP * np.eye(dims)[a]
            numeric = (dot(u + step, 1) - dot(u - step, 1)) / (2 * STEP)
            assert dot(u, 2)[a] == pytest.approx(numeric.item(), abs=1e-8)
            numeric = (dot(u + step, 2) - dot(u - step, 2)) / (2 * STEP)
            np.testing.assert_allclose(dot(u, 3).reshape(dims, dims)[a], numeric, atol=1e-8)


@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "border"])
def test_nodes_around_points_that_are_not_finite(probe, zeros):
    for u, broken in (([NAN, 0.1], True), ([0.1, NAN], True), ([INF, 0.1], False), ([0.1, -INF], False)):
        index, weight, *_, found = probe.nodes(u, [4, 1], zeros, True, False)
        assert found == broken and np.isfinite(weight).all()
        if broken:
            assert index == [4] * 4  # no node is touched
    assert probe.nodes([INF, 0.1], [4, 1], zeros, True, False)[0] == ([4] * 4 if zeros else [3, 4, 4, 4])


def test_products_of_three(probe):
    y, h = [0.3, -0.7, 1.1], [0.5, 0.2, -0.4]
    leaves, directions = ([torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in t] for t in (y, h))
    value = leaves[0] * leaves[1] * leaves[2]
    first = torch.autograd.grad(value, leaves, create_graph=True)
    tangent = sum(d * g for d, g in zip(directions, first, strict=True))
    second = torch.autograd.grad(tangent, leaves)
    expected = (value.item(), [g.item() for g in first], tangent.item(), [g.item() for g in second])
    for found, wanted in zip(probe.products(y, h), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-14)


# ---- radial basis ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", _radial_basis.SHAPES)
@pytest.mark.parametrize("kind", _radial_basis.KINDS)
def test_a_kernel_and_its_derivatives(probe, kind, form):
    numbers = np.array([0.7, -0.2, 0.3, 0.4, 0.9, 0.2, 0.1, 1.2])  # x, centre, shape
    along = np.array([0.3, -0.5, 0.2, 0.7, -0.4, 0.6, 0.5, -0.3])

    def kernel(step, direction):
        places = _radial_basis.KINDS.index(kind), _radial_basis.SHAPES.index(form)
        return probe.radial_kernel(*places, numbers + step * direction, along)

    _, tangent, first, second = kernel(0.0, along)
    slopes = [slope_of(lambda t, d=d: kernel(t, d)[0], 0.0) for d in np.eye(8)]
    assert first == pytest.approx(slopes, rel=1e-7, abs=1e-7)
    assert tangent == pytest.approx(float(along @ first), rel=1e-13, abs=1e-13)
    curves = [slope_of(lambda t, i=i: kernel(t, along)[2][i], 0.0) for i in range(8)]
    assert second == pytest.approx(curves, rel=1e-7, abs=1e-7)


# ---- number types ----------------------------------------------------------------------------------------------------

PATTERNS = np.arange(1 << 16, dtype=np.uint16)
TYPES = {"half": torch.float16, "bfloat16": torch.bfloat16}


def bits(tensor):
    return tensor.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("name", TYPES)
def test_every_pattern_is_read_as_torch_reads_it(lanes_probe, name):
    expected = torch.from_numpy(PATTERNS.view(np.int16)).view(TYPES[name]).float().numpy()
    found = getattr(lanes_probe, f"from_{name}")(PATTERNS)
    np.testing.assert_array_equal(found, expected)
    finite = np.isfinite(expected)
    assert (np.signbit(found) == np.signbit(expected))[finite].all()
    with np.errstate(invalid="ignore"):  # signalling NaN become quiet
        back = getattr(lanes_probe, f"to_{name}")(found.astype(np.float64))
    assert (back[finite] == PATTERNS[finite]).all()
    assert np.isnan(getattr(lanes_probe, f"from_{name}")(back[np.isnan(expected)])).all()


def rounding_cases(name):
    """Midpoints of neighbours and a float32 step to both sides of them, the ends of the range, random numbers."""
    values = torch.from_numpy(PATTERNS.view(np.int16)).view(TYPES[name]).float()
    values = values[values.isfinite()].unique()
    middle = ((values[1:].double() + values[:-1].double()) / 2).float()
    low, high = (torch.nextafter(middle, torch.tensor(to)) for to in (-INF, INF))
    extra = torch.tensor([65504.0, 65519.996, 65520.0, 65536.0, 3.4e38, -3.4e38, 1e-45, 2e-8, 2.98e-8, INF, -INF, NAN])
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-9, 6, 20000)
    return torch.cat([middle, low, high, extra, noise])


@pytest.mark.parametrize("name", TYPES)
def test_rounding_is_to_the_nearest_even(lanes_probe, name):
    values = rounding_cases(name)
    expected = values.to(TYPES[name])
    found = getattr(lanes_probe, f"to_{name}")(values.double().numpy())
    broken = values.isnan().numpy()
    assert (found == bits(expected))[~broken].all()
    assert np.isnan(getattr(lanes_probe, f"from_{name}")(found[broken])).all()


# ---- rows far away ---------------------------------------------------------------------------------------------------

FAR = {  # rows whose byte, or number, offset passes 2^31 and 2^32
    "one float64": (2**28, 2**31 + 7, 2**32 - 2),
    "8 of 8 float32": (2**28 + 1, 2**29 + 5),
    "lanes of 2 float32": (2**28, 2**30 - 1, 2**30 + 3),
    "lanes of 2 of 3 float32": (2**28, 2**30 + 3),
    "lanes of 1 float16": (2**30, 2**31 - 1),
    "lanes of 2 bfloat16": (2**29 + 1, 2**30 + 3),
}


@pytest.mark.parametrize(("kind", "row"), [(kind, row) for kind in FAR for row in FAR[kind]])
def test_rows_behind_two_to_the_31(lanes_probe, kind, row):
    try:
        found = lanes_probe.far_row(row, kind)
    except MemoryError:
        pytest.skip("this machine promises no more virtual memory than it has")
    count = int(next(word for word in kind.replace("one", "1").split() if word.isdigit()))
    assert found == [float(f + 1) for f in range(count)]
