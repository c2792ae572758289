# SPDX-License-Identifier: MIT
"""Benchmarks of the modulated MLP: its cases, what its baseline computes, and its floors."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import camkernels

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "run.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import cases, gpu_steps, memory, modulated_mlp_cases, providers, run, worker  # noqa: E402
from bench.case import Case, arguments  # noqa: E402
from bench.modulated_mlp_cases import NETWORKS  # noqa: E402

TINY = 64
DTYPES = ("float32", "bfloat16", "float16")


def find(network: str, dtype: str = "float32", size: int = 14) -> Case:
    return dataclasses.replace(cases.find(f"modulated_mlp/{network}/{dtype}/n{size}"), points=TINY)


def test_cases_cover_what_is_promised():
    found = {case.name for case in cases.all_cases() if case.op == "modulated_mlp"}
    names = ("wide", "narrow", "instant-ngp", "nerf", "siren", "film", "wide-cam", "narrow-cam")
    assert found == {f"modulated_mlp/{n}/{dtype}/n{s}" for n in names for dtype in DTYPES for s in (10, 14, 17, 20)}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_the_op_s_and_values_stay_of_order_one(network, dtype):
    case = find(network, dtype)
    inputs = case.inputs()
    assert {t.dtype for t in inputs.values()} == {getattr(torch, dtype)}
    assert set(case.passes["fb-all"].wrt) == set(inputs) - {"coords"}
    assert set(case.passes["fb-parameters"].wrt) == set(inputs) - {"x", "coords"}
    renewed = case.new_points(5)
    assert renewed.keys() == inputs.keys() & {"x", "modulation", "coords"}
    assert not torch.equal(renewed["x"], inputs["x"])
    with torch.no_grad():
        y = case.computed_by(camkernels.reference)(**arguments(inputs))
    assert y.shape == (TINY, NETWORKS[network].outputs or NETWORKS[network].width) and 0.02 < y.float().std() < 3


@pytest.mark.parametrize("provider", ["cpu", "eager"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_providers_compute_what_the_reference_computes(network, dtype, provider):
    case, source = find(network, dtype), providers.find(provider)
    inputs = case.inputs()
    for task in case.passes.values():
        if source.missing(case, task, "cpu"):
            pytest.skip(source.missing(case, task, "cpu"))
        assert worker.check_sample(case, task, source, inputs, "cpu") is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_without_a_layer_s_shift_is_found_out(dtype):
    case = find("narrow", dtype)
    task = case.passes["fb-parameters"]

    def forgetful(x, weights, biases, modulation):
        modulation = modulation * torch.tensor([1.0, 0.0], dtype=x.dtype)
        return camkernels.modulated_mlp(x, weights, biases, modulation, **case.options())

    wrong = providers.Provider("wrong", "", lambda *of: providers.TorchTask(forgetful, task), lambda *of: None)
    assert "disagrees in value" in worker.check_sample(case, task, wrong, case.inputs(), "cpu")


def test_the_baseline_has_one_form():
    case = find("narrow")
    forward = case.passes["forward"]
    assert providers.find("eager").missing(case, forward, "cpu") is None
    for form in ("eager_fair", "eager_sum"):
        assert "one form only" in providers.find(form).missing(case, forward, "cpu")


@pytest.mark.parametrize("network", NETWORKS)
def test_flops_are_those_pytorch_counts(network):
    """Eager PyTorch multiplies out a skip's gradient of x also where nobody asks for it; no one else has to."""
    from torch.utils.flop_counter import FlopCounterMode

    case = find(network)
    inputs = case.inputs()
    for name, task in case.passes.items():
        provider = providers.find("eager").make(case, task, "cpu")
        provider.prepare(inputs, worker.make_cotangent(case, task, inputs))
        with FlopCounterMode(display=False) as counter:
            provider.run()
        counted = counter.get_total_flops() / TINY
        needless = 2 * 256 * 63 if (network, name) == ("nerf", "fb-parameters") else 0
        assert case.floor(task).flops == counted - needless


def test_floors_grow_with_the_work_and_shrink_with_the_dtype():
    single, half = (cases.find(f"modulated_mlp/film/{dtype}/n17") for dtype in ("float32", "bfloat16"))
    floors = [single.floor(task) for task in single.passes.values()]
    assert [floor.memory for floor in floors] == sorted({floor.memory for floor in floors})
    assert [floor.flops for floor in floors] == sorted({floor.flops for floor in floors})
    assert floors[2].memory - floors[1].memory == 4 * NETWORKS["film"].inputs
    other = half.floor(half.passes["forward"])
    assert (floors[0].product, other.product) == ("float32", "bfloat16") and other.memory == floors[0].memory / 2
    assert floors[0].flops == other.flops and floors[0].lookups == ()


def test_memory_with_values_computed_again_is_measured_of_the_cpu_backend_alone():
    case, grid = find("narrow"), cases.find("hash_grid/2d/tcnn/uniform/float32/n14")
    assert memory.regimes(case, "cpu") == ["default", "live", "recompute"]
    assert memory.regimes(case, "eager") == memory.regimes(grid, "cpu") == ["default", "live"]
    assert memory.REGIMES["recompute"] == {"CAMKERNELS_RECOMPUTE": "1"}


def test_steps_on_a_gpu_measure_each_network_in_two_dtypes(tmp_path):
    steps = gpu_steps.select("mlp-narrow,mlp-wide,mlp-ngp", tmp_path)
    found = {}
    for step in steps:
        options = run.parse(list(step.command[step.command.index("bench.run") + 1 :]))
        assert options.passes == ("forward", "fb-parameters")
        assert options.providers == ("cuda", "triton", "eager", "compile")
        assert options.seconds * len(options.cases) < step.limit / 2
        found[step.name] = [case.name for case in options.cases]
    assert found == {
        "mlp-narrow": [f"modulated_mlp/narrow/{dtype}/n20" for dtype in ("float32", "bfloat16")],
        "mlp-wide": [f"modulated_mlp/wide/{dtype}/n17" for dtype in ("float32", "bfloat16")],
        "mlp-ngp": [f"modulated_mlp/instant-ngp/{dtype}/n20" for dtype in ("float32", "float16")],
    }


def test_large_runs_are_foreseen(monkeypatch):
    monkeypatch.setattr(worker.machine, "available_bytes", lambda device: 16 << 30)
    eager = providers.find("eager")
    assert worker.too_large(cases.find("modulated_mlp/wide/float32/n17"), eager) is None
    for name in ("wide", "nerf"):
        assert "GB of memory" in worker.too_large(cases.find(f"modulated_mlp/{name}/float32/n20"), eager)
    assert modulated_mlp_cases.plain_pytorch_bytes(NETWORKS["narrow"], torch.float32) > 4000  # measured: 4129
