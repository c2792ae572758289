# SPDX-License-Identifier: MIT
"""What the compiled hash grid must reach on one thread at 2^17 random points, and whether a run reached it."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """`provider` must be `times` as fast as `baseline` in the tuned regime; for memory: need 1/times of it."""

    dims: int
    task: str
    baseline: str
    times: float


PROVIDER = "cpu"
REGIME = "tuned"
SPEED = (
    Line(3, "forward", "eager", 50),
    Line(3, "fb-table", "eager", 53),
    Line(2, "forward", "eager", 36),
    Line(2, "fb-table", "eager", 30),
    Line(3, "forward", "compile", 12),
    Line(3, "fb-table", "compile", 14),
    Line(2, "forward", "compile", 7),
    Line(2, "fb-table", "compile", 10),
)
MEMORY = (Line(3, "fb-table", "eager", 6), Line(2, "fb-table", "eager", 6))
GOAL_NS = {(3, "forward"): 150.0, (3, "fb-table"): 350.0}
PASSES = ("forward", "fb-table")
MEMORY_PASSES = ("fb-table",)
MEMORY_PROVIDERS = ("cpu", "eager", "compile")
# compiling the reference, whose levels are unrolled, takes minutes, and no line needs it: name it to have it as well
PROVIDERS = "cpu,reference,eager,eager_fair,compile,tinycudann,drjit"
SECONDS = {3: 125.0, 2: 50.0}  # per case and regime: about 15 rounds of the baselines


def _find(records: list[dict], dims: int, task: str, provider: str, **wanted) -> dict | None:
    for record in records:
        facts = record.get("facts", {})
        mine = (facts.get("dims"), record["pass"], record["provider"]) == (dims, task, provider)
        gate = (facts.get("convention"), facts.get("order"), record["points"]) == ("nerfstudio", "uniform", 1 << 17)
        one = facts.get("dtype") == "float32" and record["threads"] == 1
        if mine and gate and one and all(record.get(k) == v for k, v in wanted.items()):
            return record
    return None


def _mark(reached: float, needed: float) -> str:
    return "PASS" if reached >= needed else f"short of it by {(1 - reached / needed) * 100:.0f} %"


def speed_line(records: list[dict], line: Line) -> str:
    """One sentence: the ratio in both regimes, the need, the verdict, the floor and whether the machine was shared."""
    what = f"{line.dims}-D {line.task:9s} vs {line.baseline:8s}"
    parts, tuned = [], None
    for regime in ("tuned", "default"):
        record = _find(records, line.dims, line.task, PROVIDER, kind="time", regime=regime, variant="warm")
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


def memory_line(records: list[dict], line: Line) -> str:
    """One sentence about the peak extra memory: what the process takes decides, live memory is told beside it."""
    parts, ratio = [], None
    for regime in ("default", "live"):
        ours, theirs = (
            _find(records, line.dims, line.task, name, kind="memory", status="ok", regime=regime)
            for name in (PROVIDER, line.baseline)
        )
        if ours is not None and theirs is not None:
            a, b = ours["bytes_per_point"], theirs["bytes_per_point"]
            result = ours["result_bytes_per_point"]
            parts.append(f"{regime} {a:.0f} B/point, {line.baseline} {b:.0f}: 1/{b / a:.1f}")
            ratio = b / a if regime == "default" else ratio
    what = f"{line.dims}-D {line.task:9s} memory"
    if ratio is None:
        return f"{what}: not measured"
    verdict = f"needs 1/{line.times:g} (default): {_mark(ratio, line.times)}"
    return f"{what} {', '.join(parts)}; {verdict}; floor: the results alone are {result:.0f} B/point"


def floor_line(records: list[dict], dims: int, task: str) -> str | None:
    """One sentence: time, goal and the floors."""
    record = _find(records, dims, task, PROVIDER, kind="time", regime=REGIME, variant="warm", status="ok")
    if record is None:
        return None
    ns, floor, work = record["ns_per_point"], record["floor_ns"], record["floor"]
    goal = GOAL_NS.get((dims, task))
    return (
        f"{dims}-D {task:9s} {ns['median']:.0f} ns/point (least {ns['min']:.0f})"
        + (f", goal {goal:.0f}" if goal else "")
        + f"; floors: {work['lookups']:.0f} lookups {floor['lookups']:.0f} ns, {work['memory']:.0f} bytes "
        + f"{floor['memory']:.0f} ns, {work['flops']:.0f} flops {floor['arithmetic']:.0f} ns; "
        + f"{record['of_ceiling']:.0%} of the ceiling"
    )


def lines(records: list[dict]) -> list[str]:
    """The whole verdict."""
    told = [speed_line(records, line) for line in SPEED] + [memory_line(records, line) for line in MEMORY]
    floors = [floor_line(records, dims, task) for dims in (3, 2) for task in PASSES]
    return told + [line for line in floors if line]
