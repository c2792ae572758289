# SPDX-License-Identifier: MIT
"""`info` tells what can run and why not the rest; `check` finds a backend that differs; `bench` prints a table."""

from __future__ import annotations

import json
import os

import pytest
import torch

import camkernels
from camkernels import _check, _gpu, _info, _ops, testing
from camkernels.__main__ import main
from camkernels._backends import BACKENDS, Call, can_run
from camkernels._geometry import geometry_table


def info(capsys) -> dict:
    capsys.readouterr()
    assert main(["info", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(capsys):
    facts = info(capsys)
    assert facts["camkernels"] == camkernels.__version__ and facts["torch"] == torch.__version__
    assert facts["cpu"]["library"] == _ops.cpu_isa and facts["cpu"]["reason"] == _ops.cpu_missing
    assert facts["cuda"]["library"] == (_ops.cuda_missing is None)
    assert facts["hash_grid_geometries"] == geometry_table()
    assert set(facts["ops"]) == {*testing.CASES, "hash_grid_mlp", "sparse_row_adam"}
    for op, backends in facts["ops"].items():
        assert set(backends) == set(BACKENDS) and backends["reference"] is None
        assert backends["cpu"] == can_run("cpu", Call(op, "cpu"))
        if not torch.cuda.is_available():
            assert backends["cuda"] and backends["triton"]


def test_text_says_the_same(capsys):
    facts = info(capsys)
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert camkernels.__version__ in text and torch.__version__ in text
    for op, backends in facts["ops"].items():
        for backend, reason in backends.items():
            line = next(line for line in text.splitlines() if line.split()[:2] == [op, backend])
            assert line.endswith("yes" if reason is None else reason)
    for row in facts["hash_grid_geometries"]:
        assert row["convention"] in text and (row["dims"] or row["reason"] in text)


def test_environment(capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith("CAMKERNELS_")]:  # make sets some
        monkeypatch.delenv(name)
    monkeypatch.setenv("CAMKERNELS_BACKEND", "reference")
    monkeypatch.setenv("CAMKERNELS_SOMETHING", "1")
    assert info(capsys)["environment"] == {
        "CAMKERNELS_BACKEND": "reference",
        "CAMKERNELS_CPU_ISA": None,
        "CAMKERNELS_SOMETHING": "1",
    }
    main(["info"])
    text = capsys.readouterr().out
    assert "CAMKERNELS_BACKEND=reference" in text and "CAMKERNELS_CPU_ISA=(not set)" in text


def test_build_facts(tmp_path):
    assert _info.build_facts(tmp_path) is None
    (tmp_path / "build.json").write_text("{")
    assert _info.build_facts(tmp_path) is None
    (tmp_path / "build.json").write_text('{"date": "today"}')
    assert _info.build_facts(tmp_path) == {"date": "today"}
    facts = _info.collect()
    for build in (None, {"date": "today", "libraries": {"_cpu_avx2": {}}}):
        text = _info.describe(facts | {"build": build})
        assert ("pure Python" in text) == (build is None) and ("_cpu_avx2" in text) == (build is not None)


def test_second_order_of_triton_is_the_reference_formula(capsys):
    from camkernels.triton import SECOND_ORDER

    assert info(capsys)["second_order"]["triton"] == SECOND_ORDER == "reference formula"
    main(["info"])
    text = capsys.readouterr().out
    assert "triton: reference formula" in text and "cuda: own kernels" in text


def test_hardware_on_which_kernels_have_run(tmp_path):
    assert "with a checkout" in _info.hardware(tmp_path / "none")["reason"]
    nothing = _info.hardware(tmp_path)
    assert nothing["runs"] == [] and "no result of `make gpu`" in nothing["reason"]
    backends = {"cuda": {"passed": 500, "failed": 2, "skipped": 1}, "triton": {"passed": 7, "failed": 0, "skipped": 0}}
    result = {"gpu": "A Card", "time": "2026-01-01", "commit": "abc", "tests": {"backends": backends}}
    (tmp_path / "a-card.json").write_text(json.dumps(result))
    (tmp_path / "stopped.json").write_text(json.dumps({"gpu": "B Card", "time": "2026-01-02", "commit": "abd"}))
    (tmp_path / "broken.json").write_text("[]")
    found = _info.hardware(tmp_path)
    assert [run["gpu"] for run in found["runs"]] == ["A Card", "B Card"] and "broken.json" in found["reason"]
    text = _info.describe(_info.collect() | {"hardware": found})
    line = next(line for line in text.splitlines() if "A Card" in line and "cuda" in line)
    assert "500 tests passed, 2 failed" in line and "commit abc" in line
    assert "no backend" in next(line for line in text.splitlines() if "B Card" in line)
    assert "none known: no result" in _info.describe(_info.collect() | {"hardware": nothing})


# ---- check -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Two cases, and a backend cpu that can run whatever was built."""
    monkeypatch.setattr(_check, "reason_against", lambda backend, op: None if backend == "cpu" else "not in this test")
    return {"hash_grid": testing.CASES["hash_grid"][:2]}


def test_check_agrees(few, monkeypatch, capsys):
    reference = camkernels.reference.hash_grid
    monkeypatch.setattr(camkernels, "hash_grid", lambda *args, backend, **options: reference(*args, **options))
    assert _check.check_backends(few) == 0
    out = capsys.readouterr().out
    assert "2 cases agree" in out and "all 8 comparisons agree" in out and "triton   not here: not in this test" in out


def test_check_compares_the_pair_of_two_ops(few, monkeypatch, capsys):
    pair = {"hash_grid_mlp": testing.PAIRED["hash_grid_mlp"]}
    reference = camkernels.reference.hash_grid_mlp
    monkeypatch.setattr(camkernels, "hash_grid_mlp", lambda *args, backend, **options: reference(*args, **options))
    assert _check.check_backends(pair) == 0
    assert "all 36 comparisons agree" in capsys.readouterr().out
    monkeypatch.setattr(camkernels, "hash_grid_mlp", lambda *args, backend, **rest: 1.01 * reference(*args, **rest))
    assert _check.check_backends(pair) == 1
    assert "hash_grid_mlp" in capsys.readouterr().out


def test_check_finds_a_difference(few, monkeypatch, capsys):
    def wrong(*args, backend, **options):
        result = camkernels.reference.hash_grid(*args, **options)
        return (result[0] * 1.01, result[1]) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(camkernels, "hash_grid", wrong)
    assert _check.check_backends(few) == 1
    out = capsys.readouterr().out
    assert "2 of 2 cases DIFFER" in out and "8 of 8 comparisons failed" in out and "times the tolerance" in out


@pytest.mark.parametrize("op", _check.WITHOUT_DERIVATIVES)
def test_check_compares_ops_without_derivatives(op, capsys):
    cases = {op: _check.WITHOUT_DERIVATIVES[op]}
    assert _check.check_backends(cases) == 0
    out = capsys.readouterr().out
    if _check._reason("cpu", op) is None:
        assert f"{op:22} cpu      bfloat16  {len(cases[op])} cases agree" in out


def test_check_finds_wrong_neighbors(few, monkeypatch, capsys):
    """Of equally near centers the later ones."""
    monkeypatch.setattr(_check, "search_methods", lambda backend: ["exhaustive"])
    cases = {"nearest": _check.WITHOUT_DERIVATIVES["nearest"]}
    assert _check.check_backends(cases) == 0
    search = camkernels.neighbors.search_all

    def flipped(centers, x, k):
        rows, squares = search(centers.flip(0), x, k)
        return len(centers) - 1 - rows, squares

    monkeypatch.setattr(camkernels.neighbors, "search_all", flipped)
    assert _check.check_backends(cases) == 1
    out = capsys.readouterr().out
    assert "4 of 4 cases DIFFER" in out and "exhaustive: " in out and "points differ for k=1" in out


@pytest.mark.parametrize("what", range(4))
def test_check_finds_a_wrong_step(what, few, monkeypatch, capsys):
    errors = [0] * 4  # of values, moments and counts of steps

    def step(*arguments):
        state, (gradient, rows, _, lr, *betas, eps) = arguments[:4], arguments[4:]
        camkernels.reference.sparse_row_adam(*state, gradient, rows, lr=lr, betas=betas, eps=eps)
        for t, error in zip(state, errors, strict=True):
            t.add_(error)

    monkeypatch.setattr(_check.optim, "_STEP", step)
    cases = {"sparse_row_adam": _check.WITHOUT_DERIVATIVES["sparse_row_adam"]}
    assert _check.check_backends(cases) == 0
    errors[what] = 1
    assert _check.check_backends(cases) == 1
    assert "2 of 2 cases DIFFER" in capsys.readouterr().out


def test_check_is_of_exact_products(few, monkeypatch):
    """Whatever the environment allows, which is as it was behind it."""
    seen = []

    def watched(*args, backend, **options):
        seen.append(_gpu.allows_tf32())
        return camkernels.reference.hash_grid(*args, **options)

    monkeypatch.setattr(camkernels, "hash_grid", watched)
    with testing.tf32(True):
        assert _check.check_backends(few) == 0 and _gpu.allows_tf32()
    assert seen and not any(seen)


def test_check_without_any_backend(monkeypatch, capsys):
    monkeypatch.setattr(_check, "reason_against", lambda backend, op: "nothing was built")
    monkeypatch.setattr(_check, "search_methods", lambda backend: [])
    assert main(["check"]) == 0
    assert "nothing to compare" in capsys.readouterr().out


# ---- the command line itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["info", "check", "bench", "fit", "render"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as leave:
        main([command, "--help"])
    assert leave.value.code == 0 and command in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--threads", "0"], "--threads must be at least 1"),
        (["--device", "cpu", "--backend", "cuda"], "hash_grid: backend 'cuda' cannot run: the tensors are on cpu"),
        (["--device", "cuda"], "use --device cpu"),
    ],
)
def test_bench_refuses_in_a_sentence(options, sentence, capsys):
    if options == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["bench", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as leave:
        main(["dance"])
    assert leave.value.code == 2 and "dance" in capsys.readouterr().err


def test_ctrl_c_is_not_a_traceback(monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_info, "print_info", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "camkernels: stopped by Ctrl-C\n"
