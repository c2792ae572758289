# SPDX-License-Identifier: MIT
"""Faults put into the CUDA kernels are found by what the other tests look at.

A copy of the kernels holds all faults, each behind a switch, so that it is compiled once. Each runs in a process of its
own, for some overwrite memory. No GPU takes part.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from camkernels import testing
from kernel_faults import FAULTS
from sim import build, library, toolkit
from simulated import Simulated, basis, lookup_call, network, regular_call
from test_cuda_simulated_optim import ROWS, check_step, drawn, run
from test_neighbors import CLOUDS, queries
from test_optim import random_state

SECONDS = 1800  # for a build of all kernels and a run for each fault, on a slow machine
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(SECONDS),
    pytest.mark.skipif(toolkit.why_no_simulator() is not None, reason=str(toolkit.why_no_simulator())),
    pytest.mark.skipif(library.why_no_asan() is not None, reason=str(library.why_no_asan())),
]


NAMES = ["none", *FAULTS]  # a fault's place here is its switch


def recipe() -> build.Recipe:
    """The kernels with switches, written below the build folder, so that they are compiled only when they change."""
    texts = {path.name: path.read_text() for path in (build.CSRC / "cuda").iterdir()}
    for name, fault in FAULTS.items():
        assert texts[fault.file].count(fault.text) == 1, f"{name}: not once in {fault.file}"
        switched = fault.replacement.replace("ON", f"(camk_fault == {NAMES.index(name)})")
        texts[fault.file] = texts[fault.file].replace(fault.text, switched)
    switch = 'extern "C" {\ninline __attribute__((visibility("default"), used)) int camk_fault = 0;\n}\n'
    texts["storage.h"] = texts["storage.h"].replace("namespace camk::cuda {", f"{switch}namespace camk::cuda {{", 1)
    folder = build.folder() / "faults" / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    honest = build.production("checked", namespace="camkernels_checked")
    return replace(honest, name="faults", sources=tuple(folder / path.name for path in honest.sources))


def judge(sim: Simulated) -> None:
    """Agreement in all schedules: odd sizes, points outside, partial groups of levels, whole words, two launches."""
    lookups = [lookup_call(133, [5, 6], channels=channels, padding="zeros") for channels in (None, 8)]
    lookups.append(lookup_call(60, [5, 6], combine="plane_product"))
    networks = [network(90, [3, 70, 70, 2], groups=groups, norm="point", skips=[0]) for groups in (90, 3)]
    networks.append(network(300, [3, 8, 2]))  # two splits
    once = [  # one pair of slabs; x in several steps, after other values; a last layer that is normalised
        network(70, [5, 352, 2], norm="point"),
        network(40, [40, 40, 2], skips=[0]),
        network(40, [3, 140], norm="point", output_layer=False),
    ]
    bases = [basis(90, 30, 7, features=5), basis(50, 30, 20, features=9)]  # one block of kernels, several
    centers = [CLOUDS[cloud](2) for cloud in ("uniform", "lattice", "duplicates")]
    near = regular_call(3, 2, torch.float32, 133)
    around = testing.Call({**near.inputs, "x": near.inputs["x"] * 1.5 - 0.25}, near.options)
    tables = [(random_state(ROWS, width, torch.float32), drawn(width, torch.float32, 0.3)) for width in (2, 8)]
    for schedule in library.SCHEDULES:
        with sim.library.schedule(schedule):
            sim.agree(near)
            sim.agree(around)
            for levels in (4, 5):  # threads take two of them, and four of which the last group has one
                sim.agree(regular_call(3, 2, torch.float32, 2101, levels), order=1)
            sim.agree(regular_call(2, 2, torch.float32, 37, levels=40), order=1)
            for cloud in centers:
                for k in (1, 5, 64, 70):
                    sim.check_search(queries(cloud), cloud, k)
            for call in lookups:
                sim.agree(call, op="coordinate_modulation")
            for call in bases:
                sim.agree(call, op="radial_basis")
            for call in once:
                sim.agree(call, order=1, op="modulated_mlp")
            for call in networks:
                sim.agree(call, op="modulated_mlp")
            sim.agree_rounded(network(70, [20, 40]))
            for state, gradient in tables:
                check_step(sim, state, gradient)
                run(sim, [t.clone() for t in state], gradient[:1], torch.tensor([ROWS]))


def trial(folder: str) -> None:
    """`judge` with every fault, in a child each, which says into a file what it found."""
    sim = Simulated(recipe())
    switch = ctypes.c_int.in_dll(sim.library.handle, "camk_fault")
    for number in range(len(NAMES)):
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        said = os.open(Path(folder) / f"{number}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1), os.dup2(said, 2)
        switch.value = number
        try:
            judge(sim)
            print("clean", flush=True)
        except Exception:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("faults")
    build.build(recipe())  # not under AddressSanitizer
    code = "import sys, test_cuda_faults; test_cuda_faults.trial(*sys.argv[1:])"
    done = library.run_under_asan(code, str(folder), timeout=SECONDS, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (folder / f"{number}.txt").read_text() for number, name in enumerate(NAMES)}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(reports: dict[str, str], name: str) -> None:
    assert reports["none"].strip() == "clean", reports["none"][-3000:]
    assert re.search(FAULTS[name].finding, reports[name]), reports[name][-3000:]
