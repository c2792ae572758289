# SPDX-License-Identifier: MIT
"""The benchmark harness: registry, agreement checks, statistics, records and reports, on tiny inputs. Nothing is timed
here that a test could fail on."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import camkernels

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "run.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402  # noqa: E402
    cam_effect,
    cases,
    ceilings,
    gate,
    hash_grid_cases,
    machine,
    memory,
    providers,
    report,
    run,
    timing,
    worker,
)
from bench.case import Case, Floor  # noqa: E402

from camkernels import _bench  # noqa: E402
from pictures import save  # noqa: E402

TINY = 64
LIMITS = {"fma_gflops": 100.0, "copy_gbs": 10.0, "lookups": {"65536": 2e9, "4194304": 1e9}, "threads": 1, "note": None}


@pytest.fixture
def small_grid(monkeypatch) -> None:
    """The registry's hash grid with 2^8 rows per level, so that nothing large is allocated."""

    def small(dims: int, convention: str) -> camkernels.GridGeometry:
        return camkernels.GridGeometry.build(dims, 4, 2, 8, 4, finest_resolution=32, convention=convention)

    monkeypatch.setattr(hash_grid_cases, "grid_geometry", small)


def tiny(name: str) -> Case:
    return dataclasses.replace(cases.find(name), points=TINY)


# ---- registry --------------------------------------------------------------------------------------------------------


def test_case_names_are_unique_and_cover_what_is_promised():
    every = cases.all_cases()
    assert len({case.name for case in every}) == len(every)
    grid = [case for case in every if case.op == "hash_grid"]
    for key, wanted in {
        "dims": {2, 3},
        "convention": {"nerfstudio", "tcnn"},
        "order": {"uniform", "coherent"},
        "dtype": {"float32", "bfloat16"},
    }.items():
        assert {case.facts[key] for case in grid} == wanted
    assert {case.points for case in grid} == {1 << 14, 1 << 17, 1 << 20}
    assert all(case.op in cases.OPS and hasattr(camkernels, case.op) for case in every)


def test_select_by_pattern_and_a_pattern_without_cases():
    assert all("/coherent/" in case.name for case in cases.select("*/coherent/*"))
    two = cases.select("hash_grid/2d/tcnn/coherent/float32/n14, modulated_mlp/siren/float16/n20")
    assert [case.op for case in two] == ["hash_grid", "modulated_mlp"]
    with pytest.raises(ValueError, match="no case matches"):
        cases.select("nothing*")


@pytest.mark.parametrize(
    "draw, dims",
    [(hash_grid_cases.uniform_points, 3), (hash_grid_cases.morton_points, 3), (hash_grid_cases.raster_points, 2)],
)
def test_points_lie_in_the_unit_cube_and_follow_the_seed(draw, dims):
    x = draw(512, dims, 3)
    assert x.shape == (512, dims) and x.min() >= 0 and x.max() <= 1
    assert torch.equal(x, draw(512, dims, 3)) and not torch.equal(x, draw(512, dims, 4))


@pytest.mark.parametrize("draw, dims", [(hash_grid_cases.morton_points, 3), (hash_grid_cases.raster_points, 2)])
def test_coherent_points_are_near_their_neighbours(draw, dims):
    def step(x):
        return (x[1:] - x[:-1]).norm(dim=-1).median()

    assert step(draw(4096, dims, 0)) < 0.3 * step(hash_grid_cases.uniform_points(4096, dims, 0))


@pytest.mark.parametrize(
    "name", ["hash_grid/3d/tcnn/uniform/float32/n17", "hash_grid/2d/nerfstudio/uniform/bfloat16/n17"]
)
def test_floors_grow_with_the_work(name):
    case = cases.find(name)
    floors = {task: case.floor(case.passes[task]) for task in case.passes}
    lookups = {task: sum(count for _, count in floor.lookups) for task, floor in floors.items()}
    corners = hash_grid_cases.LEVELS * 2 ** case.facts["dims"]
    assert lookups["forward"] == lookups["jacobian"] == corners
    assert lookups["fb-table"] == lookups["fb-x"] == 2 * corners and lookups["fb-both"] == 3 * corners
    assert floors["forward"].memory < floors["fb-x"].memory < floors["fb-both"].memory
    table = 8 * hash_grid_cases.grid_geometry(3, "nerfstudio").sizes[0]
    assert max(size for size, _ in floors["forward"].lookups) <= table


