# SPDX-License-Identifier: MIT
"""`make gpu` as far as a machine without a GPU shows it: the dry run, the budget, the result file and its readers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from camkernels import _gpu, _info, testing

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "gpu.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import cases, ceilings, gpu, gpu_rates, gpu_steps, report, run, triton_cache  # noqa: E402
from bench.gpu_steps import Step  # noqa: E402

without_gpu = pytest.mark.skipif(_gpu.no_gpu() is None, reason="there is a GPU")


def python(name: str, script: str, limit: float = 60.0, least: float = 1.0, **more) -> Step:
    return Step(name, "a script", (sys.executable, "-c", script), limit, least, **more)


# ---- the dry run -----------------------------------------------------------------------------------------------------


def test_dry_run_shows_every_step_and_writes_nothing():
    before = sorted(gpu.RESULTS.iterdir())
    command = [sys.executable, "-m", "bench.gpu", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for number, step in enumerate(gpu_steps.all_steps(), 1):
        assert f"{number}. {step.name}: {step.about}" in done.stdout
    assert "tests collected" in done.stdout and "GPU: " in done.stdout and "library: " in done.stdout
    for name in ("hash_grid/3d/tcnn/uniform/float32/n20", "modulated_mlp/wide/bfloat16/n17", "tinycudann", "compile"):
        assert name in done.stdout
    assert sorted(gpu.RESULTS.iterdir()) == before


def test_dry_run_fails_where_a_rehearsal_fails(monkeypatch, capsys):
    broken = python("tests", "", rehearsal=(sys.executable, "-c", "print('no tests'); raise SystemExit(5)"))
    assert gpu.dry_run([broken], 100.0) == 1
    assert "rehearsed: failed: no tests" in capsys.readouterr().out
    assert gpu.dry_run([python("long", "", least=200.0)], 100.0) == 1


@without_gpu
def test_without_a_gpu_nothing_is_measured_and_nothing_written(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert gpu.main(["--out", str(out)]) == 2
    assert "--dry-run" in capsys.readouterr().err and not out.exists()
    assert run.main(["--device", "cuda", "--quick", "--out", str(out)]) == 2
    assert "--device cuda: " in capsys.readouterr().err and not out.exists()
    assert gpu_rates.main([]) == triton_cache.main([]) == 2


def test_steps_by_name(tmp_path):
    assert [step.name for step in gpu_steps.select("check, tests", tmp_path)] == ["tests", "check"]
    with pytest.raises(ValueError, match="no step is called 'test'; there are build, "):
        gpu_steps.select("test", tmp_path)


def test_the_tests_step_finds_the_marked_files():
    assert {"tests/test_cuda.py", "tests/test_cuda_citizenship.py", "tests/test_optim.py"} <= set(gpu_steps.marked())
    assert not {"tests/test_gpu_command.py", "tests/test_agreement.py"} & set(gpu_steps.marked())


@pytest.mark.slow
def test_the_tests_for_a_gpu_work_where_there_is_none():
    """Those that ask for no stream, against backend cpu where an op has it: none is wrong in itself."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *gpu_steps.marked()]
    command += ["-k", "not every_case or float16"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"REHEARSAL": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout


# ---- the budget ------------------------------------------------------------------------------------------------------


def test_the_budget_ends_before_nine_minutes_and_lets_every_step_start():
    steps = gpu_steps.all_steps()
    assert gpu.BUDGET + 2 * gpu_steps.GRACE < 9 * 60
    assert sum(step.least for step in steps) <= gpu.BUDGET
    assert all(0 < step.least <= step.limit for step in steps)


def test_a_step_leaves_to_others_the_least_they_need():
    first, second, third = python("a", "", 270, 20), python("b", "", 100, 30), python("c", "", 100, 50)
    assert gpu.allowance(first, [second, third], 500.0) == 270
    assert gpu.allowance(first, [second, third], 200.0) == 120
    assert gpu.allowance(third, [], 40.0) == 40


@pytest.fixture
def played(tmp_path):
    """A run of steps: one that works, one that fails, one that hangs with a child, one left out, one too long."""
    child = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    hang = f"import subprocess, sys; print('started'); {child}"
    steps = [
        python("good", "print('all well')", gather=lambda folder: {"rates": {"a": 1.5}}),
        python("bad", "print('broken'); raise SystemExit(3)"),
        python("slow", hang, limit=3.0),
        python("left out", "", skip=lambda: "there is no nvcc"),
        python("too long", "", limit=500, least=400),
    ]
    out = tmp_path / "a" / "result.json"
    result = {"schema": gpu.SCHEMA, "gpu": "A Card", "driver": None, "commit": "abc", "time": "today", "steps": []}
    start = time.monotonic()
    gpu.run_steps(steps[:-1], result, out, 60.0, tmp_path)
    gpu.run_steps(steps[-1:], result, out, 60.0, tmp_path)
    return result, out, time.monotonic() - start


def test_outcomes_of_steps(played):
    result, _, seconds = played
    found = {record["step"]: record for record in result["steps"]}
    assert {name: record["outcome"] for name, record in found.items()} == {
        "good": "ok",
        "bad": "failed",
        "slow": "timed out",
        "left out": "skipped",
        "too long": "skipped",
    }
    assert found["good"]["tail"] == ["all well"] and result["rates"] == {"a": 1.5}
    assert found["bad"]["reason"] == "status 3: broken"
    assert "started" in found["slow"]["tail"] and "ended after 3 s" in found["slow"]["reason"]
    assert found["left out"]["reason"] == "there is no nvcc" and "s are left of 60" in found["too long"]["reason"]
    assert seconds < 40
    text = gpu.summary(result)
    assert "A Card" in text and all(name in text for name in found)


def test_ctrl_c_ends_the_step_too(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    pid = tmp_path / "pid"
    script = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 2.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu_steps.execute(python("sleeps", script), 60.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


# ---- the result file -------------------------------------------------------------------------------------------------


def test_what_was_known_last_is_in_the_file(played):
    result, out, _ = played
    assert json.loads(out.read_text()) == result and sorted(out.parent.iterdir()) == [out]


def test_a_result_is_reported_as_other_benchmarks_are(played, tmp_path):
    result, out, _ = played
    known = [json.loads(line) for line in (gpu.RESULTS / "cpu-zen5-avx512.jsonl").read_text().splitlines()]
    gpu.write(result | {"records": known}, out)
    assert report.load([out]) == report.load([gpu.RESULTS / "cpu-zen5-avx512.jsonl"])
    for text in ("{", "[]", json.dumps({"schema": gpu.SCHEMA})):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ValueError, match="not a result of `make gpu`"):
            report.load([tmp_path / "other.json"])


def test_a_report_tells_the_rates_of_matrix_products_of_a_gpu():
    known = [json.loads(line) for line in (gpu.RESULTS / "cpu-zen5-avx512.jsonl").read_text().splitlines()]
    for record in known:
        if "ceilings" in record:
            record["ceilings"]["product_gflops"] = {"float32": 51_000.0, "bfloat16": 700_000.0}
    assert ", float32 products 51 TF/s, bfloat16 products 700 TF/s." in report.table(known)


def test_info_reads_what_the_command_writes(played):
    result, out, _ = played
    counts = {"cuda": {"passed": 7, "failed": 1, "skipped": 0}}
    gpu.write(result | {"tests": {"passed": 7, "failed": 1, "skipped": 0, "backends": counts, "failures": []}}, out)
    found = _info.hardware(out.parent)
    assert found["reason"] is None
    assert found["runs"] == [{"gpu": "A Card", "time": "today", "commit": "abc", "backends": counts, "file": str(out)}]


def test_names_of_result_files():
    assert gpu.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert gpu.file_name("NVIDIA GeForce RTX 4090 (x)") == "nvidia-geforce-rtx-4090-x.json"


TESTS = """
import pytest

@pytest.fixture(params=["cuda", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.skip("no Triton")

@pytest.mark.parametrize("case", ["a-b", "c"])
def test_passes(case, backend): pass

def test_fails(backend): assert 1 + 1 == 3

def test_without_backend(): pass
"""


def test_pytest_s_report_is_counted_by_backend(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    report = tmp_path / "report.xml"
    assert gpu_steps.read_tests(report) == {}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "test_it.py"]
    subprocess.run(command, cwd=tmp_path, capture_output=True)
    found = gpu_steps.read_tests(report)["tests"]
    assert found["backends"] == {
        "cuda": {"passed": 2, "failed": 1, "skipped": 0},
        "triton": {"passed": 0, "failed": 0, "skipped": 3},
    }
    assert (found["passed"], found["failed"], found["skipped"]) == (3, 1, 3)
    assert found["failures"][0]["test"] == "test_fails[cuda]" and "== 3" in found["failures"][0]["message"]


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_every_rate_is_measured_also_where_there_is_no_gpu():
    works = list(gpu_rates.all_works("cpu", shrink=1 << 12))
    names = [work.name for work in works]
    assert len(set(names)) == len(names)
    assert {f"{kind} product" for kind in ("float32", "tf32", "bfloat16", "float16")} <= set(names)
    for wanted in ("read 8 B in", "copy", "index_add_", "sort", "call of x + 1"):
        assert any(wanted in name for name in names), wanted
    for backend in gpu_rates.own_backends("cpu"):
        assert f"{backend}: add 2 x float32, 64 together" in names and f"{backend}: call of hash_grid" in names
    rates = gpu_rates.measure(works, "cpu", 0.1)
    assert list(rates) == names and all(rate["per_second"]["min"] > 0 for rate in rates.values())
    assert len(gpu_rates.table(rates).splitlines()) == len(rates) + 1
    json.dumps(rates)


def test_ceilings_of_a_gpu_serve_as_those_of_a_cpu(monkeypatch):
    monkeypatch.setattr(gpu_rates, "READS", 1 << 10)
    monkeypatch.setattr(gpu_rates, "LOOKUP_BYTES", (1 << 16, 1 << 22))
    small = {"copying": 1 << 16, "product": 32}
    for name, size in small.items():
        function = getattr(gpu_rates, name)
        monkeypatch.setattr(gpu_rates, name, lambda *of, function=function, size=size: function(*of, size))
    limits = gpu_rates.ceilings("cpu", 0.05)
    assert limits.keys() == {"fma_gflops", "product_gflops", "copy_gbs", "lookups", "threads", "note"}
    assert torch.get_float32_matmul_precision() == "highest"
    case = cases.find("hash_grid/3d/tcnn/uniform/float32/n14")
    floor = ceilings.floor_ns(case.floor(case.passes["fb-both"]), limits)
    assert all(ns > 0 for ns in floor.values())


def test_triton_s_calls_are_shared_out_and_errors_left_to_the_tests():
    seen = []

    def function(**arguments):
        names = ("table", "grids", "weights", "gamma", "features")
        found = next(t for name in names if (t := arguments.get(name)) is not None)
        seen.append(found[0].dtype)
        raise RuntimeError("not here")

    shares = [triton_cache.run_share(share, 3, function, "cpu") for share in range(3)]
    assert triton_cache.ops() == ["hash_grid", "modulated_mlp", "modulate", "coordinate_modulation", "radial_basis"]
    every = len(triton_cache.DTYPES) * sum(len(testing.cases(op)) for op in triton_cache.ops())
    assert sum(shares) == every and max(shares) - min(shares) <= 1
    assert len(seen) == every * len(triton_cache.PASSES)
    assert {dtype: seen.count(dtype) for dtype in seen} == dict.fromkeys(
        triton_cache.DTYPES, len(seen) // len(triton_cache.DTYPES)
    )
