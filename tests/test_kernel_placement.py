# SPDX-License-Identifier: MIT
"""Weighted k-means and the shapes of kernels give the recorded results of the public code."""

import pytest
import torch

from camkernels import neighbors, testing
from camkernels.neighbors import kernel_shapes, second_moments, weighted_kmeans, width_bounds

FORMS = {"s": "isotropic", "d": "diagonal", "a": "full", "f": "projected"}
RECORDED = [
    (name, kind)
    for name in testing.golden_names("neurbf_kernel_shape__")
    for kind in testing.load_golden(name).hyper["kinds"]
]


@pytest.fixture
def clusters():
    golden = testing.load_golden("neurbf_kmeans__d2")
    return golden, *(golden.tensor(f"in.{name}", torch.float32) for name in ("points", "weights"))


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("given", ["rows", "centers"])
def test_centers_of_the_public_code(clusters, iterations, given):
    golden, points, weights = clusters
    start = torch.from_numpy(golden.arrays["aux.start"])
    start = start if given == "rows" else points[start.long()]
    centers = weighted_kmeans(points, weights, 13, start=start, iterations=iterations)
    assert centers.dtype == torch.float32
    testing.assert_close_golden(centers, golden, f"out.centers_{iterations}", torch.float32)


@pytest.mark.parametrize("form", ["a", "s", "d"])
def test_moments_of_the_public_code(clusters, form):
    golden, points, weights = clusters
    centers = golden.tensor("out.centers_10", torch.float32)
    found = second_moments(points, weights, centers, shape=FORMS[form], alpha=golden.hyper["alpha"])
    key = f"out.kw_sq_ivq_{form}"
    testing.assert_close_golden(found.reshape(golden.arrays[key].shape), golden, key, torch.float32)


@pytest.mark.parametrize("suffix", ["", "_vmin"])
@pytest.mark.parametrize(("name", "kind"), RECORDED)
def test_shapes_of_the_public_code(name, kind, suffix):
    golden = testing.load_golden(name)
    family, form = kind.rsplit("_", 1)
    low, high, resolution = (golden.tensor(f"in.{key}", torch.float64) for key in ("cmin", "cmax", "dims"))
    bounds = width_bounds(low, high, resolution, least=golden.hyper["vmin_min"][suffix] or 0.0)
    moments = golden.tensor(f"in.kw_sq_{kind}", torch.float64).flatten(1)
    found = kernel_shapes(moments, bounds, kind=family, shape=FORMS[form])
    key = f"out.ks_{kind}{suffix}"
    if form == "f":  # rows are defined up to sign and order
        key = f"out.ks_gram_{kind}{suffix}"
        rows = found.unflatten(-1, (len(low), len(low)))
        found = rows.mT @ rows
    testing.assert_close_golden(found.reshape(golden.arrays[key].shape), golden, key, torch.float64)


def test_the_symmetric_form_packs_the_full_one(clusters):
    golden, points, weights = clusters
    centers = golden.tensor("out.centers_10", torch.float32)
    bounds = (torch.full((2,), 1e-3), torch.full((2,), 0.5))
    moments = {form: second_moments(points, weights, centers, shape=form) for form in ("full", "symmetric")}
    assert torch.equal(moments["symmetric"], moments["full"][:, [0, 1, 3]])
    shapes = {form: kernel_shapes(moments[form], bounds, shape=form) for form in moments}
    assert torch.equal(shapes["symmetric"], shapes["full"][:, [0, 1, 3]])


BOUNDS = (torch.full((3,), 0.01), torch.full((3,), 2.0))


def moments_of(values):
    """Full matrices [n, 9] of these eigenvalues [n, 3], in axes of any direction."""
    values = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(len(values), 3, 3, generator=generator, dtype=torch.float64)).Q
    return ((axes * values.unsqueeze(-2)) @ axes.mT).flatten(1)


def widths_of(shapes, shape):
    matrices = shapes.double().unflatten(1, (3, 3))
    return torch.linalg.svdvals(matrices) ** -1 if shape == "projected" else torch.linalg.eigvalsh(matrices).rsqrt()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", ["full", "projected"])
