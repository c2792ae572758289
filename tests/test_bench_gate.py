# SPDX-License-Identifier: MIT
"""The gate's verdicts, from records made up here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "gate.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import cases, gate  # noqa: E402


def speed(case: str, task: str, ratio: float, regime: str = "tuned", **change) -> dict:
    """A timed record that is `ratio` times as fast as every baseline."""
    quartiles = {"median": ratio, "q1": ratio, "q3": ratio, "min": ratio, "rounds": 15}
    return {
        "case": case, "pass": task, "provider": gate.PROVIDER, "threads": 1, "kind": "time", "status": "ok",
        "regime": regime, "variant": "warm", "speedup": {"eager": quartiles, "compile": quartiles}, "contended": 0.0,
        "ns_per_point": {"median": 100.0, "min": 90.0}, "floor": {"lookups": 0, "memory": 10.0, "flops": 20.0},
        "floor_ns": {"lookups": 0.0, "memory": 1.0, "arithmetic": 70.0}, "of_ceiling": 0.7,
    } | change  # fmt: skip


def held(line: gate.MemoryLine, ours: float, theirs: float) -> list[dict]:
    """Peak memory of the provider in the line's regime and of the baseline in the default one."""
    common = {"case": line.case, "pass": line.task, "threads": 1, "kind": "memory", "status": "ok"}
    common |= {"result_bytes_per_point": 50.0}
    return [
        common | {"provider": gate.PROVIDER, "bytes_per_point": ours, "regime": line.regime},
        common | {"provider": line.baseline, "bytes_per_point": theirs, "regime": "default"},
    ]


def test_every_line_names_a_case_of_the_gate_and_a_pass_of_it():
    chosen = {case.name: case for case in gate.select()}
    assert set(chosen) == {line.case for line in gate.SPEED} == set(gate.SECONDS)
    keys = [(line.case, line.task) for line in (*gate.SPEED, *gate.MEMORY)] + [key[:2] for key in gate.SHARE]
    assert all(task in chosen[case].passes for case, task in keys)
    assert all(case.facts["dtype"] == "float32" and case.points == 1 << 17 for case in chosen.values())


def test_the_gate_of_one_op():
    networks = [gate.WIDE, gate.NARROW, gate.WIDE_CAM, gate.NARROW_CAM]
    assert [case.name for case in gate.select("modulated_mlp")] == networks
    assert {case.name for case in gate.select("hash_grid")} == {gate.GRID_3D, gate.GRID_2D}
    assert [case.name for case in gate.select("radial_basis")] == [gate.RBF_SMALL, gate.RBF_3D, gate.RBF_WIDE]
    with pytest.raises(ValueError, match="no op 'median'; it has hash_grid, modulated_mlp, radial_basis"):
        gate.select("median")


def test_speed_in_both_regimes_and_what_noise_may_take():
    records = [speed(gate.GRID_2D, task, 32.0) for task in ("forward", "fb-table")]
    records += [speed(gate.GRID_2D, "forward", 31.0, "default")]
    told = gate.lines(records, gate.select("hash_grid"))
    forward, backward = [line for line in told if line.startswith("hash_grid 2d") and " vs eager" in line]
    assert "tuned  32.0x" in forward and "default  31.0x" in forward and forward.endswith("short of it by 11 %")
    assert backward.endswith("PASS") and "needs 30x" in backward
    assert sum("not measured" in line for line in told) == 4 + 2  # 3-D and memory
    near = gate.speed_line([speed(gate.GRID_2D, "forward", 33.0)], gate.SPEED[2])
    assert near.endswith("short of it by 8 %, which noise may take")


def test_a_skipped_measurement_is_not_taken_for_one():
    line = gate.SPEED[0]
    assert gate.speed_line([speed(line.case, line.task, 99.0, status="skipped")], line).endswith("not measured")
    assert gate.speed_line([speed(line.case, line.task, 99.0, threads=2)], line).endswith("not measured")


@pytest.mark.parametrize("line", gate.MEMORY)
def test_memory_is_compared_with_the_baseline_as_it_is_run(line):
    told = gate.memory_line(held(line, 100.0, 100.0 * line.times), line)
    assert f"needs 1/{line.times} ({line.regime}): PASS; floor: the results alone are 50 B/point" in told
    assert told.endswith(f", beyond them 1/{2 * line.times - 1:.0f}")
    assert f"{line.regime} 100 B/point, eager {100 * line.times}: 1/{line.times:.1f}" in told
    live = [record | {"regime": "live", "bytes_per_point": 1.0} for record in held(line, 1.0, 1.0)]
    told = gate.memory_line(held(line, 100.0, 100.0 * line.times) + live, line)
    assert ("live 1 B/point, eager 1" in told) == (line.regime == "default")
    assert "short of it by 50 %" in gate.memory_line(held(line, 200.0, 100.0 * line.times), line)


def test_the_share_of_the_ceiling_is_judged_where_there_is_a_need():
    told = gate.floor_line([speed(gate.NARROW, "forward", 4.0)], gate.NARROW, "forward")
    assert told.endswith("70% of the ceiling; needs 73%: short of it by 4 %, which noise may take")
    assert gate.floor_line([speed(gate.NARROW, "fb-parameters", 4.0)], gate.NARROW, "fb-parameters").endswith("PASS")
    assert gate.floor_line([speed(gate.GRID_3D, "forward", 60.0)], gate.GRID_3D, "forward").endswith("of the ceiling")
    assert gate.floor_line([], gate.NARROW, "forward") is None
    rounded = [speed(gate.NARROW, "forward", 4.0, provider="cpu_bfloat16")]
    (told,) = [line for line in gate.lines(rounded, gate.select("modulated_mlp")) if "ceiling" in line]
    assert "forward of cpu_bfloat16" in told and told.endswith("70% of the ceiling; needs 59%: PASS")


def test_only_gate_cases_carry_its_tag():
    assert cases.select(tag="gate") == gate.select()
