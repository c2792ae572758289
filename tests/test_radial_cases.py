# SPDX-License-Identifier: MIT
"""The inputs of radial_basis cover every pair of options, and what judges them catches what is wrong."""

import itertools

import pytest
import torch

from camkernels import testing
from camkernels._cases import radial_basis as cases
from camkernels.reference import radial_basis

ALL = testing.cases("radial_basis")


def test_every_pair_of_options_is_covered():
    pairs = {frozenset(pair) for c in ALL for pair in itertools.combinations(c.options.items(), 2)}
    for a, b in itertools.combinations(cases.FACTORS, 2):
        for u, v in itertools.product(cases.FACTORS[a], cases.FACTORS[b]):
            assert frozenset([(a, u), (b, v)]) in pairs, f"{a}={u}, {b}={v}"
    assert len({case.name for case in ALL}) == len(ALL) < 100


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_case_is_reproducible_small_typed_and_clear(case):
    for points in ("mixed", "safe"):
        call, again = (case.make(torch.float16, points=points) for _ in range(2))
        for name, tensor in call.inputs.items():
            torch.testing.assert_close(tensor, again.inputs[name], rtol=0, atol=0, equal_nan=True)
            assert tensor.dtype == (torch.float32 if name == "x" else torch.float16) and tensor.numel() < 500
        assert call.run(radial_basis).dtype == torch.float16
        x, rest = call.inputs["x"].reshape(-1, case.options["dims"]), (call.inputs["centers"], call.inputs["shapes"])
        clear = cases.is_clear(x, *rest, case.options["kind"], case.options["shape"]).all(-1)
        assert clear.all() if points == "safe" else clear[:14].all()
    assert x.isfinite().all() and not case.make().inputs["x"].isfinite().all()
    assert all(t.dtype == torch.float64 for t in case.make(torch.float64).inputs.values())


def reordered(x, centers, shapes, features, neighbors=None, **options):
    """radial_basis with kernels and neighbours in another order: every sum over kernels has another order."""
    order = torch.arange(len(centers) - 1, -1, -1)
    neighbors = None if neighbors is None else len(centers) - 1 - neighbors.flip(-1)
    return radial_basis(x, centers[order], shapes[order], features[order], neighbors, **options)


@pytest.mark.parametrize("dtype", testing.TOLERANCES, ids=str)
@pytest.mark.parametrize("case", ALL[::3], ids=str)
def test_another_order_of_summation_is_within_the_tolerance(case, dtype):
    testing.check(case, reordered, radial_basis, dtype=dtype, order=2)


# ---- wrong implementations are caught --------------------------------------------------------------------------------


def differentiating_the_normaliser(*args, detach_normalizer=True, **options):
    return radial_basis(*args, **options, detach_normalizer=False)


def with_matrices_transposed(x, centers, shapes, *rest, **options):
    dims = x.shape[-1]
    return radial_basis(x, centers, shapes.unflatten(-1, (dims, dims)).mT.flatten(-2), *rest, **options)


def with_neighbors_shifted(x, centers, shapes, features, neighbors, **options):
    return radial_basis(x, centers, shapes, features, (neighbors + 1) % len(centers), **options)


def without_waves(*args, frequencies, keep, **options):
    return radial_basis(*args, **options)


def keeping_none(*args, frequencies, keep, **options):
    frequencies = torch.cat([frequencies.new_ones(keep), frequencies])
    return radial_basis(*args, **options, frequencies=frequencies)


def freezing_shapes(x, centers, shapes, *rest, **options):
    return radial_basis(x, centers, shapes.detach(), *rest, **options) + 0 * shapes.sum()


def rounding_weights(x, *rest, **options):
    return radial_basis(x.bfloat16(), *rest, **options)


@pytest.mark.parametrize(
    ("function", "options", "sentence"),
    [
        (differentiating_the_normaliser, {"normalize": "detached", "neighbors": 3, "kind": "gauss"}, r"grad\.x"),
        (with_matrices_transposed, {"shape": "projected", "dims": 3, "neighbors": 3}, "value"),
        (with_neighbors_shifted, {"neighbors": 3, "kind": "ivq"}, "value"),
        (without_waves, {"waves": "all", "features": 5}, "value"),
        (keeping_none, {"waves": "kept", "features": 5}, "value"),
        (freezing_shapes, {"shape": "full", "kind": "gauss", "normalize": "none"}, r"grad\.shapes"),
        (rounding_weights, {"normalize": "none", "kind": "qd"}, "value"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_a_wrong_implementation_is_caught(function, options, sentence):
    fitting = [c for c in ALL if all(c.options[name] == value for name, value in options.items())] or [
        testing.Case("radial_basis", "chosen", cases.make, dict(ALL[0].options) | options, beside=("neighbors",))
    ]

    def flat(x, centers, shapes, features, neighbors=None, **rest):
        return function(x, centers, shapes, features, neighbors, **rest)

    with pytest.raises(AssertionError, match=f"radial_basis .* torch.float32 {sentence}.* items differ"):
        testing.check(fitting[0], flat, radial_basis, order=2)
