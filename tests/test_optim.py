# SPDX-License-Identifier: MIT
"""SparseRowAdam: Adam where every row is touched, nothing elsewhere, its formula row by row."""

import copy
import math
import pickle

import pytest
import torch

import camkernels
from camkernels import HashGrid, RadialBasis, _gpu, _ops, reference
from camkernels.optim import SparseRowAdam
from conftest import DTYPES

NO_GPU = _gpu.no_gpu()
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]),
]
BETAS, EPS = (0.9, 0.99), 1e-15


def table(*shape, device="cpu", dtype=torch.float64):
    return torch.nn.Parameter(torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype).to(device))


def gradients(steps, rows, *tail):
    """Dense gradients, each of some of the rows, and none at all in the last step."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(steps, rows, *tail, generator=generator, dtype=torch.float64)
    used = torch.rand(steps, rows, generator=generator) < 0.4
    used[-1] = False
    return drawn * used.reshape(steps, rows, *[1] * len(tail))


def by_the_formula(p, gradient_list, lr):
    """The documented definition, one row at a time."""
    p = p.detach().clone()
    for row in range(len(p)):
        m, v, t = torch.zeros_like(p[row]), torch.zeros_like(p[row]), 0
        for gradient in gradient_list:
            g = gradient[row]
            if not g.any():
                continue
            t, m, v = t + 1, BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
            p[row] -= lr * (m / (1 - BETAS[0] ** t)) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS)
    return p


@pytest.fixture(params=["reference", "cpu"])
def backend(request, monkeypatch):
    """Forces one that can run."""
    monkeypatch.setenv("CAMKERNELS_BACKEND", request.param)
    if request.param == "cpu" and not _ops.has_kernel("sparse_row_adam", "cpu"):
        pytest.skip(str(_ops.cpu_missing))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tail", [(), (2,), (3, 2)])
def test_the_formula(tail, sparse, backend):
    steps_as_the_formula(tail, sparse, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tail", [(), (2,), (3, 2), (40,)])
def test_the_formula_on_every_device(tail, sparse, device):
    steps_as_the_formula(tail, sparse, device)


def steps_as_the_formula(tail, sparse, device):
    parameter, given = table(7, *tail, device=device), gradients(9, 7, *tail).to(device)
    expected = by_the_formula(parameter, given, lr=0.1)
    optimizer = SparseRowAdam([parameter], lr=0.1)
    for gradient in given:
        parameter.grad = gradient.to_sparse(1) if sparse else gradient
        optimizer.step()
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-13)


def test_where_every_row_is_touched_it_is_adam():
    one, other = table(5, 3), table(5, 3)
    ours = SparseRowAdam([one], lr=0.1, betas=BETAS, eps=1e-8)
    theirs = torch.optim.Adam([other], lr=0.1, betas=BETAS, eps=1e-8)
    for gradient in torch.randn(10, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64):
        one.grad = other.grad = gradient
        ours.step()
        theirs.step()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_other_rows_keep_parameter_and_moments():
    parameter = table(6, 2)
    optimizer = SparseRowAdam([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = parameter.detach().clone(), copy.deepcopy(optimizer.state[parameter])
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[2, 1] = 3.0
    optimizer.step()
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(parameter[others], before[0][others]) and (parameter[2, 1] != before[0][2, 1])
    state = optimizer.state[parameter]
    assert state["step"].tolist() == [1, 1, 2, 1, 1, 1]
    assert all(torch.equal(state[name][others], before[1][name][others]) for name in state)


def test_rows_listed_several_times_are_summed():
    one, other = table(4, 2), table(4, 2)
    index, values = torch.tensor([[1, 3, 1]]), torch.arange(1.0, 7.0, dtype=torch.float64).reshape(3, 2)
    one.grad = torch.sparse_coo_tensor(index, values, (4, 2), check_invariants=True)
    other.grad = one.grad.to_dense()
    for parameter in (one, other):
        SparseRowAdam([parameter], lr=0.1).step()
    assert torch.equal(one, other)


def test_a_run_goes_on_from_its_state():
    whole, part, given = table(7, 2), table(7, 2), gradients(8, 7, 2)
    optimizer, first = SparseRowAdam([whole], lr=0.1), SparseRowAdam([part], lr=0.1)
    for gradient in given:
        whole.grad = gradient
        optimizer.step()
    for gradient in given[:4]:
        part.grad = gradient
        first.step()
    second = SparseRowAdam([part], lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for gradient in given[4:]:
        part.grad = gradient
        second.step()
    assert torch.equal(whole, part)
    assert second.state[part]["step"].dtype == torch.int32
    second.load_state_dict(first.state_dict())  # and once more


def random_state(rows, width, dtype, seed=3):
    """Values, moments and counts of steps, some of them large, of a run."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)
    first, second = (torch.randn(rows, width, generator=generator, dtype=torch.float64).to(wide) for _ in range(2))
    steps = torch.randint(0, 5, (rows,), generator=generator, dtype=torch.int32)
    steps[::5] = 100_000
    return values, first, second.square(), steps


