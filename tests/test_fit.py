# SPDX-License-Identifier: MIT
"""The main job: `fit image` and `render` on every kind of picture, resuming, Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from camkernels.__main__ import main
from camkernels._backends import Call, choose
from camkernels.fields import MODELS, HashImageField
from camkernels.fit import image as image_module
from camkernels.fit.checkpoint import load_checkpoint, save_checkpoint
from camkernels.fit.errors import UserError
from camkernels.fit.metrics import psnr
from camkernels.fit.picture import read_picture, write_picture
from camkernels.fit.trainer import Stop, Trainer
from fitting import FILES, SMALL, fit, report
from pictures import save, smooth

Image = pytest.importorskip("PIL.Image")
for extra in ("tqdm", "matplotlib", "scipy"):
    pytest.importorskip(extra)


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_small_steps():
    """Steps of a few hundred points gain nothing from threads, and lose much to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- fitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "channels, peak, mode",
    [(1, 255, "L"), (2, 255, "LA"), (3, 255, "RGB"), (4, 255, "RGBA"), (1, 65535, "I;16"), (3, 65535, "RGB")],
)
def test_reconstruction_has_the_format_of_the_picture(tmp_path, channels, peak, mode):
    write_picture(smooth(channels=channels, peak=peak), path := tmp_path / "p.png")
    assert fit(path, tmp_path / "out", "--steps", "40") == 0
    with Image.open(tmp_path / "out" / "reconstruction.png") as image:
        assert image.mode == mode and image.size == (20, 14)
    found = report(tmp_path / "out")
    written = read_picture(tmp_path / "out" / "reconstruction.png").values
    assert found["psnr"] == pytest.approx(psnr(written, smooth(channels=channels, peak=peak), peak))
    assert (found["channels"], found["bits"]) == (channels, 8 if peak == 255 else 16)
    assert peak == 255 or len(np.unique(written % 257)) > 50  # not 8 bits spread out


def test_files_and_report(fitted):
    assert {path.name for path in fitted.iterdir()} == FILES
    found = report(fitted)
    field = HashImageField(**found["config"])
    count = sum(p.numel() for p in field.parameters())
    assert (found["parameters"], found["bytes"]) == (count, 4 * count)
    assert (found["steps"], found["batch"], found["seed"], found["ended"]) == (12, 256, 0, "finished")
    assert found["points_per_second"] == pytest.approx(12 * 256 / found["seconds"])
    assert found["torch"] == torch.__version__ and found["backend"] in ("cpu", "cuda", "triton", "reference")
    assert 5 < found["psnr"] < 60 and -1 <= found["ssim"] <= 1


def test_quality_on_a_smooth_picture(tmp_path):
    path = save(smooth(48, 40), tmp_path / "p.png")
    options = ["--steps", "150", "--levels", "6", "--finest", "24", "--batch", "1024"]
    assert main(["fit", "image", str(path), "--out", str(tmp_path / "out"), *options]) == 0
    found = report(tmp_path / "out")
    assert found["psnr"] > 38 and found["ssim"] > 0.98


@pytest.mark.slow
def test_the_demo_reaches_33_db(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "data" / "photo.jpg").exists():
        pytest.skip("the photograph is not here")
    monkeypatch.chdir(root)
    (given,) = re.findall(r"-m camkernels (fit image .*?)\n[^\t]", (root / "Makefile").read_text(), re.DOTALL)
    arguments = given.replace("\\\n", "").replace("--out demo", "").replace("--compare", "").split()
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert report(tmp_path)["psnr"] >= 33


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (300, 2)])
def test_odd_sizes(tmp_path, size):
    path = save(smooth(*size), tmp_path / "p.png")
    assert main(["fit", "image", str(path), "--out", str(tmp_path / "out"), "--steps", "150", "--batch", "256"]) == 0
    assert report(tmp_path / "out")["size"] == list(size)
    assert read_picture(tmp_path / "out" / "reconstruction.png").size == size
    if size == (1, 1):
        assert np.array_equal(read_picture(tmp_path / "out" / "reconstruction.png").values, smooth(1, 1))
        assert report(tmp_path / "out")["psnr"] is None  # identical


def test_the_progress_bar_says_how_far_how_good_and_how_fast(tmp_path, photo, capfd):
    assert fit(photo, tmp_path / "out") == 0
    assert re.search(r"12/12 steps, PSNR \d+\.\d\d dB, \d+\.\d\d M points/s", capfd.readouterr().err)


def test_same_seed_same_result(tmp_path, photo):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(hash(name) % 1000)  # the caller's generator has no say, and keeps its state
        before = torch.get_rng_state()
        assert fit(photo, tmp_path / name, "--seed", seed, "--device", "cpu") == 0
        assert torch.equal(before, torch.get_rng_state())
    a, b, c = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "abc")
    assert torch.equal(a["training"]["losses"], b["training"]["losses"])
    assert all(torch.equal(value, b["state"][name]) for name, value in a["state"].items() if torch.is_tensor(value))
    assert not torch.equal(a["training"]["losses"], c["training"]["losses"])


def test_stop_rules(tmp_path, photo, capsys):
    assert fit(photo, tmp_path / "s", "--seconds", "0.3") == 0
    assert report(tmp_path / "s")["seconds"] >= 0.3
    assert fit(photo, tmp_path / "t", "--target-psnr", "12") == 0
    found = report(tmp_path / "t")
    assert found["ended"] == "reached" and (found["psnr"] is None or found["psnr"] >= 12)  # None: identical by then
    assert Stop(steps=10).progress(5, 99) == 0.5 and Stop(seconds=10).progress(5, 99) == 1


