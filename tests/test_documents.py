# SPDX-License-Identifier: MIT
"""What the documents show runs: the examples of every docstring, the README's example, commands and make targets."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import camkernels
from camkernels.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TEXTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")}


def modules():
    """Every module with examples."""
    package = Path(camkernels.__file__).parent
    files = [path for path in sorted(package.rglob("*.py")) if ">>> " in path.read_text()]
    return [".".join(["camkernels", *path.relative_to(package).with_suffix("").parts]) for path in files]


@pytest.mark.parametrize("name", modules())
def test_examples_of_docstrings(name):
    torch.manual_seed(0)
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_public_names_have_an_example():
    without = [
        name
        for name in camkernels.__all__
        if callable(getattr(camkernels, name)) and ">>>" not in (getattr(camkernels, name).__doc__ or "")
    ]
    assert not without


def test_example_of_the_readme():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.strip().splitlines()) <= 15
    found: dict = {}
    exec(example.replace("range(100)", "range(2)").replace("log2_hashmap_size=19", "log2_hashmap_size=10"), found)
    assert found["loss"].isfinite() and found["grid"].table.grad.any()


@pytest.mark.parametrize("name", TEXTS)
def test_commands_exist(name, capsys):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", TEXTS[name], re.MULTILINE)) <= set(targets)
    for command in sorted(set(re.findall(r"python -m camkernels ([a-z]+)", TEXTS[name]))):
        with pytest.raises(SystemExit) as leave:
            main([command, "--help"])
        assert leave.value.code == 0
    for module in re.findall(r"python -m (bench\.[a-z_]+)", TEXTS[name]):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    shown = capsys.readouterr().out
    if name == "README.md":
        assert {"fit", "render", "info", "check"} <= set(re.findall(r"usage: python -m camkernels ([a-z]+)", shown))


@pytest.mark.parametrize("name", TEXTS)
def test_files_named_in_links_and_code_exist(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXTS[name]):
        assert (folder / target).exists()
    for path in re.findall(r"`((?:csrc|tests|bench|python)/[a-zA-Z0-9_/.-]+)`", TEXTS[name]):
        assert (ROOT / path).exists() or "<" in path


def test_the_readme_quotes_its_result_file():
    sys.path.insert(0, str(ROOT))
    from bench import gate, report

    name = "bench/results/cpu-zen5-avx512.jsonl"
    assert f"`{name}`" in README
    records = report.load([ROOT / name])
    for case, task, title in (
        (gate.GRID_3D, "forward", "3-D forward"),
        (gate.GRID_3D, "fb-table", "3-D forward and table gradient"),
        (gate.GRID_2D, "forward", "2-D forward"),
        (gate.GRID_2D, "fb-table", "2-D forward and table gradient"),
    ):
        wanted = {"kind": "time", "regime": gate.REGIME, "variant": "warm"}
        found = gate.find(records, case, task, gate.PROVIDER, **wanted)
        eager, compiled = (found["speedup"][name] for name in ("eager", "compile"))
        ratios = f"{eager['median']:.0f} ({eager['q1']:.0f}-{eager['q3']:.0f}) | {compiled['median']:.2g}"
        row = f"| {title} | {ratios} | {found['ns_per_point']['median']:.0f} | {found['of_ceiling'] * 100:.0f} % | "
        assert row in README
        if task == "fb-table":
            for regime in ("default", "live"):
                ours, theirs = (
                    gate.find(records, case, task, provider, kind="memory", regime=regime)
                    for provider in (gate.PROVIDER, "eager")
                )
                held, results = [r["bytes_per_point"] for r in (ours, theirs)], ours["result_bytes_per_point"]
                assert regime == "live" or f"{row}{held[0]:.0f} ({held[1]:.0f}) |" in README
                assert re.search(rf"\b1/{held[1] / held[0]:.1f}\b", README)
                assert re.search(rf"\b1/{(held[1] - results) / (held[0] - results):.0f}\b", README)


@pytest.mark.parametrize("machine", ["zen5-avx512", "xeon-amx"])
def test_the_readme_quotes_the_results_of_the_modulated_mlp(machine):
    sys.path.insert(0, str(ROOT))
    from bench import gate, report

    name = f"bench/results/cpu-{machine}-modulated-mlp.jsonl"
    assert f"`{name}`" in README
    records = report.load([ROOT / name])
    wanted = {"kind": "time", "regime": gate.REGIME, "variant": "warm"}
    tasks = {"forward": "forward", "fb-parameters": "forward and gradients of the parameters"}
    networks = {
        gate.WIDE: "512 inputs, 3 layers of 256",
        gate.NARROW: "32 inputs, 4 layers of 64",
        gate.WIDE_CAM: "CAM, 512 inputs, 3 layers of 256",
        gate.NARROW_CAM: "CAM, 32 inputs, 4 layers of 64",
    }
    for case, title in networks.items():
        for task, what in tasks.items():
            exact, rounded = (gate.find(records, case, task, p, **wanted) for p in ("cpu", "cpu_bfloat16"))
            eager, compiled = (exact["speedup"][name] for name in ("eager", "compile"))
            cells = [
                f"{title}, {what}",
                f"{eager['median']:.1f} ({eager['q1']:.1f}-{eager['q3']:.1f})",
                f"{compiled['median']:.1f}",
                f"{exact['ns_per_point']['median']:.0f}",
                f"{exact['of_ceiling'] * 100:.0f} %",
                f"{rounded['speedup']['eager']['median']:.1f}, {rounded['ns_per_point']['median']:.0f}, "
                f"{rounded['of_ceiling'] * 100:.0f} %",
            ]
            assert f"| {' | '.join(cells)} |" in README
        held = {
            (provider, regime): gate.find(records, case, "fb-parameters", provider, kind="memory", regime=regime)
            for provider, regime in (("eager", "default"), ("cpu", "default"), ("cpu", "recompute"))
        }
        eager, *ours = (record["bytes_per_point"] for record in held.values())
        assert f"1/{eager / ours[0]:.1f} of eager's" in README and f"1/{eager / ours[1]:.0f}" in README


@pytest.mark.parametrize("machine", ["zen5-avx512", "xeon-amx"])
def test_the_readme_quotes_the_results_of_the_radial_basis(machine):
    sys.path.insert(0, str(ROOT))
    from bench import gate, report

    name = f"bench/results/cpu-{machine}-radial-basis.jsonl"
    assert f"`{name}`" in README
    records = report.load([ROOT / name])
    titles = ("2-D, 4 of 20,000, 32 features", "3-D, 8 of 100,000, 32 features", "2-D, 10 of 100,000, 64 features")
    for case, title in zip((gate.RBF_SMALL, gate.RBF_3D, gate.RBF_WIDE), titles, strict=True):
        cells = [title]
        for task in ("forward", "fb-features", "fb-all"):
            found = gate.find(records, case, task, gate.PROVIDER, kind="time", regime=gate.REGIME, variant="warm")
            ratios = [found["speedup"][other]["median"] for other in ("eager", "compile")]
            cells.append(", ".join(f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}" for ratio in ratios))
        held = [
            gate.find(records, case, "fb-features", provider, kind="memory", regime="default")["bytes_per_point"]
            for provider in (gate.PROVIDER, "eager")
        ]
        assert f"| {' | '.join(cells)} | 1/{held[1] / held[0]:.0f} |" in README


@pytest.mark.parametrize("machine", ["zen5-avx512", "xeon-amx"])
def test_the_readme_quotes_the_results_of_training_steps(machine):
    sys.path.insert(0, str(ROOT))
    from bench import step, timing

    name = f"bench/results/cpu-{machine}-steps.jsonl"
    assert f"`{name}`" in README
    lines = (ROOT / name).read_text().splitlines()
    records = {(record["model"], record["regime"]): record for record in map(json.loads, lines)}
    for model in step.MODELS:
        tuned, default = (records[model, regime] for regime in ("tuned", "default"))
        spreads = [
            timing.spread(tuned["speedup"][side]) if side in tuned["speedup"] else "" for side in step.GRID_FORMS
        ]
        usual = ", ".join(f"{ratio['median']:.1f}" for ratio in default["speedup"].values())
        cells = [f"`{model}`", f"{tuned['ms'][step.OURS]['median']:.1f}", *spreads, usual]
        assert f"| {' | '.join(cells)} |" in README


def lines_of(name: str) -> list[dict]:
    """The records of a result file that bench/README.md names."""
    assert f"`results/{name}`" in TEXTS["bench/README.md"]
    return [json.loads(line) for line in (ROOT / "bench" / "results" / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("cpu-zen5-avx512-nearest.jsonl", "nearest"),
        ("cpu-zen5-avx512-optim-step.jsonl", "optim_step"),
        ("shape-spot.jsonl", "shape_quality"),
    ],
)
def test_the_benchmarks_documentation_quotes_result_files(name, module):
    sys.path.insert(0, str(ROOT))
    pytest.importorskip("scipy")
    row = importlib.import_module(f"bench.{module}").row
    rows = [row(record) for record in lines_of(name)]
    assert rows and all(line in TEXTS["bench/README.md"] for line in rows)


def test_the_benchmarks_documentation_quotes_the_effect_of_modulation():
    sys.path.insert(0, str(ROOT))
    from bench import cam_effect

    (found,) = lines_of("cam-photo-256.json")
    for record in found["rows"]:
        assert cam_effect.row(record) in TEXTS["bench/README.md"]


def test_the_benchmarks_documentation_quotes_small_batches():
    found = [r for r in lines_of("cpu-xeon-amx-small.jsonl") if (r["provider"], r["kind"]) == ("cpu", "time")]
    assert len(found) == 4
    for record in found:
        network, ratio = record["facts"]["network"], record["speedup"]["eager"]["median"]
        row = f"| `{network}` {record['pass']} | {ratio:.1f} | {record['ns_per_point']['median']:.0f} |"
        assert row in TEXTS["bench/README.md"]


def test_the_benchmarks_documentation_quotes_the_ops_around_the_mlp():
    found = [r for r in lines_of("cpu-xeon-amx-modulation.jsonl") if (r["provider"], r["kind"]) == ("cpu", "time")]
    assert {record["op"] for record in found} == {"coordinate_modulation", "modulate", "hash_grid_mlp"}
    for record in found:
        ratios = " | ".join(f"{record['speedup'][name]['median']:.1f}" for name in ("eager", "compile"))
        share = f"{record['of_ceiling'] * 100:.0f}"
        row = f"| `{record['op']}` {record['pass']} | {ratios} | {record['ns_per_point']['median']:.0f} | {share} |"
        assert row in TEXTS["bench/README.md"]
