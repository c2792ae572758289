# SPDX-License-Identifier: MIT
"""Bad input of the main job: exit status 2 and a sentence."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from camkernels.__main__ import main
from camkernels.fit import image as image_module
from camkernels.fit.checkpoint import load_checkpoint, save_checkpoint
from fitting import SMALL, expect_error
from pictures import save, smooth

Image = pytest.importorskip("PIL.Image")
for extra in ("tqdm", "matplotlib", "scipy"):
    pytest.importorskip(extra)


def test_bad_pictures(tmp_path, capsys):
    def expect(name, *words):
        expect_error(capsys, ["fit", "image", tmp_path / name, "--out", tmp_path / "out"], name, *words)

    expect("none.png", "does not exist")
    expect("", "is a folder")
    os.mkfifo(tmp_path / "pipe.png")
    expect("pipe.png", "is a pipe")
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


def test_kernels_that_find_no_place_are_said(tmp_path, capsys):
    picture = save(np.random.default_rng(0).integers(256, size=(6, 5, 3), dtype=np.uint8), tmp_path / "small.png")
    arguments = ["--model", "neurbf", "--kernels", "31", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main(["fit", "image", str(picture), *arguments]) == 2
    assert "the kernels cannot be placed: " in capsys.readouterr().err