# ---- providers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["cpu", "eager", "eager_fair", "eager_sum", "drjit"])
@pytest.mark.parametrize("convention", ["nerfstudio", "tcnn"])
@pytest.mark.parametrize("dims", [2, 3])
def test_providers_compute_what_the_reference_computes(small_grid, dims, convention, provider):
    case = tiny(f"hash_grid/{dims}d/{convention}/coherent/float32/n14")
    inputs, source = case.inputs(), providers.find(provider)
    missing = {task: source.missing(case, task, "cpu") for task in case.passes.values()}
    for task, reason in missing.items():
        assert reason or worker.check_sample(case, task, source, inputs, "cpu") is None
    if all(missing.values()):
        pytest.skip(next(iter(missing.values())))


def test_a_wrong_provider_is_found_out(small_grid):
    case = tiny("hash_grid/2d/tcnn/uniform/float32/n14")
    task = case.passes["fb-both"]

    def make(case, task, device):
        return providers.TorchTask(lambda x, table: 1.01 * camkernels.hash_grid(x, table, **case.options()), task)

    wrong = providers.Provider("wrong", "", make, lambda *of: None)
    assert "disagrees in value" in worker.check_sample(case, task, wrong, case.inputs(), "cpu")


def test_missing_libraries_are_reasons():
    case = cases.find("hash_grid/3d/tcnn/uniform/float32/n14")
    nerfstudio = cases.find("hash_grid/3d/nerfstudio/uniform/float32/n14")
    forward = case.passes["forward"]
    assert "cuda" in providers.find("tinycudann").missing(case, forward, "cpu")
    assert "layout" in providers.find("drjit").missing(nerfstudio, forward, "cpu")
    assert "cuda" in providers.find("cuda").missing(case, forward, "cpu")
    assert providers.find("reference").missing(case, forward, "cpu") is None


def test_unknown_provider():
    assert [provider.name for provider in providers.select("eager, cpu")] == ["cpu", "eager"]
    with pytest.raises(ValueError, match="no provider is called 'fast'"):
        providers.select("fast")


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_quartiles_and_speedup_use_common_rounds_only():
    ours, theirs = {0: 1.0, 1: 2.0, 2: 4.0}, {0: 10.0, 2: 80.0, 3: 1.0}
    ratio = timing.speedup(ours, theirs)
    assert ratio["rounds"] == 2 and ratio["median"] == 15.0 and ratio["min"] == 10.0
    assert timing.speedup({0: 1.0}, {1: 1.0}) is None
    assert timing.quartiles([1, 2, 3, 4, 5]) == {"median": 3.0, "min": 1.0, "q1": 2.0, "q3": 4.0}


def test_interleave_goes_round_and_lets_slow_tasks_join_seldom():
    order, ticks = [], iter(range(10_000))
    tasks = [timing.Timed(name, lambda name=name: order.append(name), name == "fast") for name in ("fast", "slow")]
    tasks[0].plan(estimate=0.01, rounds=6, budget=10.0, repeat=True)
    tasks[1].plan(estimate=5.0, rounds=6, budget=10.0, repeat=True)
    assert tasks[0].calls == 2 and (tasks[1].calls, tasks[1].stride) == (1, 2)
    assert timing.interleave(tasks, 6, 10.0, lambda: float(next(ticks))) == 6
    assert list(tasks[0].seconds) == [0, 1, 2, 3, 4, 5] and list(tasks[1].seconds) == [0, 2, 4]
    assert order[:3] == ["fast", "fast", "slow"] and tasks[0].seconds[0] == 0.5


def test_interleave_makes_three_rounds_when_there_is_no_time():
    task = timing.Timed("task", lambda: None, True)
    assert timing.interleave([task], 15, 0.0, lambda: 0.0) == timing.MIN_ROUNDS


def test_contended_rounds():
    assert timing.contended_share([100, 100, 80, 95], None, 2) == 0.25
    assert timing.contended_share([100, 100], 3.0, 2) == 1.0


def test_ceilings_of_a_floor():
    work = ((1000, 2), (1 << 20, 10), (1 << 30, 1)), 50.0, 200.0
    expected = {"lookups": 12.0, "memory": 5.0, "arithmetic": 2.0}
    assert ceilings.floor_ns(Floor(*work), LIMITS) == pytest.approx(expected)
    gpu = LIMITS | {"product_gflops": {"float32": 50.0, "bfloat16": 800.0}}
    for product, arithmetic in ((None, 2.0), ("float32", 4.0), ("bfloat16", 0.25)):
        found = ceilings.floor_ns(Floor(*work, product), gpu)
        assert found == pytest.approx(expected | {"arithmetic": arithmetic})
    assert ceilings.floor_ns(Floor(*work, "bfloat16"), LIMITS)["arithmetic"] == pytest.approx(2.0)


