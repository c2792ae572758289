# SPDX-License-Identifier: MIT
"""Meshes: exact signed distances, surfaces read, refused, placed and sampled."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from camkernels.__main__ import main
from camkernels.fit import mesh as meshes
from camkernels.fit.distance import SignedDistance
from camkernels.fit.errors import UserError

for extra in ("PIL.Image", "tqdm", "matplotlib", "skimage.measure"):
    pytest.importorskip(extra)
trimesh = pytest.importorskip("trimesh")

DATA = Path(__file__).resolve().parents[1] / "bench" / "data"
KNOT = DATA / "knot.ply"


def mesh_of(made) -> meshes.Mesh:
    return meshes.Mesh(torch.tensor(made.vertices), torch.tensor(made.faces, dtype=torch.int64))


def random_points(count: int, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(count, 3, generator=generator, dtype=torch.float64)


# ---- distances -------------------------------------------------------------------------------------------------------


def test_distance_to_a_box_is_its_formula():
    sides = (1.0, 2.0, 0.5)
    box = mesh_of(trimesh.creation.box(sides))
    x = random_points(3000, -2, 2)
    outside = x.abs() - torch.tensor(sides) / 2
    expected = outside.clamp(min=0).norm(dim=-1) + outside.amax(-1).clamp(max=0)
    assert torch.allclose(SignedDistance(box.vertices, box.triangles)(x), expected, rtol=0, atol=1e-14)


def winding_number(x: Tensor, corners: Tensor) -> Tensor:
    """How often the surface goes round x [N, 3], by the solid angles of its triangles [T, 3, 3]: 1 inside, 0 outside.

    Source: Van Oosterom and Strackee, "The Solid Angle of a Plane Triangle", 1983.
    """
    a, b, c = (corners - x[:, None, None]).unbind(2)
    la, lb, lc = (side.norm(dim=-1) for side in (a, b, c))
    volume = (a * torch.linalg.cross(b, c)).sum(-1)
    below = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return torch.atan2(volume, below).sum(-1) / (2 * math.pi)


def thin_spike() -> meshes.Mesh:
    """A pyramid twenty times as high as wide: beside its tip the nearest face alone tells nothing of the side."""
    base = [[-0.05, 0, -0.05], [0.05, 0, -0.05], [0.05, 0, 0.05], [-0.05, 0, 0.05]]
    vertices = torch.tensor([*base, [0.0, 2, 0.04]], dtype=torch.float64)
    return meshes.Mesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3], [1, 0, 4], [2, 1, 4], [3, 2, 4], [0, 3, 4]]))


@pytest.mark.parametrize(
    "mesh",
    [mesh_of(trimesh.creation.icosphere(2)), thin_spike(), mesh_of(trimesh.creation.torus(1.0, 0.3, 12, 8))],
    ids=["sphere", "spike", "torus"],
)
def test_distances_equal_those_to_all_triangles_and_the_winding_number(mesh):
    corners = mesh.vertices[mesh.triangles]
    near = meshes.sample_surface(mesh, 300, torch.Generator().manual_seed(1))[0]
    x = torch.cat([random_points(300, -1.5, 2.5), near + 0.05 * torch.randn(300, 3, dtype=torch.float64)])
    x = x[~torch.isclose(winding_number(x, corners), torch.tensor(0.5, dtype=torch.float64), atol=0.2)]
    found = SignedDistance(mesh.vertices, mesh.triangles)(x)
    assert torch.equal(found < 0, winding_number(x, corners) > 0.5)
    sampled = meshes.sample_surface(mesh, 20_000, torch.Generator().manual_seed(2))[0]
    coarse = torch.cdist(x, sampled).amin(-1)
    assert (found.abs() <= coarse + 1e-12).all() and (coarse - found.abs() < 0.05).all()


def test_distance_at_the_surface_itself_is_zero():
    mesh = mesh_of(trimesh.creation.icosphere(1))
    x = torch.cat([mesh.vertices, mesh.vertices[mesh.triangles].mean(1)])
    assert SignedDistance(mesh.vertices, mesh.triangles)(x).abs().max() < 1e-15


# ---- meshes ----------------------------------------------------------------------------------------------------------


def test_samples_of_a_surface_are_uniform_on_it():
    box = mesh_of(trimesh.creation.box((1, 2, 4)))
    x, normals = meshes.sample_surface(box, 40_000, torch.Generator().manual_seed(0))
    assert SignedDistance(box.vertices, box.triangles)(x).abs().max() < 1e-14
    areas = {0: 8.0, 1: 4.0, 2: 2.0}
    for axis, area in areas.items():
        share = (normals[:, axis].abs() > 0.5).double().mean()
        assert share == pytest.approx(area / 14, abs=0.01)
    assert ((x * normals).sum(-1) > 0).all()
    upper = (x[:, 2] > 1).double().mean()  # a quarter of the sides and one of the two ends
    assert upper == pytest.approx((12 / 4 + 1) / 14, abs=0.01)


def test_a_placed_mesh_fills_the_unit_cube_and_goes_back():
    mesh = mesh_of(trimesh.creation.box((10, 20, 5), transform=np.diag([1.0, 1, 1, 1]) + np.eye(4, k=3) * 100))
    placed, placement = meshes.place(mesh)
    assert (placed.vertices - 0.5).norm(dim=-1).max() == pytest.approx(meshes.RADIUS)
    assert torch.allclose(placed.vertices.amin(0) + placed.vertices.amax(0), torch.ones(3, dtype=torch.float64))
    assert torch.allclose(placement.from_unit(placed.vertices), mesh.vertices)


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".stl", ".off", ".glb"])
def test_file_types(tmp_path, suffix):
    trimesh.creation.icosphere(1).export(tmp_path / f"ball{suffix}")
    mesh = meshes.read_mesh(tmp_path / f"ball{suffix}")
    assert (len(mesh.vertices), len(mesh.triangles), mesh.notes) == (42, 80, ())  # STL repeats each vertex
    assert meshes.volume(mesh) == pytest.approx(trimesh.creation.icosphere(1).volume, rel=1e-5)


def test_parts_that_face_inwards_are_cavities_or_refused(tmp_path):
    ball, other = trimesh.creation.icosphere(2), trimesh.creation.icosphere(2)
    other.apply_scale(0.5)
    other.invert()
    trimesh.util.concatenate([ball, other]).export(tmp_path / "hollow.ply")
    mesh = meshes.read_mesh(tmp_path / "hollow.ply")
    assert meshes.volume(mesh) == pytest.approx(ball.volume * 7 / 8, rel=1e-5)
    pair = [other.copy() for _ in range(2)]  # each the nearest surface of the other
    for part, at in zip(pair, (5.0, 6.2), strict=True):
        part.apply_translation([at, 0, 0])
    trimesh.util.concatenate([ball, *pair]).export(tmp_path / "pair.ply")
    with pytest.raises(UserError, match=r"has a part of 320 triangles that face inwards"):
        meshes.read_mesh(tmp_path / "pair.ply")
    for size in (1.0, 2.0):  # of twice the size it encloses as much as the ball, with the other sign
        loose = other.copy()
        loose.apply_scale(size)
        loose.apply_translation([3, 0, 0])
        trimesh.util.concatenate([ball, loose]).export(tmp_path / "loose.ply")
        with pytest.raises(UserError, match=r"has a part of 320 triangles that face inwards.*turn it round first"):
            meshes.read_mesh(tmp_path / "loose.ply")


def test_what_is_in_no_triangle_or_has_no_volume_does_not_count(tmp_path):
    ball = trimesh.creation.icosphere(1)
    stray = trimesh.Trimesh([*ball.vertices, [100, 0, 0]], ball.faces, process=False)
    stray.export(tmp_path / "stray.ply")
    assert len(meshes.read_mesh(tmp_path / "stray.ply").vertices) == 42
    for seed in range(9):
        corners = np.random.default_rng(seed).normal(size=(3, 3)) + 4
        flat = trimesh.Trimesh(corners, [[0, 1, 2], [2, 1, 0]], process=False)
        trimesh.util.concatenate([ball, flat]).export(tmp_path / "flat.ply")
        assert len(meshes.read_mesh(tmp_path / "flat.ply").triangles) == 82


@pytest.mark.parametrize(("size", "place"), [(1e-12, 0.0), (1e12, 0.0), (1.0, 1e9)])
def test_vertices_at_one_place_are_one_at_any_size(size, place, tmp_path):
    box = trimesh.creation.box()
    corners = box.vertices[box.faces].reshape(-1, 3) * size + place  # each triangle has corners of its own
    rows = [*corners.tolist(), *([3, i, i + 1, i + 2] for i in range(0, 36, 3))]
    (tmp_path / "box.off").write_text("OFF\n36 12 0\n" + "\n".join(" ".join(map(repr, row)) for row in rows))
    mesh = meshes.read_mesh(tmp_path / "box.off")
    assert len(mesh.vertices) == 8 and meshes.volume(mesh) == pytest.approx(size**3, rel=1e-6)


def test_a_mesh_inside_out_is_turned_and_said(tmp_path):
    ball = trimesh.creation.icosphere(1)
    ball.invert()
    ball.export(tmp_path / "in.ply")
    mesh = meshes.read_mesh(tmp_path / "in.ply")
    assert meshes.volume(mesh) > 0 and "face inwards" in mesh.notes[0]


def broken_meshes() -> dict:
    """name: (vertices, triangles, words of the message)."""
    ball = trimesh.creation.icosphere(1)
    turned = ball.faces.copy()
    turned[3] = turned[3, ::-1]
    corner = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0.0]])
    both_sides = np.array([[0, 1, 2], [2, 1, 0]])
    nan = ball.vertices.copy()
    nan[7, 1] = np.nan
    return {
        "open": (ball.vertices, ball.faces[1:], ["not watertight", "3 of its 120 edges", "MeshLab"]),
        "turned": (ball.vertices, turned, ["3 edges", "opposite ways"]),
        "flat": (corner, both_sides, ["encloses no volume"]),
        "nan": (nan, ball.faces, ["not finite"]),
        "points": (ball.vertices, np.empty((0, 3), int), ["no triangles"]),
    }


@pytest.mark.parametrize("name", broken_meshes())
def test_broken_meshes_are_refused(name, tmp_path, capsys):
    vertices, triangles, words = broken_meshes()[name]
    rows = [" ".join(map(str, row)) for row in vertices] + [f"3 {' '.join(map(str, row))}" for row in triangles]
    head = ["ply", "format ascii 1.0", f"element vertex {len(vertices)}", *(f"property float {a}" for a in "xyz")]
    head += [f"element face {len(triangles)}", "property list uchar int vertex_indices", "end_header"]
    path = tmp_path / "broken.ply"
    path.write_text("\n".join([*head, *rows, ""]))
    assert main(["fit", "shape", str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "broken.ply" in message and all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


def test_unreadable_files_are_refused(tmp_path, capsys):
    (tmp_path / "text.ply").write_text("not a mesh")
    (tmp_path / "cut.glb").write_bytes(b"glTF\x02\x00")
    (tmp_path / "some.xyzzy").write_text("1 2 3")
    cases = {"none.obj": "does not exist", "": "is a folder", "text.ply": "cannot be read as a mesh"}
    cases |= {"cut.glb": "cannot be read as a mesh", "some.xyzzy": "cannot be read as a mesh"}
    for name, words in cases.items():
        assert main(["fit", "shape", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_knot_is_what_its_script_makes():
    spec = importlib.util.spec_from_file_location("knot", KNOT.with_suffix(".py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    vertices, triangles = script.knot()
    mesh = meshes.read_mesh(KNOT)
    assert mesh.notes == () and len(mesh.vertices) - 1.5 * len(mesh.triangles) + len(mesh.triangles) == 0  # of one hole
    assert np.allclose(mesh.vertices[mesh.triangles], vertices[triangles], atol=1e-6)


def test_spot_is_one_closed_symmetric_surface():
    mesh = meshes.read_mesh(DATA / "spot.ply")
    assert mesh.notes == () and (mesh.vertices.shape, mesh.triangles.shape) == ((2930, 3), (5856, 3))
    mirrored = mesh.vertices * mesh.vertices.new_tensor([-1.0, 1.0, 1.0])
    assert torch.cdist(mirrored, mesh.vertices).amin(1).max() < 1e-6
    corners = mesh.vertices[mesh.triangles]
    volume = torch.linalg.det(corners).sum() / 6
    assert volume.item() == pytest.approx(0.717887, abs=1e-5)  # above 0: the faces look outwards


def test_a_mesh_that_cannot_be_written_is_said(tmp_path):
    mesh = mesh_of(trimesh.creation.icosphere(1))
    with pytest.raises(UserError, match="cannot be written"):
        meshes.write_mesh(mesh, tmp_path / "none" / "mesh.ply")
