# SPDX-License-Identifier: MIT
"""`fit shape`: meshes read and refused, exact distances, measures, the view, the whole job, resuming and Ctrl-C."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from camkernels.__main__ import main
from camkernels.fields import SHAPE_MODELS
from camkernels.fit import mesh as meshes
from camkernels.fit import shape
from camkernels.fit.checkpoint import load_checkpoint, save_checkpoint
from camkernels.fit.distance import SignedDistance
from camkernels.fit.picture import read_picture
from camkernels.fit.sphere_tracing import COLOR, draw_surface
from camkernels.fit.trainer import Trainer

for extra in ("PIL.Image", "tqdm", "matplotlib", "skimage.measure"):
    pytest.importorskip(extra)
trimesh = pytest.importorskip("trimesh")

DATA = Path(__file__).resolve().parents[1] / "bench" / "data"
SMALL = ["--levels", "3", "--finest", "20", "--width", "16", "--batch", "512"]
SMALL += ["--samples", "4000", "--resolution", "24"]
FILES = {"mesh.ply", "view.png", "loss.png", "checkpoint.pt", "report.json"}
CPU = torch.device("cpu")


def mesh_of(made) -> meshes.Mesh:
    return meshes.Mesh(torch.tensor(made.vertices), torch.tensor(made.faces, dtype=torch.int64))


class Ball(nn.Module):
    """The exact distance to a sphere about the middle of the unit cube."""

    def __init__(self, radius: float):
        super().__init__()
        self.radius = radius

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).norm(dim=-1, keepdim=True) - self.radius


# ---- samples, measures, surface, view --------------------------------------------------------------------------------


def test_samples_are_on_the_surface_near_it_and_anywhere():
    mesh, _ = meshes.place(mesh_of(trimesh.creation.icosphere(2)))
    distance = SignedDistance(mesh.vertices, mesh.triangles)
    x, distances = shape.draw_samples(mesh, distance, 8000, seed=0)
    assert torch.equal(distances, distance(x)) and x.min() >= 0 and x.max() <= 1
    shares = [(distances.abs() < reach).double().mean() for reach in (1e-9, 0.015, 0.15)]
    assert shares == pytest.approx([2 / 8, 5.5 / 8, 7.5 / 8], abs=0.05)
    again = shape.draw_samples(mesh, distance, 8000, seed=0)
    assert torch.equal(x, again[0]) and not torch.equal(x, shape.draw_samples(mesh, distance, 8000, seed=1)[0])


def test_measures_of_a_known_field(monkeypatch):
    monkeypatch.setattr(shape, "INSIDE_POINTS", 5000)
    mesh, _ = meshes.place(mesh_of(trimesh.creation.icosphere(3)))
    distance = SignedDistance(mesh.vertices, mesh.triangles)
    for share in (0.8, 0.9, 1.0):
        found = shape.intersection_over_union(Ball(share * meshes.RADIUS), mesh, distance, CPU)
        assert found == pytest.approx(share**3, abs=0.02)
    assert shape.normal_error(Ball(0.3), mesh, CPU) < 4  # of the facets
    turned = Ball(0.3)
    turned.forward = lambda x: -Ball.forward(turned, x)
    assert shape.normal_error(turned, mesh, CPU) > 176


def test_normals_are_of_the_whole_derivative():
    torch.manual_seed(0)
    options = {"kernels": 40, "n_levels": 2, "log2_hashmap_size": 8, "finest_resolution": 20, "width": 8}
    field = SHAPE_MODELS["neurbf"](**options).double()
    with torch.no_grad():
        field.basis.features.uniform_(-1, 1)
    x = torch.rand(20, 3, dtype=torch.float64)
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        near = field.nearest(x)  # the same kernels on both sides
        slope = torch.stack([(field(x + h, near) - field(x - h, near))[:, 0] / 2e-6 for h in step], -1)

    def found():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(field(leaf, near).sum(), leaf)[0]

    with shape.whole_derivatives(field):
        torch.testing.assert_close(found(), slope, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found(), slope, rtol=1e-2), "training takes the sum for a constant"


def test_extracted_surface_of_a_known_field():
    mesh = shape.extract_surface(Ball(0.3), 64, CPU)
    assert ((mesh.vertices - 0.5).norm(dim=-1) - 0.3).abs().max() < 1e-3
    assert meshes.volume(mesh) == pytest.approx(4 / 3 * math.pi * 0.3**3, rel=0.01)
    meshes._checked(Path("extracted"), mesh)  # watertight and outwards
    assert shape.extract_surface(Ball(-1.0), 16, CPU) is None and shape.extract_surface(Ball(5.0), 16, CPU) is not None


def test_far_blocks_are_not_evaluated():
    seen = []
    ball = Ball(0.3)
    ball.forward = lambda x: seen.append(len(x)) or Ball.forward(ball, x)
    shape.extract_surface(ball, 128, CPU)
    assert sum(seen) < 0.4 * 129**3


def test_view_of_a_known_field():
    picture = draw_surface(lambda x: Ball(0.35)(x)[:, 0], 90, 60, CPU)
    assert picture.shape == (60, 90, 3) and picture.dtype == np.uint8
    covered = (picture < 250).any(-1)
    row, column = np.nonzero(covered)
    assert abs(row.mean() - 29.5) < 0.5 and abs(column.mean() - 44.5) < 0.5  # in the middle, and round
    assert abs(np.ptp(row) - np.ptp(column)) <= 1
    silhouette = 0.35 / math.sqrt(1.7**2 - 0.35**2) * 3.2 * 30  # its radius in pixels
    assert covered.sum() == pytest.approx(math.pi * silhouette**2, rel=0.05)
    assert picture[20, 35].mean() > picture[45, 55].mean() + 20  # the light comes from the upper left
    assert picture[covered].max() < 255 and COLOR[2] > COLOR[0]
    assert (draw_surface(lambda x: x[:, 0] + 1, 8, 8, CPU) == 255).all()  # there is nothing to see


# ---- the job ---------------------------------------------------------------------------------------------------------


INSIDE_POINTS = shape.INSIDE_POINTS  # of a fit that nobody hurries


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """Views and measures of a size that costs nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shape, "PICTURE_SIZE", (24, 20))
        patch.setattr(shape, "INSIDE_POINTS", 2000)
        patch.setattr(shape, "SURFACE_POINTS", 500)
        yield