def test_a_missed_target_is_said(tmp_path, photo, capsys, monkeypatch):
    monkeypatch.setattr(image_module, "MOST_STEPS", 5)
    assert fit(photo, tmp_path / "out", "--target-psnr", "70") == 1
    assert "target of 70 dB was not reached" in capsys.readouterr().out
    assert (tmp_path / "out" / "checkpoint.pt").exists()


def test_compare(tmp_path, photo, capsys):
    assert fit(photo, tmp_path / "out", "--compare", "--device", "cpu", "--backend", "reference") == 0
    assert report(tmp_path / "out")["compare"] is None
    if choose(Call("hash_grid", "cpu"), None) == "reference":
        pytest.skip("only the reference runs here")
    capsys.readouterr()
    assert fit(photo, tmp_path / "out", "--compare", "--device", "cpu") == 0
    found = report(tmp_path / "out")["compare"]
    assert found["ratio"] == pytest.approx(found["plain_pytorch_step_seconds"] / found["step_seconds"])
    assert "in plain PyTorch" in capsys.readouterr().out


def test_quiet(tmp_path, photo, capfd):
    assert fit(photo, tmp_path / "out", "--quiet") == 0
    assert capfd.readouterr() == ("", "")


# ---- Ctrl-C and resuming ---------------------------------------------------------------------------------------------


def test_resume_continues_as_if_nothing_had_happened(tmp_path, photo, monkeypatch, capsys):
    assert fit(photo, tmp_path / "whole", "--steps", "30") == 0
    advance = Trainer.advance

    def interrupted(self):
        loss = advance(self)
        if self.step == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(Trainer, "advance", interrupted)
    assert fit(photo, tmp_path / "part", "--steps", "30") == 130
    assert "stopped by Ctrl-C at step 11" in capsys.readouterr().out
    assert (
        report(tmp_path / "part")["ended"] == "interrupted" and {p.name for p in (tmp_path / "part").iterdir()} == FILES
    )
    monkeypatch.setattr(Trainer, "advance", advance)
    path = tmp_path / "part" / "checkpoint.pt"
    assert main(["fit", "image", str(photo), "--out", str(tmp_path / "part"), "--resume", str(path)]) == 0
    whole, part = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "part"))
    assert part["step"] == whole["step"] == 30
    assert torch.equal(part["training"]["losses"], whole["training"]["losses"])
    assert all(torch.equal(value, part["state"][k]) for k, value in whole["state"].items() if torch.is_tensor(value))


def test_resume_with_more_steps(tmp_path, fitted):
    path = fitted / "checkpoint.pt"
    assert fit(fitted.parent / "photo.png", tmp_path / "out", "--resume", path, "--steps", "20", "--lr", "0.001") == 0
    found = report(tmp_path / "out")
    assert (found["steps"], found["batch"], found["lr"], found["config"]["n_levels"]) == (20, 256, 0.001, 4)


def test_resume_counts_the_points_of_every_batch(tmp_path, fitted):
    path, photo = fitted / "checkpoint.pt", fitted.parent / "photo.png"
    assert fit(photo, tmp_path / "out", "--resume", path, "--steps", "20", "--batch", "1000") == 0
    found = report(tmp_path / "out")
    assert found["points_per_second"] * found["seconds"] == pytest.approx(12 * 256 + 8 * 1000)


def test_resume_of_a_run_that_is_done_changes_nothing(tmp_path, fitted, capfd):
    path, photo = fitted / "checkpoint.pt", fitted.parent / "photo.png"
    assert fit(photo, tmp_path / "out", "--resume", path, "--steps", "10") == 0
    assert "10/10 steps" in capfd.readouterr().err
    assert report(tmp_path / "out")["psnr"] == report(fitted)["psnr"]


def test_ctrl_c_of_a_process(tmp_path, photo):
    command = [sys.executable, "-u", "-m", "camkernels", "fit", "image", photo, "--out", tmp_path / "out", *SMALL]
    folders = [str(Path(image_module.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command), "--steps", "1000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("model hash"):
            break
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped by Ctrl-C" in out and "Traceback" not in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


# ---- checkpoints and render ------------------------------------------------------------------------------------------


def test_checkpoint_is_plain(fitted):
    content = torch.load(fitted / "checkpoint.pt", weights_only=True)
    assert set(content) >= {"format", "version", "model", "config", "state", "optimizer", "step", "rng"}
    model = MODELS[content["model"]](**content["config"])
    model.load_state_dict(content["state"])
    assert content["step"] == 12 == len(content["training"]["losses"])


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, fitted, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((fitted / "checkpoint.pt").read_bytes())
    before = path.read_bytes()

    def full(content, target):
        Path(target).write_bytes(b"half")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="no space left"):
        save_checkpoint(path, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("size", ["20x14", "1x1", "37x11", "900X200"])
def test_render(tmp_path, fitted, size, monkeypatch):
    monkeypatch.setattr(image_module, "CHUNK", 50_000)
    out = tmp_path / "new" / "drawn.png"
    assert main(["render", str(fitted / "checkpoint.pt"), "--size", size, "--out", str(out)]) == 0
    values = read_picture(out).values
    width, height = map(int, size.lower().split("x"))
    assert values.shape == (height, width, 3)
    if size == "20x14":
        assert np.array_equal(values, read_picture(fitted / "reconstruction.png").values)


def test_render_beside_the_checkpoint(tmp_path, fitted):
    (tmp_path / "c.pt").write_bytes((fitted / "checkpoint.pt").read_bytes())
    assert main(["render", str(tmp_path / "c.pt"), "--size", "6x5"]) == 0
    assert read_picture(tmp_path / "render_6x5.png").size == (6, 5)
