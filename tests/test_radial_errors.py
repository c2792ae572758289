# SPDX-License-Identifier: MIT
"""What is wrong with a call of radial_basis is refused in a sentence, by the function and by its definition."""

import pytest
import torch

import camkernels
from camkernels import _backends, _ops

X, CENTERS, FEATURES = torch.rand(5, 2), torch.rand(9, 2), torch.rand(9, 4)
NEIGHBORS = torch.arange(10, dtype=torch.int32).reshape(5, 2) % 9
CALL = {
    "x": X, "centers": CENTERS, "shapes": torch.rand(9, 4), "features": FEATURES, "neighbors": NEIGHBORS,
    "frequencies": torch.rand(3), "keep": 1, "phase": torch.rand(3),
}  # fmt: skip
ELSEWHERE = torch.rand(9, 4, device="meta")

ERRORS = {
    "a list of points": (TypeError, r"x must be a torch\.Tensor, got list", {"x": X.tolist()}),
    "integer points": (TypeError, r"x must be float32, .*, got torch\.int64; convert", {"x": X.long()}),
    "integer features": (TypeError, r"features must be float32", {"features": FEATURES.long()}),
    "points without axes": (ValueError, r"x must have shape \[\.\.\., d\] .* got \[\]", {"x": torch.tensor(1.0)}),
    "five axes": (
        ValueError,
        r"x must have shape \[\.\.\., d\] with d from 1 to 4, got \[5, 5\]",
        {"x": torch.rand(5, 5)},
    ),
    "centers of other axes": (
        ValueError,
        r"centers must have shape \[n, 2\], got \[9, 3\]; x has 2 coordinates",
        {"centers": torch.rand(9, 3)},
    ),
    "no centers": (
        ValueError,
        r"centers must hold at least one kernel, got \[0, 2\]",
        {"centers": torch.rand(0, 2), "shapes": torch.rand(0, 4), "features": torch.rand(0, 4)},
    ),
    "features of other kernels": (
        ValueError,
        r"features must have shape \[9, F\], got \[8, 4\]; there are 9 centers",
        {"features": torch.rand(8, 4)},
    ),
    "shapes of another form": (
        ValueError,
        r"shapes must have shape \[9, 2\], got \[9, 4\]; shape='diagonal' of 9 centers in 2 axes",
        {"shape": "diagonal"},
    ),
    "negative shapes": (
        ValueError,
        r"shapes must not be negative for shape='isotropic', got -0\.5; use shape='full'",
        {"shape": "isotropic", "shapes": torch.tensor([-0.5] + [1.0] * 8).unsqueeze(-1)},
    ),
    "an unknown kind": (ValueError, r"kind must be one of 'nlin', 'ivq', .* got 'ivq_a'", {"kind": "ivq_a"}),
    "an unknown form": (ValueError, r"shape must be one of 'isotropic', .* got 'iso'", {"shape": "iso"}),
    "a number for a truth": (TypeError, r"normalize must be True or False, got 1", {"normalize": 1}),
    "a negative eps": (ValueError, r"eps must be finite and at least 0, got -1", {"eps": -1.0}),
    "more kept than there are": (ValueError, r"keep must be at most the number of features, 4, got 5", {"keep": 5}),
    "half a feature kept": (TypeError, r"keep must be an int, got 0\.5", {"keep": 0.5}),
    "frequencies of another number": (
        ValueError,
        r"frequencies must have shape \[3\], got \[4\]; 4 features, of which keep=1 have no sine",
        {"frequencies": torch.rand(4)},
    ),
    "frequencies that learn": (
        ValueError,
        r"frequencies must be constants, got a tensor that requires a gradient",
        {"frequencies": torch.rand(3, requires_grad=True)},
    ),
    "a list of frequencies": (TypeError, r"frequencies must be a torch\.Tensor", {"frequencies": [1.0, 2.0, 3.0]}),
    "phases of another number": (ValueError, r"phase must have shape \[3\], got \[2\]", {"phase": torch.rand(2)}),
    "phases of nothing": (ValueError, r"phase must be None where there are no frequencies", {"frequencies": None}),
    "neighbors that are no integers": (
        TypeError,
        r"neighbors must be int32 or int64, got torch\.float32; see camkernels\.nearest",
        {"neighbors": NEIGHBORS.float()},
    ),
    "neighbors in lists": (
        TypeError,
        r"neighbors must be a torch\.Tensor or None, got list",
        {"neighbors": NEIGHBORS.tolist()},
    ),
    "neighbors of other points": (
        ValueError,
        r"neighbors must have shape \[5, K\], got \[4, 2\]; x has leading axes \[5\]",
        {"neighbors": NEIGHBORS[:4]},
    ),
    "neighbors without names": (
        ValueError,
        r"neighbors must name at least one kernel per point, got \[5, 0\]",
        {"neighbors": NEIGHBORS[:, :0]},
    ),
    "a neighbour too far": (
        ValueError,
        r"neighbors must be from 0 to 8, there are 9 centers, got 1 to 10",
        {"neighbors": NEIGHBORS % 8 + 1 + (NEIGHBORS == 7) * 2},
    ),
    "a negative neighbour": (
        ValueError,
        r"neighbors must be from 0 to 8, .* got -1 to 7",
        {"neighbors": NEIGHBORS - 1},
    ),
    "features elsewhere": (
        ValueError,
        r"all tensors must be on one device, .*features on meta",
        {"features": ELSEWHERE},
    ),
    "neighbors elsewhere": (
        ValueError,
        r"all tensors must be on one device, .*neighbors on meta",
        {"neighbors": NEIGHBORS.to("meta")},
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_calls(name):
    error, sentence, changes = ERRORS[name]
    for function in (camkernels.radial_basis, camkernels.reference.radial_basis):
        with pytest.raises(error, match=f"^radial_basis: {sentence}"):
            function(**CALL | changes)


def test_what_the_errors_are_made_from_is_right():
    assert camkernels.radial_basis(**CALL).isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_a_backend_that_cannot_run_says_why_and_what_can(backend, monkeypatch):
    for missing in ("cpu_missing", "cuda_missing"):  # a library that could not help is no reason
        monkeypatch.setattr(_ops, missing, "was not built")
    if _backends.can_run(backend, _backends.Call("radial_basis", "cpu")) is None:
        pytest.skip(f"radial_basis runs on {backend} here")
    with pytest.raises(
        RuntimeError, match=rf"^radial_basis: backend '{backend}' cannot run: .*; available: .*reference$"
    ):
        camkernels.radial_basis(**CALL, backend=backend)


def test_neighbours_out_of_range_never_read_out_of_bounds_where_values_cannot_be_looked_at(monkeypatch):
    monkeypatch.setattr("camkernels._radial_basis.can_look_at", lambda tensor: False)  # as on a GPU
    neighbors = NEIGHBORS.clone()
    neighbors[1, 0], neighbors[3, 1] = 9, -1
    y = camkernels.reference.radial_basis(**CALL | {"neighbors": neighbors})
    assert y[[1, 3]].isnan().all() and y[[0, 2, 4]].isfinite().all()


def test_values_of_a_trace_and_of_a_batch_are_not_looked_at():
    def of_points(x, neighbors):
        return camkernels.reference.radial_basis(**CALL | {"x": x, "neighbors": neighbors})

    assert torch.equal(torch.vmap(of_points)(X, NEIGHBORS), of_points(X, NEIGHBORS))
    meta = {name: t.to("meta") if torch.is_tensor(t) else t for name, t in CALL.items()}
    assert camkernels.radial_basis(**meta).shape == (5, 4)
