# SPDX-License-Identifier: MIT
"""The benchmark of the nearest centres: what it prints, and that other answers are not timed."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "nearest.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
pytest.importorskip("scipy")
sys.path.insert(0, str(ROOT))

from bench import nearest  # noqa: E402


@pytest.mark.parametrize("gate, status, verdict", [(0.0, 0, "PASS"), (1e9, 1, "short of it")])
def test_a_line_for_each_search_and_the_verdict(gate, status, verdict, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(nearest, "GATE", gate)
    monkeypatch.setattr(nearest, "SEARCHES", (nearest.Search(2, 1, 30), nearest.Search(3, 4, 50)))
    quick, out = ["--rounds", "3", "--seconds", "0", "--threads", "1"], tmp_path / "records.jsonl"
    assert nearest.main(["--points", "40", "90", *quick, "--out", str(out)]) == status
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "cpu, 1 thread(s)"
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    assert [row[:2] for row in rows] == [
        ["2-D K1 of 30", "40"], ["2-D K1 of 30", "90"], ["3-D K4 of 50", "40"], ["3-D K4 of 50", "90"]
    ]  # fmt: skip
    assert {row[-1] for row in rows} == {verdict}
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [nearest.row(record).strip("| ").split(" | ") for record in kept] == [row[:-1] for row in rows]
    assert all(record["machine"]["torch"] for record in kept)


def test_other_answers_are_not_timed(monkeypatch):
    class Wrong(nearest.NeighborIndex):
        def search(self, x, k):
            rows, squares = super().search(x, k)
            return rows, 1.01 * squares

    monkeypatch.setattr(nearest, "NeighborIndex", Wrong)
    with pytest.raises(ValueError, match="find other distances"):
        nearest.measure(nearest.Search(2, 3, 30), 40, 1, 3, 0.0)
