# SPDX-License-Identifier: MIT
"""The main job with every model: files, checkpoints, resuming, drawing, comparing; and the 1-D experiment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from camkernels.__main__ import main
from camkernels._backends import Call, choose
from camkernels.fields import MODELS, SHAPE_MODELS, CAMImageField
from camkernels.fields.image import pixel_centres
from camkernels.fit import signal
from camkernels.fit.checkpoint import load_checkpoint
from camkernels.fit.image import Pixels, modulation_maps
from camkernels.fit.picture import Picture, read_picture
from pictures import save, smooth

Image = pytest.importorskip("PIL.Image")
for extra in ("tqdm", "matplotlib", "scipy"):
    pytest.importorskip(extra)

HASH = ["--levels", "4", "--finest", "24", "--width", "16"]
SMALL = {
    "hash": HASH,
    "hash-cam": [*HASH, "--nodes", "6"],
    "cam": ["--width", "16", "--frequencies", "8", "--nodes", "6"],
    "fourier": ["--width", "16", "--frequencies", "8"],
    "neurbf": ["--kernels", "40", "--width", "16"],
}
FILES = {"reconstruction.png", "error.png", "loss.png", "checkpoint.pt", "report.json"}
MODULATED = {"hash-cam", "cam"}


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_small_steps():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    return save(smooth(), tmp_path_factory.mktemp("models") / "photo.png")


def fit(photo: Path, out: Path, model: str, *arguments: str) -> int:
    small = [] if "--resume" in arguments else ["--model", model, "--batch", "256", *SMALL[model]]
    return main(["fit", "image", str(photo), "--out", str(out), "--device", "cpu", *small, *map(str, arguments)])


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_fitted_saved_resumed_and_drawn(model, tmp_path, photo):
    assert fit(photo, tmp_path / "whole", model, "--steps", "60") == 0
    assert {path.name for path in (tmp_path / "whole").iterdir()} == FILES | (
        {"modulation.png"} if model in MODULATED else set()
    )
    found = report(tmp_path / "whole")
    assert found["model"] == model and found["lr"] == MODELS[model].learning_rate
    field = MODELS[model](**found["config"])
    assert found["parameters"] == sum(p.numel() for p in field.parameters())

    assert fit(photo, tmp_path / "half", model, "--steps", "25") == 0
    path = tmp_path / "half" / "checkpoint.pt"
    saved = load_checkpoint(path)
    saved["training"]["stop"]["steps"] = 60  # as if the run had been interrupted
    torch.save(saved, path)
    whole = load_checkpoint(tmp_path / "whole" / "checkpoint.pt")
    first = saved["training"]["losses"]
    assert fit(photo, tmp_path / "part", model, "--resume", path) == 0
    part = load_checkpoint(tmp_path / "part" / "checkpoint.pt")
    assert part["step"] == 60 and torch.equal(part["training"]["losses"][:25], first)
    assert part["training"]["losses"][-5:].mean() < first[:5].mean()

    out = tmp_path / "drawn.png"
    assert main(["render", str(tmp_path / "whole" / "checkpoint.pt"), "--size", "20x14", "--out", str(out)]) == 0
    assert np.array_equal(read_picture(out).values, read_picture(tmp_path / "whole" / "reconstruction.png").values)
    assert whole["config"] == part["config"]


def test_neurbf_has_as_many_parameters_as_asked_for(tmp_path, photo):
    arguments = [
        "--model",
        "neurbf",
        "--parameters",
        "9000",
        "--width",
        "16",
        "--batch",
        "64",
        "--steps",
        "2",
        "--quiet",
    ]
    assert main(["fit", "image", str(photo), "--out", str(tmp_path), "--device", "cpu", *arguments]) == 0
    found = report(tmp_path)
    assert 9000 - 38 < found["parameters"] <= 9000
    assert found["config"]["n_levels"] == 8 and found["config"]["feature_waves"] == [0.125, 64]


@pytest.mark.parametrize("model", ["hash-cam", "cam"])
def test_scale_and_shift_are_trained(model, tmp_path, photo):
    assert fit(photo, tmp_path, model, "--steps", "5") == 0
    gamma, beta = load_checkpoint(tmp_path / "checkpoint.pt")["state"]["modulation.grids"].unbind(1)
    assert (gamma != 1).all() and beta.any()


def test_maps_show_scale_and_shift_where_they_act():
    field = CAMImageField(width=4, num_frequencies=2, hidden_layers=2, nodes=3)
    with torch.no_grad():
        field.modulation.grids[1, 0, :, 2] = 3.0  # gamma of the second layer, at the right
        field.modulation.grids[0, 1, 0, :] = -1.0  # beta of the first, above
    maps = modulation_maps(field, 600, 300, torch.device("cpu"))
    assert maps.shape == (128, 256, 2, 2)
    assert np.allclose(maps[:, -1, 1, 0], 3, atol=0.02) and np.allclose(maps[:, :128, 1, 0], 1)
    assert np.allclose(maps[0, :, 0, 1], -1, atol=0.02) and np.allclose(maps[64:, :, 0, 1], 0)
    assert modulation_maps(field, 1, 4000, torch.device("cpu")).shape == (256, 1, 2, 2)


@pytest.mark.parametrize("model", MODELS)
def test_compare(model, tmp_path, photo, capsys):
    assert fit(photo, tmp_path, model, "--steps", "2", "--compare") == 0
    found = report(tmp_path)["compare"]
    plain = any(choose(Call(op, "cpu"), None) != "reference" for op in MODELS[model].ops)
    if model not in MODULATED and not plain:
        assert found is None
        return
    assert (found["plain_pytorch_step_seconds"] is not None) == plain == ("in plain PyTorch" in capsys.readouterr().out)
    assert (found["unmodulated_step_seconds"] is not None) == (model in MODULATED)
    assert (found["unmodulated_plain_pytorch_step_seconds"] is not None) == (model in MODULATED and plain)
    assert found["step_seconds"] > 0


@pytest.mark.parametrize(
    "model, options, words",
    [
        ("cam", ["--levels", "4"], "model cam has no n_levels; leave that option out (it has channels, width,"),
        ("fourier", ["--nodes", "4"], "model fourier has no nodes"),
        ("hash", ["--frequencies", "4"], "model hash has no num_frequencies"),
        ("hash", ["--parameters", "9000"], "model hash has no parameters"),
        ("neurbf", ["--parameters", "9000"], "kernels and parameters were both given"),
        ("hash-cam", ["--hidden", "0"], "the model cannot be built: CoordinateModulation: hidden_layers must be"),
        ("hash-cam", ["--backend", "triton"], "leave --backend out"),
    ],
)  # fmt: skip
def test_options_that_a_model_does_not_have(model, options, words, tmp_path, photo, capsys):
    assert fit(photo, tmp_path / "out", model, *options) == 2
    assert words in capsys.readouterr().err


def test_a_checkpoint_of_another_model(tmp_path, photo, capsys):
    assert fit(photo, tmp_path, "cam", "--steps", "1") == 0
    path = str(tmp_path / "checkpoint.pt")
    assert main(["fit", "image", str(photo), "--out", str(tmp_path), "--resume", path, "--model", "fourier"]) == 2
    assert "model is 'cam' there, 'fourier' was asked for" in capsys.readouterr().err


# ---- the one-dimensional experiment ----------------------------------------------------------------------------------


def test_signal_prints_a_row_for_each_network(capsys):
    before = torch.get_rng_state()
    assert main(["fit", "signal", "--steps", "2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [(name, count, published) for name, count, _, published, _ in rows] == [
        ("plain", "12,673", "4.97"), ("PE", "14,721", "3.34"), ("CAM", "13,185", "0.07"), ("PE+CAM", "15,233", "0.03")
    ]  # fmt: skip
    assert all(4 < float(row[2]) < 6 for row in rows)
    assert torch.equal(before, torch.get_rng_state())


def test_the_signal_is_a_sum_of_ten_sines():
    torch.manual_seed(1)
    x, y = signal.signal()
    spectrum = torch.fft.rfft(y[:-1, 0]).abs() * 2 / 199
    strong = spectrum > 0.9
    assert x.shape == y.shape == (200, 1) and strong.nonzero().flatten().tolist() == list(range(5, 51, 5))
    assert torch.allclose(spectrum[strong], torch.ones(10), atol=0.01) and (spectrum[~strong] < 0.02).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", signal.NETWORKS)
def test_the_published_table(name):
    modulated, encoded, published = signal.NETWORKS[name]
    error, _ = signal.fit_network(modulated, encoded, steps=1500)
    assert round(error, 2) == published


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (1024, 768), (4097, 31)])
def test_centres_of_pixels_are_rounded_once(size):
    width, height = size
    index = torch.arange(width * height)
    row, column = np.divmod(index.numpy(), width)
    wanted = np.stack([(column + 0.5) / width, (row + 0.5) / height], -1).astype(np.float32)
    assert np.array_equal(pixel_centres(index, width, height).numpy(), wanted)


@pytest.mark.parametrize("kernels", [0, 3])
def test_a_batch_holds_the_centres_values_and_kernels_of_its_pixels(kernels):
    class Field(torch.nn.Module):
        def forward(self, x, *neighbors):
            self.seen = x, *neighbors
            return x.new_zeros(len(x), 4)

    field = Field()
    if kernels:
        field.nearest = lambda x: (1000 * x[:, :1] + 10 * x[:, 1:] + torch.arange(kernels)).int()
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    pixels = Pixels(Picture(values), 256, torch.device("cpu"))
    pixels.prepare(field)
    loss = pixels.loss(field, torch.Generator().manual_seed(5))
    index = torch.randint(600, (256,), generator=torch.Generator().manual_seed(5))
    x = pixel_centres(index, 30, 20)
    wanted = (x, field.nearest(x)) if kernels else (x,)
    assert all(torch.equal(*pair) for pair in zip(field.seen, wanted, strict=True))
    assert torch.allclose(loss, (torch.from_numpy(values).reshape(-1, 4)[index] / 255).square().mean())


class OperatorNames(TorchDispatchMode):
    """Names of the operators that are called, below autograd."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.seen.add(str(function))
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("name", [*MODELS, "sdf-hash", "sdf-neurbf"])
def test_every_model_s_network_is_the_fused_one(name):
    kind = SHAPE_MODELS[name.removeprefix("sdf-")] if name.startswith("sdf-") else MODELS[name]
    field = kind()
    x = torch.rand(50, 3 if name.startswith("sdf-") else 2)
    with OperatorNames() as operators:
        field(x).sum().backward()
    assert {f"camkernels.{op}.default" for op in ("modulated_mlp", "modulated_mlp_backward")} <= operators.seen
    assert not {f"aten.{op}.default" for op in ("addmm", "relu", "native_layer_norm")} & operators.seen
