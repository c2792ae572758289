# SPDX-License-Identifier: MIT
"""Which machines the CUDA library fits, played: a GPU, a driver or a PyTorch that does not is told in a sentence."""

from __future__ import annotations

import pytest
import torch

import camkernels
from camkernels import _backends, _gpu, _info, _ops
from camkernels import triton as triton_backend
from camkernels._backends import Call

FACTS = {
    "cuda": "release 13.0, V13.0.88",
    "libraries": {
        "_cuda": {"nvcc": "-O3 " + " ".join(f"-gencode=arch=x,code={c}" for c in ("sm_80", "sm_90", "compute_90"))}
    },
}


@pytest.fixture
def played(monkeypatch):
    """played(cuda=release of torch, capability of the GPU or None, facts of the build): a machine with all of it."""

    def play(cuda="13.0", capability=(9, 0), facts=FACTS):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "A Card")
        monkeypatch.setattr(_gpu, "_facts", lambda: facts)
        monkeypatch.setattr(_ops, "has_kernel", lambda name, device: True)
        _gpu._cached.cache_clear()

    yield play
    _gpu._cached.cache_clear()


@pytest.mark.parametrize("index", [None, 0])
def test_a_library_that_fits(played, index):
    played()
    assert _backends.can_run("cuda", Call("hash_grid", "cuda", index)) is None
    assert _backends.choose(Call("hash_grid", "cuda", index), None) == "cuda"


@pytest.mark.parametrize("index", [None, 0])
def test_a_library_of_another_release_of_cuda(played, index):
    played(cuda="12.8")
    reason = _backends.can_run("cuda", Call("hash_grid", "cuda", index))
    assert "built with CUDA 13.0, this PyTorch with CUDA 12.8" in reason and "nvcc of a CUDA 12 toolkit" in reason
    played(cuda="13.2")
    assert _backends.can_run("cuda", Call("hash_grid", "cuda", index)) is None


def test_a_pytorch_for_other_gpus(played):
    played(cuda=None)
    assert "another kind of GPU" in _backends.can_run("cuda", Call("hash_grid", "cuda"))


@pytest.mark.parametrize("capability, fits", [((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 1), True)])
def test_the_architecture_of_the_gpu(played, capability, fits):
    played(capability=capability)
    reason = _backends.can_run("cuda", Call("hash_grid", "cuda", 0))
    if fits:
        assert reason is None
    else:
        assert "holds code for sm_80, sm_90" in reason or "holds code for compute_90, sm_80, sm_90" in reason
        assert "A Card has compute capability 7.5" in reason and "TORCH_CUDA_ARCH_LIST=7.5" in reason


def test_a_backend_that_does_not_fit_is_not_chosen_and_says_why_if_forced(played):
    played(capability=(7, 5))
    call = Call("hash_grid", "cuda", 0)
    assert _backends.choose(call, None) in ("triton", "reference")
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run: _cuda\.so holds code for .*; available: "):
        _backends.choose(call, "cuda")


@pytest.mark.parametrize(
    "code, able, unable",
    [
        ("sm_80", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        ("sm_90a", [(9, 0)], [(10, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
    ],
)
def test_which_gpu_runs_which_code(code, able, unable):
    assert all(_gpu.runs(code, capability) for capability in able)
    assert not any(_gpu.runs(code, capability) for capability in unable)


def test_without_a_note_of_the_build_nothing_is_refused(played):
    played(capability=(7, 5), cuda="12.8", facts={})
    assert _backends.can_run("cuda", Call("hash_grid", "cuda", 0)) is None


def test_no_driver_is_told_in_pytorch_s_own_words(played, monkeypatch):
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check ...\nand more")

    played(capability=None)
    monkeypatch.setattr(torch.cuda, "init", init)
    wanted = "PyTorch finds no CUDA device: Found no NVIDIA driver on your system. Please check ..."
    assert _gpu.no_gpu() == wanted == _info.reason_against("cuda", "hash_grid")
    played(cuda=None, capability=None)
    assert "was built without CUDA" in _gpu.no_gpu() and "pytorch.org" in _gpu.no_gpu()
    played()
    assert _gpu.no_gpu() is None


def test_triton_missing(monkeypatch):
    monkeypatch.setattr(triton_backend, "MISSING", "Triton is not installed; install it")
    with pytest.raises(RuntimeError, match=r"hash_grid: backend 'triton' cannot run: Triton is not installed; "):
        _backends.choose(Call("hash_grid", "cuda", 0), "triton")


def test_a_library_that_was_not_built_or_cannot_be_loaded(tmp_path):
    assert "_cuda.so was not built" in _ops._load(tmp_path / "_cuda.so") and "nvcc" in _ops._load(tmp_path / "_cuda.so")
    (tmp_path / "_cuda.so").write_bytes(b"not a library")
    assert "_cuda.so cannot be loaded: " in _ops._load(tmp_path / "_cuda.so")


def test_the_answer_is_a_constant_to_the_compiler(monkeypatch):
    monkeypatch.setattr(_gpu, "_cached", {0: "too old"}.get)

    def function(x):
        return x + (1 if _gpu.reason_against(0) is None else 2)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 2
    monkeypatch.setattr(_gpu, "_cached", {0: None}.get)
    torch._dynamo.reset()
    assert compiled(torch.zeros(1)).item() == 1


def test_mixed_devices_are_a_sentence():
    from torch._subclasses.fake_tensor import FakeTensorMode

    geometry = camkernels.GridGeometry.build(3, 4, 2, 8, finest_resolution=40)
    with FakeTensorMode():
        x, table = torch.rand(5, 3, device="cuda"), torch.rand(geometry.n_entries, 2)
        with pytest.raises(ValueError, match=r"hash_grid: .* one device, got x on cuda:0, table on cpu; move them"):
            camkernels.hash_grid(x, table, geometry)
        with pytest.raises(ValueError, match=r"hash_grid: .* one device, got x on cuda:0, table on cuda:1; move them"):
            camkernels.hash_grid(x, table.to("cuda:1"), geometry)
