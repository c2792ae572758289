# SPDX-License-Identifier: MIT
"""The main job: `fit image` and `render` on every kind of picture, resuming, Ctrl-C, and bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
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
from camkernels.fit.plots import write_error_picture, write_loss_curve
from camkernels.fit.trainer import Stop, Trainer
from pictures import save, smooth

Image = pytest.importorskip("PIL.Image")
for extra in ("tqdm", "matplotlib", "scipy"):
    pytest.importorskip(extra)

SMALL = ["--levels", "4", "--finest", "24", "--width", "16", "--hidden", "1", "--batch", "256"]
FILES = {"reconstruction.png", "error.png", "loss.png", "checkpoint.pt", "report.json"}


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_small_steps():
    """Steps of a few hundred points gain nothing from threads, and lose much to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fit(path: Path, out: Path, *arguments: str) -> int:
    stop = ["--steps", "12"] if not {"--steps", "--seconds", "--target-psnr"} & set(arguments) else []
    small = [] if "--resume" in arguments else SMALL
    return main(["fit", "image", str(path), "--out", str(out), *small, *stop, *map(str, arguments)])


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save(smooth(), tmp_path / "photo.png")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """The folder of a finished fit, made once; not to be written to."""
    folder = tmp_path_factory.mktemp("fitted")
    assert fit(save(smooth(), folder / "photo.png"), folder / "out") == 0
    return folder / "out"


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


def test_the_error_picture_is_bright_where_the_error_is(tmp_path):
    original = smooth(40, 40)
    fitted = original.copy()
    fitted[:, 20:] -= 25
    write_error_picture(original, fitted, 255, tmp_path / "error.png")
    with Image.open(tmp_path / "error.png") as image:
        grey = np.asarray(image.convert("L"), dtype=float)
    assert min(grey.shape) >= 200
    left, right = (grey[100:400, start : start + 100].mean() for start in (60, 300))
    assert left < 20 and right > left + 100


def test_the_loss_picture_shows_the_losses(tmp_path):
    def drawn(losses):
        write_loss_curve(losses, tmp_path / "loss.png")
        with Image.open(tmp_path / "loss.png") as image:
            return np.asarray(image.convert("RGB"), dtype=int)

    falling, flat = drawn([0.1 / (1 + step) for step in range(300)]), drawn([0.1] * 299 + [0.1 / 300])
    assert min(falling.shape[:2]) >= 200

    def height_of_the_curve(picture):
        """Mean row of the bluish pixels of the middle columns."""
        blue = picture[:, 300:500, 2] - picture[:, 300:500, 0] > 60
        return np.nonzero(blue)[0].mean()

    assert height_of_the_curve(falling) > height_of_the_curve(flat) + 100


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
    assert report(tmp_path / "t")["ended"] == "reached" and report(tmp_path / "t")["psnr"] >= 12
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


# ---- bad input: exit status 2 and a sentence -------------------------------------------------------------------------


def expect_error(capsys, arguments: list, *words: str) -> None:
    capsys.readouterr()
    try:
        status = main([str(a) for a in arguments])
    except SystemExit as leave:  # argparse's own
        status = leave.code
    message = capsys.readouterr().err
    assert status == 2 and "Traceback" not in message
    assert all(word in message for word in words), message