@pytest.fixture(scope="module")
def ball(tmp_path_factory) -> Path:
    """A ball of radius 3 about (10, 20, 30)."""
    path = tmp_path_factory.mktemp("mesh") / "ball.ply"
    made = trimesh.creation.icosphere(2, radius=3)
    made.apply_translation([10, 20, 30])
    made.export(path)
    return path


def fit(path: Path, out: Path, *arguments) -> int:
    stop = [] if "--steps" in arguments or "--resume" in arguments else ["--steps", "12"]
    small = [] if "--resume" in arguments else SMALL
    if "neurbf" in arguments:
        small = [*SMALL, "--kernels", "60"]
    return main(["fit", "shape", str(path), "--out", str(out), *small, *stop, *map(str, arguments)])


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


@pytest.mark.parametrize("model", SHAPE_MODELS)
def test_the_job(model, tmp_path, ball, capsys):
    assert fit(ball, tmp_path, "--model", model, "--steps", "400", "--lr", "0.002", "--samples", "20000") == 0
    found = report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert (found["model"], found["steps"], found["samples"], found["ended"]) == (model, 400, 20_000, "finished")
    field = SHAPE_MODELS[model](**found["config"])
    assert found["parameters"] == sum(p.numel() for p in field.parameters())
    assert found["iou"] > 0.95 and found["normal_error_degrees"] < 60
    assert f"IoU {found['iou']:.4f}" in capsys.readouterr().out
    written = trimesh.load_mesh(tmp_path / "mesh.ply")  # where the mesh was
    assert np.allclose(np.median(np.linalg.norm(written.vertices - [10, 20, 30], axis=-1)), 3, atol=0.1)
    assert found["mesh_triangles"] == len(written.faces)
    assert read_picture(tmp_path / "view.png").size == (24, 20)


@pytest.mark.parametrize("model", SHAPE_MODELS)
def test_same_seed_same_result(model, tmp_path, ball):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        before = torch.get_rng_state()
        assert fit(ball, tmp_path / name, "--model", model, "--seed", seed, "--steps", "4") == 0
        assert torch.equal(before, torch.get_rng_state())
    a, b, c = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in "abc")
    assert torch.equal(a["training"]["losses"], b["training"]["losses"])
    assert all(torch.equal(value, b["state"][name]) for name, value in a["state"].items() if torch.is_tensor(value))
    assert not torch.equal(a["training"]["losses"], c["training"]["losses"])


@pytest.mark.parametrize("model", SHAPE_MODELS)
def test_resume_continues_as_if_nothing_had_happened(model, tmp_path, ball, monkeypatch, capsys):
    assert fit(ball, tmp_path / "whole", "--model", model, "--steps", "20") == 0
    advance = Trainer.advance

    def interrupted(self):
        loss = advance(self)
        if self.step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(Trainer, "advance", interrupted)
    assert fit(ball, tmp_path / "part", "--model", model, "--steps", "20") == 130
    assert "stopped by Ctrl-C at step 7" in capsys.readouterr().out
    assert report(tmp_path / "part")["ended"] == "interrupted"
    monkeypatch.setattr(Trainer, "advance", advance)
    path = tmp_path / "part" / "checkpoint.pt"
    assert fit(ball, tmp_path / "part", "--resume", path, "--resolution", "24") == 0
    whole, part = (load_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "part"))
    assert part["step"] == whole["step"] == 20
    assert torch.equal(part["training"]["losses"], whole["training"]["losses"])
    assert all(torch.equal(value, part["state"][k]) for k, value in whole["state"].items() if torch.is_tensor(value))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, ball, small_pictures) -> Path:
    """The folder of a finished fit, made once; not to be written to."""
    folder = tmp_path_factory.mktemp("fitted")
    assert fit(ball, folder, "--steps", "60", "--lr", "0.01") == 0
    return folder


