# SPDX-License-Identifier: MIT
"""What the compiled CPU kernels must reach on one thread at 2^17 points, and whether a run reached it."""

from __future__ import annotations

from typing import NamedTuple

from . import cases
from .case import Case


class Line(NamedTuple):
    """The provider must be `times` as fast as `baseline` in the tuned regime."""

    case: str
    task: str
    baseline: str
    times: float
    provider: str = "cpu"


class MemoryLine(NamedTuple):
    """The provider may need 1/times of the baseline's peak extra memory, in a regime of `bench.memory`."""

    case: str
    task: str
    baseline: str
    times: float
    regime: str = "default"


PROVIDER = "cpu"
REGIME = "tuned"
NOISE = 0.1  # what is missed by less may have been missed by noise, and the verdict says so
GRID_3D, GRID_2D = (f"hash_grid/{dims}d/nerfstudio/uniform/float32/n17" for dims in (3, 2))
WIDE, NARROW, WIDE_CAM, NARROW_CAM = (
    f"modulated_mlp/{network}/float32/n17" for network in ("wide", "narrow", "wide-cam", "narrow-cam")
)
RBF_SMALL, RBF_3D, RBF_WIDE = (
    f"radial_basis/{name}/float32/n17" for name in ("2d-k4-f32-20k", "3d-k8-f32-100k", "2d-k10-f64-100k")
)
SPEED = (
    Line(GRID_3D, "forward", "eager", 50),
    Line(GRID_3D, "fb-table", "eager", 53),
    Line(GRID_2D, "forward", "eager", 36),
    Line(GRID_2D, "fb-table", "eager", 30),
    Line(GRID_3D, "forward", "compile", 12),
    Line(GRID_3D, "fb-table", "compile", 14),
    Line(GRID_2D, "forward", "compile", 7),
    Line(GRID_2D, "fb-table", "compile", 10),
    Line(WIDE, "forward", "eager", 1.5),
    Line(WIDE, "fb-parameters", "eager", 1.45),
    Line(NARROW, "forward", "eager", 3.3),
    Line(NARROW, "fb-parameters", "eager", 2.3),
    Line(WIDE, "forward", "eager", 2.9, "cpu_bfloat16"),
    Line(NARROW, "forward", "eager", 5.1, "cpu_bfloat16"),
    Line(WIDE, "fb-parameters", "compile", 1.6),
    Line(NARROW, "fb-parameters", "compile", 4),
    Line(WIDE_CAM, "forward", "eager", 1.5),
    Line(WIDE_CAM, "fb-parameters", "eager", 1.45),
    Line(NARROW_CAM, "forward", "eager", 3.3),
    Line(NARROW_CAM, "fb-parameters", "eager", 2.3),
    Line(WIDE_CAM, "fb-parameters", "compile", 1.6),
    Line(NARROW_CAM, "fb-parameters", "compile", 4),
    Line(RBF_SMALL, "forward", "eager", 10),
    Line(RBF_SMALL, "fb-features", "eager", 11),
    Line(RBF_SMALL, "fb-all", "eager", 8.7),
    Line(RBF_3D, "forward", "eager", 7),
    Line(RBF_3D, "fb-features", "eager", 10),
    Line(RBF_WIDE, "forward", "eager", 9),
    Line(RBF_WIDE, "fb-features", "eager", 11),
    Line(RBF_SMALL, "forward", "compile", 2.8),
    Line(RBF_SMALL, "fb-features", "compile", 3),
    Line(RBF_3D, "forward", "compile", 8.9),
    Line(RBF_3D, "fb-features", "compile", 3.4),
    Line(RBF_WIDE, "forward", "compile", 11.9),
    Line(RBF_WIDE, "fb-features", "compile", 4.1),
)
MEMORY = (
    MemoryLine(GRID_3D, "fb-table", "eager", 6),
    MemoryLine(GRID_2D, "fb-table", "eager", 6),
    *(MemoryLine(case, "fb-parameters", "eager", 4) for case in (WIDE, NARROW, WIDE_CAM, NARROW_CAM)),
    *(MemoryLine(case, "fb-parameters", "eager", 7, "recompute") for case in (WIDE, NARROW, WIDE_CAM, NARROW_CAM)),
    *(MemoryLine(case, "fb-features", "eager", 6) for case in (RBF_SMALL, RBF_3D, RBF_WIDE)),
)
GOAL_NS = {(GRID_3D, "forward"): 150.0, (GRID_3D, "fb-table"): 350.0}
SHARE = {  # of the rate of multiply-adds, or of the processor's dot products of bfloat16
    (WIDE, "forward", PROVIDER): 0.88,
    (WIDE, "fb-parameters", PROVIDER): 0.77,
    (NARROW, "forward", PROVIDER): 0.73,
    (NARROW, "fb-parameters", PROVIDER): 0.61,
    (WIDE, "forward", "cpu_bfloat16"): 0.84,
    (NARROW, "forward", "cpu_bfloat16"): 0.59,
}
PASSES = tuple(dict.fromkeys(line.task for line in SPEED))
MEMORY_PASSES = tuple(dict.fromkeys(line.task for line in MEMORY))
MEMORY_PROVIDERS = ("cpu", "eager", "compile")
# compiling the reference, whose levels are unrolled, takes minutes, and no line needs it: name it to have it as well
PROVIDERS = "cpu,cpu_bfloat16,reference,eager,eager_fair,compile,tinycudann,drjit"
SECONDS = {GRID_3D: 125.0, GRID_2D: 50.0, WIDE: 120.0, NARROW: 40.0}
SECONDS |= {WIDE_CAM: 120.0, NARROW_CAM: 40.0}
SECONDS |= {RBF_SMALL: 40.0, RBF_3D: 80.0, RBF_WIDE: 120.0}  # per regime: about 15 rounds of the baselines