def test_matrices_are_projected_to_positive_ones_on_demand(shape, dtype):
    moments = moments_of([[-0.5, 1.0, 1.5], [1e-9, 0.25, 1.0], [0.0, 0.0, 1.0]] * 20).to(dtype)
    plain = kernel_shapes(moments[::3], BOUNDS, shape=shape)  # of the first kind, which have inverses
    assert (widths_of(plain, shape).isnan() if shape == "full" else plain.isnan()).any(-1).sum() > 10
    widths = widths_of(kernel_shapes(moments, BOUNDS, shape=shape, positive=True), shape)
    assert ((widths > 0.00999) & (widths < 2)).all()


@pytest.mark.parametrize("shape", ["diagonal", "full", "projected", "symmetric"])
def test_a_projection_leaves_positive_matrices_alone(shape):
    moments = moments_of([[0.01, 0.25, 1.0], [0.3, 0.4, 0.5]])
    moments = moments[:, {"diagonal": [0, 4, 8], "symmetric": [0, 1, 2, 4, 5, 8]}.get(shape, list(range(9)))]
    plain, projected = (kernel_shapes(moments, BOUNDS, shape=shape, positive=positive) for positive in (False, True))
    if shape == "projected":  # rows are defined up to sign
        plain, projected = (t.unflatten(1, (3, 3)).mT @ t.unflatten(1, (3, 3)) for t in (plain, projected))
    torch.testing.assert_close(projected, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_projection_is_positive_in_its_dtype_whatever_the_least_width(dtype):
    moments = moments_of([[-0.5, 1.0, 1.5], [0.0, 0.0, 1.0], [-1.0, 0.5, 0.5]] * 200).to(dtype)
    bounds = torch.full((3,), 1e-6), torch.full((3,), 4.0)
    shapes = kernel_shapes(moments, bounds, positive=True)
    assert shapes.dtype == dtype and (torch.linalg.eigvalsh(shapes.double().unflatten(1, (3, 3))) > 0).all()


def test_a_seed_draws_one_start_and_points_without_weight_never():
    generator = torch.Generator().manual_seed(3)
    points, weights = torch.rand(500, 3, generator=generator), torch.rand(500, generator=generator)
    weights[:250] = 0
    first, again, other = (
        weighted_kmeans(points, weights, 40, iterations=0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = (first.unsqueeze(1) == points).all(-1).nonzero()[:, 1]
    assert len(drawn.unique()) == 40 and drawn.min() >= 250


def test_centers_and_moments_have_the_same_bits_for_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    points, weights = torch.rand(50_000, 2, generator=generator), torch.rand(50_000, generator=generator)

    def placed(threads):
        torch.set_num_threads(threads)
        centers = weighted_kmeans(points, weights, 20, iterations=3, generator=torch.Generator().manual_seed(1))
        return centers, second_moments(points, weights, centers)

    before = torch.get_num_threads()
    try:
        alone, together = placed(1), placed(2)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_starts_are_drawn_in_proportion_to_the_weights():
    points, weights = torch.arange(2.0).unsqueeze(-1), torch.tensor([1.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    drawn = [weighted_kmeans(points, weights, 1, iterations=0, generator=generator).item() for _ in range(2000)]
    assert abs(sum(drawn) / 2000 - 0.75) < 0.05


def test_progress_sees_every_iteration():
    seen = []
    points = torch.rand(20, 1)
    weighted_kmeans(
        points, torch.ones(20), 3, iterations=4, progress=lambda steps: (seen.append(i) or i for i in steps)
    )
    assert seen == [0, 1, 2, 3]


def test_a_center_without_points_stays_and_has_the_least_shape():
    points, weights = torch.zeros(3, 2), torch.ones(3)
    centers = torch.tensor([[0.0, 0.0], [9.0, 9.0]])
    assert torch.equal(weighted_kmeans(points, weights, 2, start=centers), centers)
    assert torch.allclose(second_moments(points, weights, centers)[1], 1e-10 * torch.tensor([1.0, 0, 0, 1]), atol=0)


@pytest.mark.parametrize("start", [None, torch.arange(5)])
def test_weights_near_the_largest_number_do_not_overflow(start):
    points, weights = torch.rand(200, 2, dtype=torch.float64) * 9, torch.rand(200, dtype=torch.float64) + 0.5
    found = []
    for factor in (1.0, 2.0**1023):
        generator = torch.Generator().manual_seed(0)
        centers = weighted_kmeans(points, weights * factor, 5, start=start, generator=generator)
        found.append((centers, second_moments(points, weights * factor, centers)))
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


@pytest.mark.parametrize(
    ("error", "message", "weights", "count", "options"),
    [
        (ValueError, "count must be at most the number of points with weight, 3, got 4", [1, 2, 3, 0], 4, {}),
        (ValueError, "weights must be finite and not negative", [1, 2, 3, -1], 2, {}),
        (ValueError, "weights must be finite and not negative", [1, 2, 3, float("nan")], 2, {}),
        (ValueError, r"weights must have shape \[4\]", [1, 2, 3], 2, {}),
        (ValueError, r"start must have shape \[2\]", [1, 2, 3, 4], 2, {"start": torch.arange(3)}),
        (ValueError, r"start must have shape \[2, 1\]", [1, 2, 3, 4], 2, {"start": torch.rand(2, 2)}),
        (ValueError, "iterations must be at least 0", [1, 2, 3, 4], 2, {"iterations": -1}),
    ],
)
def test_kmeans_refuses(error, message, weights, count, options):
    with pytest.raises(error, match=f"^weighted_kmeans: {message}"):
        neighbors.weighted_kmeans(torch.rand(4, 1), torch.tensor(weights, dtype=torch.float32), count, **options)


def test_shapes_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^kernel_shapes: moments must have shape \[n, 4\]"):
        kernel_shapes(torch.ones(3, 2), (torch.zeros(2), torch.ones(2)))
    with pytest.raises(ValueError, match=r"^second_moments: shape must be one of"):
        second_moments(torch.ones(3, 2), torch.ones(3), torch.ones(1, 2), shape="round")


@pytest.mark.parametrize(
    ("error", "message", "start"),
    [
        (
            TypeError,
            r"start \[count\] must be rows of the points, integers, got torch\.float32",
            torch.tensor([0.0, 1.0]),
        ),
        (ValueError, r"start must name rows from 0 to 3, got 0 to 4", torch.tensor([0, 4])),
        (ValueError, r"start must have shape \[2\], got \[3\]; or centres", torch.tensor([0, 1, 2])),
        (ValueError, r"start must have shape \[2, 1\], got \[2, 2\]; or rows", torch.rand(2, 2)),
    ],
)
def test_kmeans_refuses_a_start(error, message, start):
    with pytest.raises(error, match=f"^weighted_kmeans: {message}"):
        neighbors.weighted_kmeans(torch.rand(4, 1), torch.ones(4), 2, start=start)


def test_points_that_cannot_be_clustered_are_named():
    broken = torch.tensor([[0.0], [float("nan")]])
    with pytest.raises(ValueError, match=r"^weighted_kmeans: points must be finite, got 1 points"):
        neighbors.weighted_kmeans(broken, torch.ones(2), 1)
    with pytest.raises(ValueError, match=r"^second_moments: points must have from 1 to 4 coordinates, got \[3, 5\]"):
        second_moments(torch.rand(3, 5), torch.ones(3), torch.rand(1, 5))
    with pytest.raises(ValueError, match=r"^second_moments: alpha must be above 0, got 0"):
        second_moments(torch.rand(3, 2), torch.ones(3), torch.rand(1, 2), alpha=0)


@pytest.mark.parametrize("shape", ["isotropic", "full"])
def test_shapes_refuse_moments_and_bounds_that_give_none(shape):
    moments, low, high = torch.ones(3, 1 if shape == "isotropic" else 4), torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match=r"^kernel_shapes: moments must be finite"):
        kernel_shapes(moments * float("nan"), (low, high), shape=shape)
    with pytest.raises(ValueError, match=r"^kernel_shapes: moments must be above 0 where the square of the least"):
        kernel_shapes(moments * 0, (low, high), shape=shape)
    for bounds in ((high, high / 2), (-high, high), (low, low), (low, high / 0)):
        with pytest.raises(ValueError, match=r"^kernel_shapes: bounds must be from 0 on and in order"):
            kernel_shapes(moments, bounds, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["diagonal", "full", "projected"])
def test_shapes_of_moments_in_16_bits(shape, dtype):
    width = 2 if shape == "diagonal" else 4
    moments = torch.tensor([[0.25, 0.5], [0.5, 0.25]] if width == 2 else [[0.25, 0.0, 0.0, 0.5]], dtype=dtype)
    bounds = torch.zeros(2), torch.ones(2)
    found = kernel_shapes(moments, bounds, shape=shape)
    assert found.dtype == dtype
    torch.testing.assert_close(found, kernel_shapes(moments.float(), bounds, shape=shape).to(dtype))