def test_render_draws_a_shape(tmp_path, fitted):
    out = tmp_path / "drawn.png"
    assert main(["render", str(fitted / "checkpoint.pt"), "--size", "24x20", "--out", str(out)]) == 0
    assert np.array_equal(read_picture(out).values, read_picture(fitted / "view.png").values)


def test_resume_of_something_else_is_refused(tmp_path, fitted, ball, capsys):
    def expect(words, *arguments):
        assert main([*map(str, arguments), "--out", str(tmp_path), "--resume", str(fitted / "checkpoint.pt")]) == 2
        assert words in capsys.readouterr().err

    trimesh.creation.icosphere(1).export(tmp_path / "other.ply")
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "p.png")
    expect("was fitted to a mesh of vertices 162, this one has 42", "fit", "shape", tmp_path / "other.ply")
    expect("mesh of samples 4000, this one has 5000", "fit", "shape", ball, "--samples", "5000")
    expect("model is 'hash' there, 'neurbf' was asked for", "fit", "shape", ball, "--model", "neurbf")
    expect("is a fit of kind 'shape', not of kind 'image'", "fit", "image", tmp_path / "p.png")


def test_resume_knows_the_mesh_by_its_content(tmp_path, fitted, ball, capsys):
    """The same counts, centre and scale are not enough, but all that a checkpoint of an earlier version has."""
    made = trimesh.load_mesh(ball)
    moved = made.vertices.copy()
    moved[(moved - [10, 20, 30]).min(1).argmax()] -= 0.1  # where the ball is not widest along any axis
    path, earlier = tmp_path / "dented.ply", tmp_path / "earlier.pt"
    trimesh.Trimesh(moved, made.faces, process=False).export(path)
    content = load_checkpoint(fitted / "checkpoint.pt")
    digest = content["task"].pop("digest")
    assert meshes.read_mesh(ball).digest() == digest != meshes.read_mesh(path).digest()
    assert fit(path, tmp_path, "--resume", fitted / "checkpoint.pt", "--steps", "61") == 2
    assert f"was fitted to a mesh of digest {digest}, this one has" in capsys.readouterr().err
    save_checkpoint(earlier, content)
    for mesh in (path, ball):
        assert fit(mesh, tmp_path, "--resume", earlier, "--steps", "61") == 0


def test_bad_options(tmp_path, ball, capsys):
    cases = {
        ("--kernels", "9"): "model hash has no kernels",
        ("--model", "neurbf", "--kernels", "9000"): "ask for fewer kernels or more --samples",
        ("--hidden", "0", "--model", "neurbf"): "hidden_layers",
    }
    for arguments, words in cases.items():
        assert main(["fit", "shape", str(ball), "--out", str(tmp_path), "--samples", "2000", *arguments]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("kernels", [1, 5])
def test_all_of_few_kernels_are_neighbors(kernels, tmp_path, ball):
    arguments = ["--model", "neurbf", "--steps", "2", "--samples", "2000", "--kernels", str(kernels)]
    assert main(["fit", "shape", str(ball), "--out", str(tmp_path), *SMALL, *arguments]) == 0
    config = report(tmp_path)["config"]
    assert (config["kernels"], config["neighbors"]) == (kernels, kernels)


@pytest.mark.parametrize("module, package", [("trimesh", "trimesh"), ("skimage.measure", "scikit-image")])
def test_a_missing_package_is_named(module, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["fit", "shape", str(DATA / "spot.ply"), "--out", str(tmp_path / "out")]) == 2
    assert f"pip install {package}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_field_without_a_surface_is_said(tmp_path, ball, capsys, monkeypatch):
    monkeypatch.setattr(shape, "extract_surface", lambda *_: None)
    assert fit(ball, tmp_path, "--steps", "1") == 0
    assert "nowhere 0" in capsys.readouterr().out and report(tmp_path)["mesh_triangles"] == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES - {"mesh.ply"}


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "model"), [("spot.ply", "neurbf"), ("knot.ply", "hash")])
def test_the_shipped_meshes_are_fitted_to_99_percent(mesh, model, tmp_path, monkeypatch):
    monkeypatch.setattr(shape, "INSIDE_POINTS", INSIDE_POINTS)  # of few, a single one decides
    assert main(["fit", "shape", str(DATA / mesh), "--out", str(tmp_path), "--model", model, "--quiet"]) == 0
    assert report(tmp_path)["iou"] >= 0.99