def test_dot_products_of_bfloat16_are_rated_where_the_processor_has_them():
    library, _ = ceilings.load_library()
    if library is None:
        pytest.skip("there is no C++ compiler")
    has = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    assert hasattr(library, "ceiling_bfloat16") == has
    if hasattr(library, "ceiling_bfloat16"):
        unit = "amx_bf16" in Path("/proc/cpuinfo").read_text()
        assert ceilings._fma(library, 1000, "ceiling_bfloat16") == (4 * 16**3 * 4 if unit else 4 * 16**2 * 16) * 1000
        assert providers.find("cpu_bfloat16").product == "bfloat16"


def test_without_a_compiler_ceilings_are_estimates(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    ceilings.load_library.cache_clear()
    try:
        library, note = ceilings.load_library()
        assert library is None and "estimates" in note and "no-such-compiler" in note
        assert ceilings._fma(None, 1) > 0
    finally:
        ceilings.load_library.cache_clear()


# ---- records and reports ---------------------------------------------------------------------------------------------


@pytest.fixture
def records(small_grid, monkeypatch) -> list[dict]:
    """A worker's records, made in this process; both variants, a provider that cannot run among them."""
    case = tiny("hash_grid/2d/nerfstudio/uniform/float32/n17")
    monkeypatch.setattr(cases, "find", lambda name: case)
    monkeypatch.setattr(ceilings, "measure", lambda threads: LIMITS)
    monkeypatch.setattr(ceilings, "Calibration", lambda: lambda: 100.0)
    job = worker.Job(
        case=case.name,
        regime="tuned",
        providers=("reference", "cuda", "eager", "eager_fair"),
        passes=("forward", "fb-table"),
        variants=("warm", "fresh"),
        threads=torch.get_num_threads(),
        seconds=0.0,
        rounds=3,
    )
    return list(worker.work(job))


def test_worker_writes_a_record_for_everything_asked(records):
    assert len(records) == 2 * 2 * 4
    json.dumps(records)
    for record in records:
        assert record["machine"]["torch"] == torch.__version__
        if record["provider"] == "cuda":
            assert record["status"] == "skipped" and record["reason"]
            continue
        assert record["status"] == "ok", record
        assert record["rounds"] == 3 and record["ns_per_point"]["median"] > 0
        assert ("eager" in record["speedup"]) == (record["provider"] != "eager")
        assert record["of_ceiling"] > 0 and math.isfinite(record["floor_ns"]["memory"])


def test_report_shows_rows_and_reasons(records, tmp_path):
    text = report.table(records)
    assert "| eager_fair" in text and "cuda not measured" in text and "Ceilings" in text
    file = tmp_path / "result.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert report.load([file]) == records and report.load([file, file]) == records
    assert report.main([str(file), "--base", str(file)]) == 0 and list(tmp_path.glob("*.png")) == []
    assert report.main([str(file), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    file.write_text("not a record\n")
    with pytest.raises(ValueError, match="line 1"):
        report.load([file])


def _faked(records: list[dict], provider: str, regime: str, ratio: float, ns: float) -> list[dict]:
    quartiles = {"median": ratio, "q1": ratio, "q3": ratio, "min": ratio, "rounds": 15}
    change = {
        "provider": provider,
        "regime": regime,
        "speedup": {"eager": quartiles, "compile": quartiles},
        "threads": 1,
    }
    change |= {"ns_per_point": {"median": ns, "min": ns, "q1": ns, "q3": ns}, "points": 1 << 17, "contended": 0.0}
    return [record | change for record in records if record["provider"] == "reference"]


def test_headline_is_the_smaller_ratio_and_changes_compare(records):
    tuned, default = _faked(records, "cpu", "tuned", 52.0, 100.0), _faked(records, "cpu", "default", 47.0, 90.0)
    assert {record["regime"] for record in report.headline(tuned + default)} == {"default"}
    text = report.changes(tuned, _faked(records, "cpu", "tuned", 60.0, 50.0))
    assert "52.0" in text and "60.0" in text and "-50%" in text
    assert "none of these" in report.changes(tuned, default)


# ---- command line ----------------------------------------------------------------------------------------------------


def test_presets_of_the_command_line():
    options = run.parse(["--gate"])
    assert options.memory and options.passes == gate.PASSES and options.regimes == ("default", "tuned")
    assert [case.name for case in options.cases] == list(gate.SECONDS)
    assert options.rounds == 15 and run.parse(["--gate", "modulated_mlp"]).cases == options.cases[2:6]
    quick = run.parse(["--quick", "--providers", "cpu"])
    assert quick.providers == ("cpu",) and quick.regimes == ("tuned",) and not quick.memory
    with pytest.raises(SystemExit):
        run.parse(["--passes", "sideways"])
    with pytest.raises(SystemExit):
        run.parse(["--gate", "--quick"])
    with pytest.raises(SystemExit):
        run.parse(["--gate", "median"])


def test_list_names_everything(capsys):
    assert run.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(case.name in text for case in cases.all_cases()) and "eager_fair" in text and "fb-both" in text


def test_environment_of_a_worker_is_set_by_the_regime_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("CAMKERNELS_RECOMPUTE", "1")
    plain, tuned = (machine.environment(3, machine.REGIMES[regime]) for regime in ("default", "tuned"))
    assert not {"MALLOC_TOP_PAD_", "CAMKERNELS_RECOMPUTE"} & set(plain)
    assert tuned["MALLOC_TOP_PAD_"] == "268435456"
    assert plain["OMP_NUM_THREADS"] == "3"


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_of_a_call_counts_what_it_allocates(small_grid, monkeypatch):
    class Allocates:
        def prepare(self, inputs, cotangent):
            self.size = 1 << 26 if len(inputs["x"]) == TINY else 1

        def run(self):
            return torch.ones(self.size, dtype=torch.uint8)

        def export(self, result):
            return {"value": result}

    provider = providers.Provider("allocates", "", lambda *of: Allocates(), lambda *of: None)
    case = tiny("hash_grid/2d/tcnn/uniform/float32/n14")
    monkeypatch.setattr(memory, "FEW_POINTS", 8)
    try:
        peak, results = memory.peak_of_call(case, case.passes["forward"], provider)
    except memory.NotSupportedError as error:
        pytest.skip(str(error))
    assert results == 1 << 26 <= peak < (1 << 26) + (8 << 20)


def test_short_table_of_the_package(monkeypatch):
    geometry = camkernels.GridGeometry.build(2, 4, 2, 8, 4, finest_resolution=32)
    problem = dataclasses.replace(
        _bench._hash_grid(2),
        options={"geometry": geometry},
        make=lambda n, device: {"x": torch.rand(n, 2), "table": torch.rand(geometry.n_entries, 2)},
    )
    monkeypatch.setattr(_bench, "problems", lambda: [problem])
    seen = []
    rows = _bench.measure(0.0, "cpu", "reference", points=(32, 64), on_row=seen.append)
    assert rows == seen and [row.points for row in rows] == [32, 32, 64, 64]
    assert all(row.backend == "reference" and row.ns > 0 and row.ratio > 0 for row in rows)


# ---- the effect of modulation ----------------------------------------------------------------------------------------


def test_cam_effect_compares_networks_of_one_size(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert cam_effect.main(["--side", "8", "--steps", "3", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["task"] for row in rows] == ["regression"] * 3 + ["generalisation"] * 3
    sizes = {row["parameters"] for row in rows}
    assert sizes == {263_683, 269_827} and max(sizes) <= 1.03 * min(sizes)
    assert rows[0]["gain"] == rows[3]["gain"] == 0 and all(5 < row["psnr"] < 40 for row in rows)
    assert "| generalisation | cam | 269,827 |" in capsys.readouterr().out


def test_cam_effect_trains_on_all_or_every_second_pixel(monkeypatch):
    seen = []

    class Recorder(torch.nn.Linear):
        learning_rate = 1e-3

        def __init__(self):
            super().__init__(2, 3)

        def parameter_groups(self, lr):
            return [{"params": self.parameters(), "lr": lr}]

        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    monkeypatch.setitem(cam_effect.NETWORKS, "recorder", Recorder)
    for every, count in ((1, 36), (2, 9)):
        seen.clear()
        cam_effect.train("recorder", torch.rand(6, 6, 3), every, steps=1, seed=0)
        trained, *drawn = seen
        assert len(trained) == count and sum(map(len, drawn)) == 36
        assert torch.allclose(trained[1], torch.tensor([(every + 0.5) / 6, 0.5 / 6]))


def test_cam_effect_takes_the_middle_of_the_picture(tmp_path):
    values = np.zeros((4, 8, 3), np.uint8)
    values[:, 2:6] = 255
    picture = cam_effect.read_square(save(values, tmp_path / "p.png"), 2)
    assert picture.shape == (2, 2, 3) and (picture == 1).all()
