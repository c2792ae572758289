# SPDX-License-Identifier: MIT
"""Layers work from several threads, in forked workers, in two processes that train together, and beside each other."""

import copy
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import camkernels
from camkernels import testing
from conftest import LAYERS


def gradients(module, x):
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_several_threads_at_once(layer, two_threads):
    modules = [layer.build() for _ in range(4)]
    inputs = [layer.inputs(700 + 50 * i, seed=i) for i in range(4)]
    expected = [gradients(m, x) for m, x in zip(modules, inputs, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for found, wanted in zip(pool.map(gradients, modules, inputs), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_one_layer_shared_by_several_threads(layer, two_threads):
    module, x = layer.build(), layer.inputs(900)
    expected = gradients(module, x)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: gradients(module, x), range(12)):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_two_models_trained_in_turn_do_not_meet(layer):
    def step(module, optimizer):
        optimizer.zero_grad()
        module(layer.inputs(64)).square().mean().backward()
        optimizer.step()

    originals = [layer.build(), layer.build(dtype=torch.float64)]
    alone = [copy.deepcopy(m) for m in originals]
    for modules, order in ((originals, [0, 1] * 4), (alone, [0] * 4 + [1] * 4)):
        optimizers = [torch.optim.Adam(m.parameters(), lr=1e-2) for m in modules]
        for i in order:
            step(modules[i], optimizers[i])
    for a, b in zip(originals, alone, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- fork ------------------------------------------------------------------------------------------------------------


def work_in_child(module, x, queue):
    torch.set_num_threads(1)  # as the workers of a DataLoader do
    queue.put([t.numpy() for t in gradients(module, x)])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_forked_child_computes(layer, two_threads):
    module, x = layer.build(), layer.inputs(3000)
    expected = gradients(module, x)  # the parent has a pool of threads, which a fork does not copy
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=work_in_child, args=(module, x, queue))
    child.start()
    try:
        found = queue.get(timeout=60)
        child.join(20)
    finally:
        child.kill()
    assert child.exitcode == 0
    rtol, atol = testing.tolerance(torch.float32, "grad.parameters")  # the reference sums in the order of its threads
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, rtol=rtol, atol=atol)


class Points(torch.utils.data.Dataset):
    def __init__(self, module, x):
        self.module, self.x = module, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.module(self.x[i])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_workers_of_a_data_loader(layer):
    module, x = layer.build(), layer.inputs(12)
    loader = torch.utils.data.DataLoader(Points(module, x), batch_size=4, num_workers=2, timeout=60)
    torch.testing.assert_close(torch.cat(list(loader)), module(x).detach())


# ---- two processes that train together -------------------------------------------------------------------------------


def build_field():
    torch.manual_seed(5)
    grid = camkernels.HashGrid(dims=2, n_levels=3, log2_hashmap_size=8, init_scale=1.0)
    return torch.nn.Sequential(grid, torch.nn.Linear(grid.output_dim, 1))


def batches():
    generator = torch.Generator().manual_seed(6)
    return torch.rand(3, 2, 16, 2, generator=generator)  # steps, processes, points, dims


def train(model, step_inputs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in step_inputs:
        optimizer.zero_grad()
        (model(x) - x.sum(-1, keepdim=True)).square().mean().backward()
        optimizer.step()


def train_in_process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(build_field())
    train(model, batches()[:, rank])
    torch.save(model.module.state_dict(), f"{folder}/{rank}.pt")
    del model
    torch.distributed.barrier()  # gloo may wait for ever in the next line for a process that has left
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is built without torch.distributed")
def test_distributed_data_parallel(tmp_path):
    torch.multiprocessing.spawn(train_in_process, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    alone = build_field()
    train(alone, batches().flatten(1, 2))
    for name, parameter in alone.state_dict().items():
        if name.endswith("_extra_state"):
            assert first[name] == parameter
            continue
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter, rtol=1e-4, atol=1e-6)