def test_bad_pictures(tmp_path, capsys):
    def expect(name, *words):
        expect_error(capsys, ["fit", "image", tmp_path / name, "--out", tmp_path / "out"], name, *words)

    expect("none.png", "does not exist")
    expect("", "is a folder")
    (tmp_path / "text.png").write_text("not a picture")
    expect("text.png", "is not an image that Pillow can read")
    save(smooth(200, 200), tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    expect("cut.jpg", "cannot be read", "damaged")
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tif")
    expect("float.tif", "floating-point pixels")
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(tmp_path / "long.tif")
    expect("long.tif", "more than 16 bits")
    assert not (tmp_path / "out").exists()


def refusing(path: Path, method):
    """The method of Path, which says of that path what the system says where rights are missing."""

    def refuse(self, *arguments, **options):
        if self == path:
            raise PermissionError(13, "Permission denied")
        return method(self, *arguments, **options)

    return refuse


@pytest.mark.parametrize("command", ["image", "resume", "render"])
def test_paths_that_may_not_be_read(tmp_path, photo, capsys, monkeypatch, command):
    def arguments(path):
        if command == "render":
            return ["render", path, "--size", "4x4"]
        read = ["--resume", path] if command == "resume" else []
        return ["fit", "image", photo if read else path, "--out", tmp_path / "out", *read]

    expect_error(capsys, arguments(tmp_path / ("long" * 100)), "File name too long")
    path = tmp_path / "file"
    for name in ("stat", "open"):  # root may read anything: chmod would not do
        monkeypatch.setattr(Path, name, refusing(path, getattr(Path, name)))
    expect_error(capsys, arguments(path), "may not be read by you", "Permission denied")
    assert not (tmp_path / "out").exists()


def test_bad_output(tmp_path, photo, capsys, monkeypatch):
    expect_error(capsys, ["fit", "image", photo, "--out", photo], "output folder", "--out")
    expect_error(capsys, ["fit", "image", photo, "--out", photo / "below"], "output folder", "--out")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)  # root may write anywhere: chmod would not do
    expect_error(capsys, ["fit", "image", photo, "--out", tmp_path / "o"], "cannot be written", "Permission denied")


def test_bad_options(tmp_path, photo, capsys):
    base = ["fit", "image", photo, "--out", tmp_path / "out"]
    expect_error(capsys, [*base, "--steps", "3", "--seconds", "3"], "not allowed with")
    expect_error(capsys, [*base, "--steps", "0"], "at least 1")
    expect_error(capsys, [*base, "--seconds", "nan"], "positive number")
    expect_error(capsys, [*base, "--model", "magic"], "hash")
    expect_error(capsys, [*base, "--log2-size", "31"], "model cannot be built", "log2_hashmap_size")
    expect_error(capsys, [*base, "--device", "tpu"], "--device tpu")
    expect_error(capsys, [*base, "--device", "meta"], "use cpu or cuda")
    expect_error(capsys, [*base, "--device", "cuda:99"], "use --device cpu")
    expect_error(capsys, [*base, "--device", "cpu", "--backend", "cuda"], "'cuda' cannot run", "leave --backend out")
    expect_error(capsys, [*base, *SMALL, "--steps", "40", "--lr", "1e30"], "no longer finite", "lower --lr")
    expect_error(capsys, [*base, "--seed", str(1 << 63)], "below 2^63")
    expect_error(capsys, ["render", photo, "--size", "12"], "WIDTHxHEIGHT")
    expect_error(capsys, ["render", photo, "--size", "0x3"], "WIDTHxHEIGHT")


