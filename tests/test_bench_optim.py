# SPDX-License-Identifier: MIT
"""The benchmark of the optimizer step."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "optim_step.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import optim_step  # noqa: E402


def test_both_optimizers_are_told_for_every_share(capsys, tmp_path):
    out = tmp_path / "records.jsonl"
    assert optim_step.main(["--rows", "256", "--rounds", "3", "--seconds", "0", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [optim_step.row(json.loads(line)) for line in out.read_text().splitlines()] == lines
    rows = [line.split(" | ") for line in lines]
    names = [*optim_step.BASELINES, "SparseRowAdam", "SparseRowAdam, sparse"]
    assert [row[1] for row in rows] == names * len(optim_step.SHARES)
    assert all(float(row[2]) > 0 for row in rows) and rows[0][3] == "1.00" and rows[1][4] == "1.00 |"


def test_a_batch_touches_its_share():
    for task in optim_step.tasks(1000, 0.01)[len(optim_step.BASELINES) :]:
        task.run()
        (state,) = task.run.__self__.state.values()
        assert int(state["step"].sum()) == 10