WIDTHS = (1, 2, 3, 4, 8, 16, 32, 37)  # a pack of lanes holds several rows, or a row several packs and a rest


@pytest.mark.skipif(not _ops.has_kernel("sparse_row_adam", "cpu"), reason=str(_ops.cpu_missing))
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("share", [0.02, 0.6, 1.0])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_and_definition_agree(dtype, width, share, listed):
    rows, lr, betas, eps = 203, 0.01, (0.9, 0.99), 1e-8
    state = random_state(rows, width, dtype)
    if share == 1.0:
        state[3][:100] = 7  # neighbours of one count
    generator = torch.Generator().manual_seed(4)
    gradient = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    gradient = (gradient * (torch.rand(rows, width, generator=generator) < share)).to(dtype)
    index = torch.randperm(rows, generator=generator)[: rows // 2] if listed else None
    gradient = gradient if index is None else gradient[index]
    ours, expected = [t.clone() for t in state], [t.clone() for t in state]
    corrections = camkernels.optim._corrections(betas, ours[1].dtype, torch.device("cpu"))
    camkernels.optim._STEP(*ours, gradient, index, corrections, lr, *betas, eps)
    reference.sparse_row_adam(*expected, gradient, index, lr=lr, betas=betas, eps=eps)
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype)
    for name, got, wanted, before in zip(("values", "first", "second", "steps"), ours, expected, state, strict=True):
        rtol = tolerance or (torch.finfo(dtype).eps if name == "values" else 1e-6)
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}")
        untouched = expected[3] == state[3]
        assert torch.equal(got[untouched], before[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(width, dtype):
    rows = 70_003  # the last pack of no share is whole
    gradient = torch.randn(rows, width, generator=torch.Generator().manual_seed(5)).to(dtype)
    gradient[torch.rand(rows, generator=torch.Generator().manual_seed(6)) < 0.7] = 0
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            parameter = torch.nn.Parameter(torch.zeros(rows, width, dtype=dtype))
            optimizer = SparseRowAdam([parameter], lr=0.1)
            for g in (gradient, gradient.roll(1, 0)):
                parameter.grad = g
                optimizer.step()
            found.append((parameter.detach(), optimizer.state[parameter]["step"]))
        finally:
            torch.set_num_threads(before)
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def as_sparse(gradient):
    """All of its rows, listed."""
    rows = torch.arange(len(gradient))[None]
    return torch.sparse_coo_tensor(rows, gradient, gradient.shape, check_invariants=True)


@pytest.mark.parametrize("width", [2, 5, 32])
@pytest.mark.parametrize("sparse", [False, True])
def test_nan_counts_as_a_gradient_and_negative_zero_does_not(sparse, width, backend):
    parameter = table(40, width, dtype=torch.float32)
    before = parameter.detach().clone()
    gradient = torch.full((40, width), -0.0)
    gradient[17, -1] = math.nan
    parameter.grad = as_sparse(gradient) if sparse else gradient
    optimizer = SparseRowAdam([parameter], lr=0.1)
    optimizer.step()
    assert optimizer.state[parameter]["step"].nonzero().flatten().tolist() == [17]
    assert parameter[17, -1].isnan() and torch.equal(parameter[17, :-1], before[17, :-1])
    others = torch.arange(40) != 17
    assert torch.equal(parameter[others], before[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_short_numbers_are_float32_and_stay_so(dtype):
    parameter, reader = table(6, 2, dtype=dtype), table(6, 2, dtype=dtype)
    optimizer, second = SparseRowAdam([parameter], lr=0.1), SparseRowAdam([reader], lr=0.1)
    parameter.grad = torch.full((6, 2), 0.3, dtype=dtype)
    optimizer.step()
    second.load_state_dict(pickle.loads(pickle.dumps(optimizer)).state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        state = second.state[reader][name]
        assert state.dtype == torch.float32 and torch.equal(state, optimizer.state[parameter][name])


def test_a_parameter_that_is_not_contiguous(backend):
    parameter, other = table(3, 5), table(3, 5)
    turned = torch.nn.Parameter(parameter.detach().T.contiguous().T)
    assert not turned.is_contiguous()
    for p in (turned, other):
        optimizer = SparseRowAdam([p], lr=0.1)
        for gradient in gradients(4, 3, 5):
            p.grad = gradient
            optimizer.step()
    assert torch.equal(turned, other)


def test_moments_in_the_layout_of_the_parameter_are_taken_over(backend):
    """As earlier versions saved them: transposed, in bfloat16."""
    parameter = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16).t())
    optimizer = SparseRowAdam([parameter], lr=0.1)
    parameter.grad = torch.ones(5, 3, dtype=torch.bfloat16)
    optimizer.step()
    state = optimizer.state_dict()
    for name in ("exp_avg", "exp_avg_sq"):
        state["state"][0][name] = state["state"][0][name].bfloat16().t().contiguous().t()
    optimizer.load_state_dict(state)
    before = parameter.detach().clone()
    optimizer.step()
    assert (parameter.detach() != before).all() and optimizer.state[parameter]["exp_avg"].dtype == torch.float32


def test_betas_of_a_loaded_state_are_looked_at():
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    optimizer = SparseRowAdam([parameter])
    optimizer.param_groups[0]["betas"] = (0.9, 1.0)
    parameter.grad = torch.ones(4, 2)
    with pytest.raises(
        ValueError, match=r"betas must be at least 0 and at most 0\.99999, got \(0\.9, 1\.0\); for slower"
    ):
        optimizer.step()


@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_a_backend_that_is_forced_on_the_ops_does_not_stop_it(forced, monkeypatch):
    monkeypatch.setenv("CAMKERNELS_BACKEND", forced)
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    parameter.grad = torch.ones(4, 2)
    SparseRowAdam([parameter], lr=0.1).step()
    assert torch.allclose(parameter.detach(), torch.tensor(-0.1))


def test_the_table_of_corrections_ends_where_both_are_one():
    for dtype in (torch.float32, torch.float64):
        table_of = camkernels.optim._corrections((0.9, 0.99), dtype, torch.device("cpu"))
        assert table_of[-1].tolist() == [1.0, 1.0] and table_of[-2, 1] >= 1.0
        t = torch.arange(1, len(table_of), dtype=torch.float64)
        torch.testing.assert_close(table_of[1:, 0].double(), 1 / (1 - 0.9**t), rtol=torch.finfo(dtype).eps, atol=0)
    assert camkernels.optim._corrections((0.0, 0.0), torch.float64, torch.device("cpu"))[1:].eq(1).all()


def test_the_operator_is_what_the_dispatcher_expects():
    state = random_state(7, 2, torch.float32)
    corrections = camkernels.optim._corrections((0.9, 0.99), torch.float32, torch.device("cpu"))
    for rows in (None, torch.tensor([5, 1])):
        gradient = torch.ones(7 if rows is None else 2, 2)
        arguments = (*state, gradient, rows, corrections, 0.1, 0.9, 0.99, 1e-8)
        torch.library.opcheck(torch.ops.camkernels.sparse_row_adam.default, arguments)


@pytest.mark.skipif(not _ops.has_kernel("sparse_row_adam", "cpu"), reason=str(_ops.cpu_missing))
@pytest.mark.parametrize("row", [-1, 7])
def test_a_row_that_is_not_there_is_refused(row):
    state = random_state(7, 2, torch.float32)
    corrections = camkernels.optim._corrections((0.9, 0.99), torch.float32, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="SparseRowAdam: rows must be below 7 and not negative"):
        camkernels.optim._STEP(*state, torch.ones(1, 2), torch.tensor([row]), corrections, 0.1, 0.9, 0.99, 1e-8)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (0,)])
def test_a_table_without_numbers(shape, backend):
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.zeros(shape)
    optimizer = SparseRowAdam([parameter], lr=0.1)
    optimizer.step()
    assert optimizer.state[parameter]["step"].sum() == 0


def test_kernels_of_a_radial_basis_that_no_point_sees_stay():
    torch.manual_seed(0)
    basis = RadialBasis(64, 2, 8, neighbors=2)
    optimizer = SparseRowAdam([basis.features], lr=1e-2)
    x = torch.rand(16, 2) * 0.2
    neighbors = camkernels.nearest(x, basis.centers, 2)
    seen = torch.zeros(64, dtype=torch.bool)
    seen[neighbors.long().flatten()] = True
    before, losses = basis.features.detach().clone(), []
    for _ in range(80):
        loss = (basis(x, neighbors).sum(-1) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0] and 0 < seen.sum() < 64
    assert torch.equal(basis.features[~seen], before[~seen])


def test_a_hash_grid_learns():
    torch.manual_seed(0)
    grid = HashGrid(2, n_levels=4, log2_hashmap_size=10, finest_resolution=64)
    optimizer = SparseRowAdam(grid.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        x = torch.rand(64, 2)
        loss = (grid(x).sum(-1) - torch.sin(9 * x[:, 0])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"lr": -1.0}, "SparseRowAdam: lr must be"),
        ({"betas": (0.9, 1.0)}, "SparseRowAdam: betas must be at least 0 and at most 0.99999"),
        ({"betas": (math.nan, 0.9)}, r"SparseRowAdam: betas\[0\] must be finite, got nan"),
        ({"betas": (0.9,)}, r"SparseRowAdam: betas must be two numbers, got \(0\.9,\)"),
        ({"betas": 0.9}, r"SparseRowAdam: betas must be two numbers, got 0\.9"),
        ({"betas": None}, r"SparseRowAdam: betas must be two numbers, got None; give a tuple such as \(0\.9, 0\.99\)"),
        ({"betas": "ab"}, "SparseRowAdam: betas must be two numbers, got 'ab'; give"),
        ({"betas": (0.9, 0.99, 0.5)}, r"SparseRowAdam: betas must be two numbers, got \(0\.9, 0\.99, 0\.5\); give"),
        ({"betas": (0.9, None)}, r"SparseRowAdam: betas\[1\] must be a number, got None; give a float"),
        ({"lr": None}, "SparseRowAdam: lr must be a number, got None; give a float"),
        ({"eps": "x"}, "SparseRowAdam: eps must be a number, got 'x'; give a float"),
        ({"params": None}, "SparseRowAdam: params must be tensors or groups of them, got None; give"),
        ({"params": [{"lr": 1e-3}]}, "SparseRowAdam: a group of parameters must have 'params', got lr"),
        ({"params": [{"params": [table(2, 2)], "weight_decay": 0.1}]}, "a group of parameters has weight_decay; its"),
        (
            {"params": [{"params": [table(2, 2)], "beta": 1, "alpha": 2}]},
            "a group of parameters has alpha, beta; its options are lr, betas, eps, set keys of your own",
        ),
        ({"params": [{"params": [table(2, 2)], "lr": -1.0}]}, "SparseRowAdam: lr must be"),
        ({"params": [{"params": [table(2, 2)], "eps": math.nan}]}, "SparseRowAdam: eps must be"),
        ({"params": [torch.nn.Parameter(torch.tensor(1.0))]}, "SparseRowAdam: parameters must have rows"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises((ValueError, TypeError), match=words):
        SparseRowAdam(**{"params": [table(2, 2)]} | arguments)


def test_a_refused_group_is_not_added():
    optimizer = SparseRowAdam([table(2, 2)])
    with pytest.raises(ValueError, match="betas must be at least 0"):
        optimizer.add_param_group({"params": [table(2, 2)], "betas": (0.9, 1.0)})
    assert len(optimizer.param_groups) == 1


def test_an_option_that_is_set_later_is_not_ignored():
    parameter = table(2, 2)
    parameter.grad = torch.ones_like(parameter)
    optimizer = SparseRowAdam([{"params": [parameter], "name": "table"}])
    optimizer.param_groups[0]["share"] = 0.5  # one of the user's
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ValueError, match="a group of parameters has weight_decay; its options are lr, betas, eps"):
        optimizer.step()


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR", "StepLR"])
def test_schedules_of_torch_drive_it_and_go_on_from_a_state(schedule):
    options = {
        "OneCycleLR": {"max_lr": 0.1, "total_steps": 8},
        "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
        "StepLR": {"step_size": 2},
    }
    parameter = table(2, 2)
    parameter.grad = torch.ones_like(parameter)
    optimizer = SparseRowAdam([parameter])
    scheduler = getattr(torch.optim.lr_scheduler, schedule)(optimizer, **options[schedule])
    rates = set()
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.add(optimizer.param_groups[0]["lr"])
    other = SparseRowAdam([table(2, 2)])
    other.load_state_dict(optimizer.state_dict())
    assert len(rates) > 1 and other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("state", [None, {}, {"param_groups": []}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(
        ValueError, match=r"SparseRowAdam: state_dict must be what state_dict\(\) of this optimizer gives"
    ):
        SparseRowAdam([table(2, 2)]).load_state_dict(state)


def test_states_of_others_are_refused_and_change_nothing():
    parameter = table(3, 2)
    parameter.grad = torch.ones_like(parameter)
    optimizer, adam, wider = SparseRowAdam([parameter]), torch.optim.Adam([parameter]), table(3, 4)
    wider.grad = torch.ones_like(wider)
    sgd, fresh = torch.optim.SGD([parameter]), torch.optim.Adam([parameter])
    others = [adam, SparseRowAdam([wider]), sgd, fresh]
    for one in (optimizer, *others[:3]):
        one.step()
    before = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    for other in others:
        with pytest.raises(ValueError, match=r"the state of a parameter must have the shapes|a group of parameters"):
            optimizer.load_state_dict(other.state_dict())
        assert all(torch.equal(optimizer.state[parameter][name], value) for name, value in before.items())


def test_a_gradient_of_two_sparse_axes_is_refused():
    parameter = table(2, 2)
    parameter.grad = torch.ones(2, 2, dtype=torch.float64).to_sparse(2)
    with pytest.raises(ValueError, match="one sparse axis, got 2"):
        SparseRowAdam([parameter]).step()