@pytest.mark.parametrize("module", ["PIL.Image", "tqdm", "matplotlib.figure", "scipy.ndimage"])
def test_missing_extras(tmp_path, photo, capsys, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.split(".")[0].replace("PIL", "Pillow")
    expect_error(capsys, ["fit", "image", photo, "--out", tmp_path / "out"], f"install it with: pip install {package}")


def test_bad_checkpoints(tmp_path, photo, fitted, capsys):
    good = (fitted / "checkpoint.pt").read_bytes()
    path = tmp_path / "c.pt"

    def expect(*words, **changes):
        if changes:
            save_checkpoint(path, load_checkpoint(fitted / "checkpoint.pt") | changes)
        for command in (
            ["render", path, "--size", "4x4"],
            ["fit", "image", photo, "--out", tmp_path / "o", "--resume", path],
        ):
            expect_error(capsys, command, "c.pt", *words)

    expect("does not exist", "checkpoint.pt")
    for content in (b"", b"PK nonsense", good[: len(good) // 2], good[:2000] + bytes(500) + good[2500:]):
        path.write_bytes(content)
        expect("is damaged")
    torch.save({"weights": torch.ones(3)}, path)
    expect("is not a camkernels checkpoint")
    torch.save(torch.nn.Linear(2, 2), path)  # needs code to load
    expect("is damaged or is no checkpoint", "does not hold tensors, numbers and strings alone")
    torch.save(load_checkpoint(fitted / "checkpoint.pt") | {"version": 99}, path)
    expect("format version 99")
    expect("rng missing or of the wrong type", rng=None)
    expect("is of model 'wave'", model="wave")
    config = load_checkpoint(fitted / "checkpoint.pt")["config"]
    expect("another architecture", config=config | {"width": 17})
    expect("another architecture", config=config | {"n_levels": 3})
    expect("another architecture", config=config | {"colour": 3})
    expect("of kind 'sound'", task={"kind": "sound"})
    task = load_checkpoint(fitted / "checkpoint.pt")["task"]
    save_checkpoint(path, load_checkpoint(fitted / "checkpoint.pt") | {"task": task | {"bits": 7}})
    expect_error(capsys, ["render", path, "--size", "4x4"], "c.pt is damaged", "7 bits")
    resume = ["fit", "image", fitted.parent / "photo.png", "--out", tmp_path / "o", "--resume", path]
    for changes in ({"training": {}}, {"optimizer": {}}, {"rng": torch.zeros(3)}):
        save_checkpoint(path, load_checkpoint(fitted / "checkpoint.pt") | changes)
        expect_error(capsys, resume, "c.pt is damaged")


def test_a_checkpoint_with_damaged_numbers(tmp_path, photo, fitted, capsys):
    path = tmp_path / "c.pt"
    path.write_bytes((fitted / "checkpoint.pt").read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        data = archive.read(largest)
    content = path.read_bytes()
    at = content.index(data) + len(data) // 2
    path.write_bytes(content[:at] + bytes(255 - byte for byte in content[at : at + 64]) + content[at + 64 :])
    assert torch.load(path, weights_only=True)["step"] == 12  # PyTorch sees nothing
    for command in (
        ["render", path, "--size", "4x4"],
        ["fit", "image", photo, "--out", tmp_path / "o", "--resume", path],
    ):
        expect_error(capsys, command, "c.pt is damaged", "check sum")
    assert not (tmp_path / "o").exists()


def test_what_no_memory_holds(tmp_path, photo, fitted, capsys):
    base = ["fit", "image", photo, "--out", tmp_path / "out", "--steps", "1"]
    expect_error(capsys, [*base, "--batch", str(10**14)], "not enough memory")
    expect_error(capsys, [*base, "--width", str(10**10)], "not enough memory")
    drawn = tmp_path / "drawn.png"
    size = f"{10**7}x{10**7}"
    expect_error(capsys, ["render", fitted / "checkpoint.pt", "--size", size, "--out", drawn], "not enough memory")
    assert not drawn.exists()


def test_an_error_that_is_no_users_keeps_its_traceback(monkeypatch, photo, tmp_path):
    def fail(*_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(image_module, "read_picture", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        main(["fit", "image", str(photo), "--out", str(tmp_path / "out")])


def test_resume_on_something_else(tmp_path, fitted, capsys):
    base = ["fit", "image", fitted.parent / "photo.png", "--out", tmp_path / "o", "--resume", fitted / "checkpoint.pt"]
    expect_error(capsys, [*base, "--levels", "5"], "another architecture", "n_levels is 4 there, 5 was asked for")
    expect_error(capsys, [*base, "--seed", "5"], "leave --seed out")
    for name, values in (("size", smooth(21)), ("channels", smooth(channels=1))):
        base[2] = save(values, tmp_path / "other.png")
        expect_error(capsys, base, name, "give the same picture")
    assert not (tmp_path / "o").exists()
