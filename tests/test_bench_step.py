# SPDX-License-Identifier: MIT
"""Training steps beside plain PyTorch: both fields compute the same, and unequal ones are not timed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from camkernels import HashGrid, testing
from camkernels.fields import MODELS

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "step.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench import plain_fields, step  # noqa: E402

from camkernels.fit.picture import read_picture  # noqa: E402
from pictures import save  # noqa: E402

SMALL = {
    "hash": {"n_levels": 4, "finest_resolution": 32, "log2_hashmap_size": 8},
    "hash-cam": {"n_levels": 4, "finest_resolution": 32, "log2_hashmap_size": 8, "nodes": 5, "norm": "point"},
    "cam": {"width": 16, "num_frequencies": 8, "nodes": 5},
    "fourier": {"width": 16, "num_frequencies": 8},
    "neurbf": {"size": (32, 24), "kernels": 30, "width": 16},
}


@pytest.fixture
def picture(tmp_path):
    values = torch.randint(256, (12, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return save(values.numpy(), tmp_path / "small.png")


@pytest.fixture(params=MODELS)
def pair(request):
    """A field with parameters that are not the first ones, and its plain copy."""
    torch.manual_seed(1)
    own = MODELS[request.param](**SMALL[request.param])
    if request.param == "neurbf":  # its sines turn by up to 4096 rad, of which float32 has three digits
        own.double()
    with torch.no_grad():
        for parameter in (p for p in own.parameters() if p.requires_grad):
            parameter.add_(torch.rand_like(parameter) * 0.3)
    return own, plain_fields.plain(own)


def test_a_plain_field_computes_what_the_field_computes(pair):
    own, other = pair
    x = torch.rand(200, 2, generator=torch.Generator().manual_seed(2), dtype=next(own.parameters()).dtype)
    known = (own.nearest(x),) if hasattr(own, "nearest") else ()
    y, z = own(x, *known), other(x, *known)
    testing.assert_close(z, y, rtol=1e-4, atol=1e-6)
    (y.square().sum()).backward()
    (z.square().sum()).backward()
    theirs = dict(other.named_parameters())
    for name, parameter in own.named_parameters():
        if not parameter.requires_grad:
            continue
        testing.assert_close(theirs[name].grad, parameter.grad, rtol=1e-3, atol=1e-6, name=name)


def test_a_plain_field_has_parameters_of_its_own_and_no_layer_of_ours(pair):
    own, other = pair
    theirs = dict(other.named_parameters())
    assert theirs.keys() == dict(own.named_parameters()).keys()
    assert all(theirs[name] is not parameter for name, parameter in own.named_parameters())
    assert not any(type(module) in {HashGrid, *plain_fields.LAYERS} for module in other.modules())
    sizes = [[(g["lr"], sum(p.numel() for p in g["params"])) for g in f.parameter_groups(1e-2)] for f in pair]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(("model", "sides"), [("hash", ["plain", "fair"]), ("fourier", ["plain"])])
def test_a_step_is_measured_on_every_side(picture, model, sides):
    found = step.measure(model, read_picture(picture), 64, "cpu", torch.get_num_threads(), 3, 0.0)
    assert list(found["ms"]) == list(found["losses"]) == ["camkernels", *sides]
    own, *others = found["losses"].values()
    assert all(own == pytest.approx(other, rel=step.ALLOWED) for other in others) and own[0] > own[-1]
    _, *cells, _ = map(str.strip, step.row(found | {"model": model, "regime": "tuned"}).split("|"))
    assert cells[:2] == [model, "tuned"] and len(cells) == 7
    assert list(found["speedup"]) == sides
    for side, (ms, ratio) in zip(sides, (cells[3:5], cells[5:]), strict=False):
        assert ms == f"{found['ms'][side]['median']:.1f}"
        assert found["speedup"][side]["rounds"] == 3 and ratio.startswith(f"{found['speedup'][side]['median']:.1f} (")
    assert cells[5:] == ["", ""] or "fair" in sides


def test_unequal_fields_are_not_timed(picture, monkeypatch):
    def spoiled(field, form):
        other = copy.deepcopy(field)
        with torch.no_grad():
            next(other.mlp.parameters()).add_(0.1)
            list(other.parameters())[-1].add_(0.1)
        return other

    monkeypatch.setattr(plain_fields, "plain", spoiled)
    with pytest.raises(ValueError, match="hash: the losses of the first steps differ"):
        step.measure("hash", read_picture(picture), 64, "cpu", torch.get_num_threads(), 3, 0.0)


def test_the_command_writes_a_record_per_model(picture, tmp_path, capfd):
    out = tmp_path / "records" / "steps.jsonl"
    arguments = ["--models", "hash", "--regimes", "default", "--picture", str(picture), "--batch", "64"]
    assert step.main([*arguments, "--rounds", "3", "--seconds", "0", "--out", str(out)]) == 0
    (record,) = map(json.loads, out.read_text().splitlines())
    assert (record["kind"], record["model"], record["regime"], record["batch"]) == ("step", "hash", "default", 64)
    assert record["machine"]["torch"] == torch.__version__
    assert "| hash | default | " in capfd.readouterr().out


def test_a_process_that_fails_is_said_and_counted(tmp_path, capfd):
    missing = ["--models", "hash", "--regimes", "tuned", "--picture", str(tmp_path / "none.png")]
    assert step.main([*missing, "--rounds", "3", "--seconds", "0"]) == 1
    assert "hash ended with status" in capfd.readouterr().err


def test_names_and_presets_of_the_command_line():
    assert step.parse([]).regimes == ["default", "tuned"] and step.parse([]).models == list(MODELS)
    assert step.parse(["--device", "cuda"]).regimes == ["tuned"]
    for wrong in (["--models", "median"], ["--regimes", "fast"]):
        with pytest.raises(SystemExit):
            step.parse(wrong)
    done = subprocess.run([sys.executable, "-m", "bench.step", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--models" in done.stdout
