# SPDX-License-Identifier: MIT
"""NeuRBF against a hash grid by the command that fits pictures; what the command that fits shapes reaches."""

import json
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench" / "neurbf_quality.py").exists():
    pytest.skip("the bench folder is not here", allow_module_level=True)
sys.path.insert(0, str(ROOT))
for extra in ("PIL", "tqdm", "matplotlib", "scipy"):
    pytest.importorskip(extra)

from bench import neurbf_quality, shape_quality  # noqa: E402

from camkernels.__main__ import main  # noqa: E402
from camkernels.fields import SHAPE_MODELS  # noqa: E402
from pictures import save, smooth  # noqa: E402


def test_neurbf_gets_the_parameters_of_the_best_hash_grid(tmp_path, capsys):
    picture, out = save(smooth(), tmp_path / "picture.png"), tmp_path / "runs.jsonl"
    options = ["--log2-sizes", "8", "9", "--divisors", "1", "2", "--steps", "3", "--batch", "64"]
    assert neurbf_quality.main(["--picture", str(picture), *options, "--out", str(out)]) == 0
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [run["model"] for run in runs] == ["hash", "hash", "neurbf"] * 2
    rows = capsys.readouterr().out.splitlines()[-2:]
    for (*grids, neurbf), row in zip(neurbf_quality.by_size(runs), rows, strict=True):
        best = max(grids, key=lambda run: run["psnr"])
        assert 0 <= best["parameters"] - neurbf["parameters"] < 40
        assert row.startswith(f"| {best['parameters']:,} | {best['psnr']:.2f} | {best['ssim']:.4f} |")
        assert f"| {neurbf['psnr'] - best['psnr']:+.2f} |" in row
        assert neurbf["config"]["hidden_layers"] == best["config"]["hidden_layers"] == 2


def test_a_record_has_the_command_that_repeats_it(tmp_path):
    picture = save(smooth(), tmp_path / "picture.png")
    run = neurbf_quality.fit([str(picture), "--model", "neurbf", "--kernels", "9", "--steps", "3", "--batch", "64"])
    program, *arguments = shlex.split(run["command"])[2:]
    assert program == "camkernels" and main([*arguments, "--out", str(tmp_path / "again"), "--quiet"]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["psnr"] == run["psnr"] and again["config"] == run["config"]


def test_a_fit_that_fails_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="ended with status"):
        neurbf_quality.fit([str(tmp_path / "none.png")])


NAMES = ["neurbf-photo-4000", "neurbf-photo-4000-seed1", "neurbf-photo", "neurbf-photo-seed1", "neurbf-astronaut"]


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_quotes_the_results(name):
    text = (ROOT / "bench" / "README.md").read_text()
    assert f"`results/{name}.jsonl`" in text
    runs = [json.loads(line) for line in (ROOT / "bench" / "results" / f"{name}.jsonl").read_text().splitlines()]
    rows = [neurbf_quality.row(group) for group in neurbf_quality.by_size(runs)]
    assert rows and all(row in text for row in rows)


def test_every_mesh_is_fitted_with_every_model(tmp_path, capsys, monkeypatch):
    pytest.importorskip("skimage", reason="scikit-image is not installed (extra: shape)")
    pytest.importorskip("trimesh", reason="trimesh is not installed (extra: shape)")
    from camkernels.fit import shape

    for name, value in (("INSIDE_POINTS", 500), ("PICTURE_SIZE", (12, 8))):
        monkeypatch.setattr(shape, name, value)
    quick = ["--samples", "20000", "--resolution", "16", "--batch", "500"]
    monkeypatch.setattr(shape_quality, "fit", lambda command, job: neurbf_quality.fit([*command, *quick], job))
    out = tmp_path / "runs.jsonl"
    assert shape_quality.main(["--meshes", str(shape_quality.MESHES[1]), "--steps", "2", "--out", str(out)]) == 0
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(run["mesh"], run["model"]) for run in runs] == [("knot.ply", name) for name in SHAPE_MODELS]
    assert capsys.readouterr().out.splitlines()[-2:] == [shape_quality.row(run) for run in runs]
    assert all(0 <= run["iou"] <= 1 and run["normal_error_degrees"] > 0 for run in runs)
