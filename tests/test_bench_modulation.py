# SPDX-License-Identifier: MIT
"""Benchmarks of the ops around the modulated MLP: what providers compute, and their floors."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

import camkernels

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "run.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import cases, providers, worker  # noqa: E402

OPS = ("coordinate_modulation", "modulate", "hash_grid_mlp")


@pytest.mark.parametrize("provider", ["cpu", "eager"])
@pytest.mark.parametrize("op", OPS)
def test_providers_compute_what_the_reference_computes(op, provider):
    case, source = dataclasses.replace(cases.find(f"{op}/float32/n14"), points=512), providers.find(provider)
    for task in case.passes.values():
        if source.missing(case, task, "cpu"):
            pytest.skip(source.missing(case, task, "cpu"))
        assert worker.check_sample(case, task, source, case.inputs(), "cpu") is None


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_result_is_found_out(op):
    case = dataclasses.replace(cases.find(f"{op}/float32/n14"), points=512)
    task = case.passes["fb-parameters"]

    def wrong(**inputs):
        return 1.01 * getattr(camkernels, op)(**inputs, **case.options())

    source = providers.Provider("wrong", "", lambda *of: providers.TorchTask(wrong, task), lambda *of: None)
    assert "disagrees in value" in worker.check_sample(case, task, source, case.inputs(), "cpu")


@pytest.mark.parametrize("op", OPS)
def test_cases_come_in_every_size_and_their_floors_grow_with_the_work(op):
    sizes = [case for case in cases.all_cases() if case.op == op]
    assert [case.points for case in sizes] == [1 << 14, 1 << 17, 1 << 20]
    for case in sizes:
        forward, backward = (case.floor(task) for task in case.passes.values())
        assert 0 < forward.memory < backward.memory and 0 < forward.flops < backward.flops
