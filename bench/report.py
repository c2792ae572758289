# SPDX-License-Identifier: MIT
"""Shows results: `python -m bench.report FILE... [--base FILE] [--plot PNG] [--gate]` prints a markdown table.

FILE: what `bench.run` wrote (.jsonl), or `make gpu` (bench/results/<gpu>.json).

A row is a provider at a pass of a case. Where both allocator regimes were measured, the row is the one with the smaller
speed-up over eager PyTorch. "floor" is the largest of three times: the lookups at this machine's rate of random
lookups, the bytes at its rate of copying, the arithmetic at its rate of multiply-adds, or, of matrix products
on a GPU and of those of bfloat16 on a CPU that has them, at their rate in the dtype; "of ceiling" is floor / median.
"B/point" is peak extra memory of the process with malloc as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from . import timing

Key = tuple[str, ...]
IDENTITY = ("case", "pass", "provider", "variant", "threads", "device")
HEADER = ("provider", "ns/point", "least", "quartiles", "x eager", "x compile", "floor ns", "of ceiling")
HEADER += ("B/point", "regime")
COLOURS = {
    "cpu": "#0b6e4f",
    "cpu_bfloat16": "#3f9e7d",
    "cuda": "#0b6e4f",
    "triton": "#57a773",
    "reference": "#9aa0a6",
    "eager": "#c1440e",
    "eager_fair": "#e08e45",
    "eager_sum": "#8f3b1b",
    "compile": "#2f5d8a",
    "compile_reference": "#86a8c9",
    "tinycudann": "#7b4b94",
    "drjit": "#b284be",
}


def load(files: Iterable[Path]) -> list[dict]:
    """Records of result files; of the same measurement the last. ValueError for a file that is none."""
    records = {}
    for file in map(Path, files):
        for number, line in enumerate(_lines(file), 1):
            try:
                record = json.loads(line) if isinstance(line, str) else line
                records[identity(record) + (record["regime"], record["kind"])] = record
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file}, line {number}, is not a record of bench.run") from None
    return list(records.values())


def _lines(file: Path) -> list[str] | list[dict]:
    """The records of bench.run, a line each, or of `make gpu`, which keeps them in one file (.json) with the rest."""
    text = file.read_text()
    if file.suffix != ".json":
        return text.splitlines()
    try:
        return json.loads(text)["records"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not a result of `make gpu` with benchmarks") from None


def identity(record: dict) -> Key:
    """What is measured, apart from the allocator regime."""
    return tuple(str(record[name]) for name in IDENTITY)


def headline(records: list[dict]) -> list[dict]:
    """One timed record per measurement: of several allocator regimes the one with the smaller speed-up over eager.

    A baseline, which has no speed-up over itself, is shown in the regime in which it is faster.
    """
    chosen: dict[Key, dict] = {}
    for record in records:
        if record["kind"] != "time" or record["status"] != "ok":
            continue
        key = identity(record)
        if key not in chosen or _rank(record) < _rank(chosen[key]):
            chosen[key] = record
    return list(chosen.values())


def _rank(record: dict) -> tuple[float, float]:
    ratio = _over(record, "eager")
    return (ratio if ratio is not None else 0.0, record["ns_per_point"]["median"])


def _over(record: dict, baseline: str) -> float | None:
    found = record["speedup"].get(baseline)
    return found["median"] if found else None


def _number(value: float | None, pattern: str = "{:.3g}") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else pattern.format(value)


def _row(record: dict, memory: dict[Key, dict]) -> tuple[str, ...]:
    ns, ratio = record["ns_per_point"], record["speedup"].get("eager")
    spread = f"{_number(ns['q1'])}-{_number(ns['q3'])}"
    over_eager = timing.spread(ratio) if ratio else "1" * (record["provider"] == "eager")
    name = record["provider"]
    if record["compile_s"] is not None:
        name += f" (compiled in {record['compile_s']:.0f} s)"
    held = memory.get((record["case"], record["pass"], record["provider"]))
    floor = max(record["floor_ns"], key=record["floor_ns"].get)
    return (
        name,
        _number(ns["median"]),
        _number(ns["min"]),
        spread,
        over_eager or "-",
        _number(_over(record, "compile"), "{:.1f}"),
        f"{record['floor_ns'][floor]:.0f} {floor}",
        f"{record['of_ceiling']:.0%}",
        _number(held["bytes_per_point"] if held else None),
        record["regime"] + ("*" if record["contended"] > 0.2 else ""),
    )


def _markdown(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def table(records: list[dict]) -> str:
    """Markdown: a section per case and pass, then what was skipped and the machine."""
    held = [r for r in records if (r["kind"], r["status"], r["regime"]) == ("memory", "ok", "default")]
    memory = {(r["case"], r["pass"], r["provider"]): r for r in held}
    groups: dict[Key, list[dict]] = {}
    for record in headline(records):
        group = (record["case"], record["pass"], record["variant"], str(record["threads"]))
        groups.setdefault(group, []).append(record)
    text = []
    for (case, task, variant, threads), members in groups.items():
        rounds = max(record["rounds"] for record in members)
        text += ["", f"**{case}, {task}**, {variant} points, {threads} thread(s), {rounds} rounds", ""]
        text += _markdown([HEADER, *(_row(record, memory) for record in members)])
    return "\n".join(text + _skipped(records) + _machine(records))


def _skipped(records: list[dict]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if record["status"] != "ok":
            where = f"{record['case']} {record['pass']}"
            places = reasons.setdefault((record["provider"], record["reason"]), [])
            if where not in places:
                places.append(where)
    lines = []
    for (name, reason), places in reasons.items():
        where = f"{places[0]}" + (f" and {len(places) - 1} more" if len(places) > 1 else "")
        lines.append(f"- {name} not measured ({where}): {reason}")
    return ["", *lines] if lines else []


def _machine(records: list[dict]) -> list[str]:
    timed = [record for record in records if record["kind"] == "time" and record["status"] == "ok"]
    if not timed:
        return []
    last = timed[-1]
    facts, limits = last["machine"], last["ceilings"]
    rates = ", ".join(f"{rate / 1e6:.0f} M/s in {int(size) / 2**20:g} MB" for size, rate in limits["lookups"].items())
    caches = " ".join(f"{name} {size}" for name, size in facts["caches"].items())
    gpu = f"{facts['gpu']}, " if facts.get("gpu") else ""
    products = "".join(f", {kind} products {r / 1e3:.3g} TF/s" for kind, r in limits.get("product_gflops", {}).items())
    lines = [
        "",
        f"{gpu}{facts['cpu']}, {facts['isa']} (kernels: {facts['camkernels_isa']}), {facts['cores']} cores, {caches}; "
        f"torch {facts['torch']}, commit {facts['commit']}, load {facts['load']}. Ceilings of {limits['threads']} "
        f"thread(s): {limits['fma_gflops']:.0f} GF/s, copy {limits['copy_gbs']:.1f} GB/s, lookups {rates}{products}.",
    ]
    if limits["note"]:
        lines.append(f"Note: {limits['note']}.")
    if any(record["contended"] > 0.2 for record in timed):
        lines.append("* the machine was shared with other work in more than a fifth of the rounds.")
    return lines


def changes(base: list[dict], records: list[dict]) -> str:
    """Markdown: speed-up over eager and time, before and after, per measurement and regime that both files hold."""

    def by_key(found: list[dict]) -> dict[Key, dict]:
        timed = [record for record in found if record["kind"] == "time" and record["status"] == "ok"]
        return {identity(record) + (record["regime"],): record for record in timed}

    before, after = by_key(base), by_key(records)
    rows = [("case", "pass", "provider", "regime", "x eager before", "now", "ns before", "now", "time")]
    for key in after.keys() & before.keys():
        a, b = before[key], after[key]
        old, new = a["ns_per_point"]["median"], b["ns_per_point"]["median"]
        ratios = [_number(_over(record, "eager"), "{:.1f}") for record in (a, b)]
        rows.append((key[0], key[1], key[2], key[-1], *ratios, _number(old), _number(new), f"{new / old - 1:+.0%}"))
    if len(rows) == 1:
        return "\nThe base holds none of these measurements."
    machines = {(r["machine"]["cpu"], r["machine"]["isa"]) for r in [*before.values(), *after.values()]}
    note = ["", "The files are from different machines: compare ratios only."] if len(machines) > 1 else []
    return "\n".join(["", *_markdown([rows[0], *sorted(rows[1:])]), *note])


def plot(records: list[dict], target: Path) -> None:
    """Bars of ns per point, least first within a group; the floor of each group is a line. Writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    groups: dict[str, list[dict]] = {}
    for record in headline(records):
        groups.setdefault(f"{record['case']}, {record['pass']}, {record['variant']}", []).append(record)
    if not groups:
        raise ValueError("there is no timed record to draw")
    count = sum(map(len, groups.values())) + len(groups)
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.26 * count), constrained_layout=True)
    place, places, labels = 0.0, [], []
    for title, members in groups.items():
        members = sorted(members, key=lambda record: record["ns_per_point"]["median"])
        axes.text(0, place, title, transform=axes.get_yaxis_transform(), fontsize=8, weight="bold", va="center")
        for record in members:
            place += 1
            ns = record["ns_per_point"]
            axes.barh(place, ns["median"], height=0.72, color=COLOURS.get(record["provider"], "#666666"))
            axes.plot([ns["q1"], ns["q3"]], [place, place], color="black", linewidth=1)
            ratio = _over(record, "eager")
            label = f" {_number(ns['median'])} ns" + (f", {ratio:.1f}x eager" if ratio else "")
            axes.text(max(ns["median"], ns["q3"]), place, label, fontsize=7, va="center")
            places.append(place)
            labels.append(record["provider"])
        floor = max(members[0]["floor_ns"].values())
        ends = (place - len(members) + 0.5, place + 0.5)
        axes.plot([floor, floor], ends, color="black", linestyle=":", linewidth=1)
        place += 1.4
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(place, -1)
    axes.set_xlabel("ns per point (logarithmic; dotted: floor on this machine; black: quartiles)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--base", type=Path, metavar="FILE", help="compare with this result")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the times into this file")
    parser.add_argument("--gate", action="store_true", help="the verdicts of the gate")
    options = parser.parse_args(arguments)
    try:
        records = load(options.files)
        base = load([options.base]) if options.base else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(table(records))
    if options.gate:
        from . import gate

        print("\n" + "\n".join(gate.lines(records)))
    if base is not None:
        print(changes(base, records))
    if options.plot is not None:
        plot(records, options.plot)
        print(f"\nplot: {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