def select(op: str = "all") -> list[Case]:
    """The cases of the gate, of one op or of all. ValueError for an op without any."""
    found = [case for case in cases.select(tag="gate") if op in ("all", case.op)]
    if not found:
        ops = sorted({case.op for case in cases.select(tag="gate")})
        raise ValueError(f"the gate has no op {op!r}; it has {', '.join(ops)}")
    return found


def find(records: list[dict], case: str, task: str, provider: str, **wanted) -> dict | None:
    """The record on one thread, with these entries."""
    key = {"case": case, "pass": task, "provider": provider, "threads": 1} | wanted
    return next((record for record in records if all(record.get(k) == v for k, v in key.items())), None)


def _timed(records: list[dict], case: str, task: str, regime: str, provider: str = PROVIDER) -> dict | None:
    return find(records, case, task, provider, kind="time", status="ok", regime=regime, variant="warm")


def _title(case: str, task: str) -> str:
    """hash_grid 3d fb-table"""
    return f"{' '.join(case.split('/')[:2])} {task}"


def _mark(reached: float, needed: float) -> str:
    if reached >= needed:
        return "PASS"
    short = f"short of it by {(1 - reached / needed) * 100:.0f} %"
    return short + (", which noise may take" if reached >= (1 - NOISE) * needed else "")


def speed_line(records: list[dict], line: Line) -> str:
    """One sentence: the ratio in both regimes, the need, the verdict, and whether the machine was shared."""
    by = "" if line.provider == PROVIDER else f" of {line.provider}"
    what = f"{_title(line.case, line.task)}{by} vs {line.baseline:8s}"
    parts, tuned = [], None
    for regime in ("tuned", "default"):
        record = _timed(records, line.case, line.task, regime, line.provider)
        ratio = (record or {}).get("speedup", {}).get(line.baseline)
        if ratio is not None:
            parts.append(f"{regime} {ratio['median']:5.1f}x ({ratio['q1']:.1f}-{ratio['q3']:.1f})")
            tuned = (ratio, record) if regime == REGIME else tuned
    if tuned is None:
        return f"{what} needs {line.times:g}x: {'; '.join(parts) or 'not measured'}"
    ratio, record = tuned
    other = record["speedup"].get("eager_sum") if line.baseline == "eager" else None
    if other is not None:
        parts.append(f"tuned over eager_sum {other['median']:.1f}x")
    shared = f"; contended in {record['contended']:.0%} of the rounds" if record["contended"] > 0.2 else ""
    return f"{what} {', '.join(parts)}; needs {line.times:g}x ({REGIME}): {_mark(ratio['median'], line.times)}{shared}"


def memory_line(records: list[dict], line: MemoryLine) -> str:
    """One sentence about the peak extra memory; beside what the process takes, which decides, live memory is told."""
    parts, ratio, beyond = [], None, ""
    compared = {"default": "default", "live": "live"} if line.regime == "default" else {line.regime: "default"}
    for regime, baseline_regime in compared.items():
        ours, theirs = (
            find(records, line.case, line.task, provider, kind="memory", status="ok", regime=held)
            for provider, held in ((PROVIDER, regime), (line.baseline, baseline_regime))
        )
        if ours is not None and theirs is not None:
            a, b = ours["bytes_per_point"], theirs["bytes_per_point"]
            result = ours["result_bytes_per_point"]
            parts.append(f"{regime} {a:.0f} B/point, {line.baseline} {b:.0f}: 1/{b / a:.1f}")
            if regime == line.regime:
                ratio = b / a
                beyond = f", beyond them 1/{(b - result) / (a - result):.0f}" if a > result else ""
    what = f"{_title(line.case, line.task)} memory"
    if ratio is None:
        return f"{what}: not measured"
    verdict = f"needs 1/{line.times:g} ({line.regime}): {_mark(ratio, line.times)}"
    return f"{what} {', '.join(parts)}; {verdict}; floor: the results alone are {result:.0f} B/point{beyond}"


def floor_line(records: list[dict], case: str, task: str, provider: str = PROVIDER) -> str | None:
    """One sentence: time, goal, the floors, and the share of the ceiling with its need."""
    record = _timed(records, case, task, REGIME, provider)
    if record is None:
        return None
    ns, floor, work = record["ns_per_point"], record["floor_ns"], record["floor"]
    goal, share = GOAL_NS.get((case, task)), SHARE.get((case, task, provider))
    by = "" if provider == PROVIDER else f" of {provider}"
    return (
        f"{_title(case, task)}{by} {ns['median']:.0f} ns/point (least {ns['min']:.0f})"
        + (f", goal {goal:.0f}" if goal else "")
        + f"; floors: {work['lookups']:.0f} lookups {floor['lookups']:.0f} ns, {work['memory']:.0f} bytes "
        + f"{floor['memory']:.0f} ns, {work['flops']:.0f} flops {floor['arithmetic']:.0f} ns; "
        + f"{record['of_ceiling']:.0%} of the ceiling"
        + (f"; needs {share:.0%}: {_mark(record['of_ceiling'], share)}" if share else "")
    )


def lines(records: list[dict], chosen: list[Case] | None = None) -> list[str]:
    """The whole verdict, on all cases of the gate or some."""
    names = [case.name for case in (select() if chosen is None else chosen)]
    told = [speed_line(records, line) for line in SPEED if line.case in names]
    told += [memory_line(records, line) for line in MEMORY if line.case in names]
    keys = [(case, task, PROVIDER) for case in names for task in PASSES]
    keys += [key for key in SHARE if key[0] in names and key not in keys]
    floors = [floor_line(records, *key) for key in keys]
    return told + [line for line in floors if line]
