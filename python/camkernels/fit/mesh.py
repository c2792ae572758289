# SPDX-License-Identifier: MIT
"""Surfaces of triangles: read from a file and checked, put into the unit cube, sampled, written."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .errors import UserError, check_file, require

RADIUS = 0.495  # of the sphere about the middle of the unit cube that a mesh is scaled into


@dataclass(frozen=True)
class Mesh:
    """vertices float64 [V, 3], triangles int64 [T, 3], counter-clockwise from outside."""

    vertices: Tensor
    triangles: Tensor
    notes: tuple[str, ...] = ()  # what reading changed, for the user

    def describe(self) -> str:
        return f"{len(self.vertices):,} vertices, {len(self.triangles):,} triangles"

    def digest(self) -> str:
        """Of all vertices and triangles in their order, 32 hexadecimal digits."""
        content = hashlib.blake2b(digest_size=16)
        content.update(np.ascontiguousarray(self.vertices.numpy(), "<f8"))
        content.update(np.ascontiguousarray(self.triangles.numpy(), "<i8"))
        return content.hexdigest()


@dataclass(frozen=True)
class Placement:
    """Of a mesh in the unit cube: unit = (place - center) scale + 1/2."""

    center: tuple[float, float, float]
    scale: float

    def to_unit(self, places: Tensor) -> Tensor:
        """[..., 3] of the mesh's own coordinates -> of the unit cube."""
        return (places - places.new_tensor(self.center)) * self.scale + 0.5

    def from_unit(self, places: Tensor) -> Tensor:
        """[..., 3] of the unit cube -> of the mesh's own coordinates."""
        return (places - 0.5) / self.scale + places.new_tensor(self.center)


def read_mesh(path: str | Path) -> Mesh:
    """Reads a mesh file of any type that trimesh knows. UserError unless it is a closed surface that has an inside.

    Vertices at one place become one. Triangles that all face inwards are turned round, which `notes` then says.
    """
    trimesh = require("trimesh")
    path = Path(path)
    check_file(path, "a mesh file")
    try:
        loaded = trimesh.load_mesh(path, process=False)
        vertices = np.array(loaded.vertices, np.float64)
        triangles = np.array(getattr(loaded, "faces", ()), np.int64)
    except Exception as error:  # each of trimesh's readers fails in its own way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read as a mesh: {reason}; convert it to PLY, OBJ or STL") from error
    if not np.isfinite(vertices).all():
        raise UserError(f"{path} has vertices that are not finite; repair it first")
    if not len(triangles):
        raise UserError(f"{path} has no triangles; give a file with a surface in it")
    return _checked(path, _merged(vertices, triangles))


def _merged(vertices: np.ndarray, triangles: np.ndarray) -> Mesh:
    """Of the vertices of triangles, one for all at one place, to a hundred-millionth of the longest side."""
    used, corners = np.unique(triangles, return_inverse=True)
    vertices, triangles = vertices[used], corners.reshape(-1, 3)
    low = vertices.min(0)
    side = (vertices - low).max() or 1.0
    places = np.rint((vertices - low) / side * 1e8).astype(np.int64)
    _, first, number = np.unique(places, axis=0, return_index=True, return_inverse=True)
    return Mesh(torch.from_numpy(vertices[first]), torch.from_numpy(number.reshape(-1)[triangles]))


def _checked(path: Path, mesh: Mesh) -> Mesh:
    ends = torch.stack([mesh.triangles, mesh.triangles.roll(-1, 1)], -1).flatten(0, 1)
    counts = ends.sort(-1).values.unique(dim=0, return_counts=True)[1]
    odd = int((counts != 2).sum())
    if odd:
        raise UserError(
            f"{path} is not watertight: {odd:,} of its {len(counts):,} edges do not join two triangles, so that it has "
            "no inside; close it first, for example with MeshLab or trimesh.repair"
        )
    against = len(ends) - len(ends.unique(dim=0))
    if against:
        raise UserError(
            f"{path} has {against:,} edges between triangles that face opposite ways; orient them alike first, for "
            "example with MeshLab"
        )
    inside = volume(mesh)
    if abs(inside) < _least_volume(mesh):
        _check_cavities(path, mesh)
        raise UserError(f"{path} encloses no volume; give the mesh of a solid")
    if inside < 0:
        mesh = replace(mesh, triangles=mesh.triangles.flip(1), notes=("all triangles face inwards: they are turned",))
    _check_cavities(path, mesh)
    return mesh


def _least_volume(mesh: Mesh) -> float:
    """Below it a volume is one of rounding."""
    return 1e-9 * float(mesh.vertices.amax(0).sub(mesh.vertices.amin(0)).norm()) ** 3


def _check_cavities(path: Path, mesh: Mesh) -> None:
    """UserError where a part faces inwards and lies in no other part, whose cavity it could be."""
    part, shares = _parts(mesh), _volumes(mesh)
    inwards = shares.new_zeros(int(part.max()) + 1).index_add_(0, part, shares) < -_least_volume(mesh)
    for i in inwards.nonzero()[:, 0]:
        own, others = (mesh.triangles[chosen] for chosen in (part == i, part != i))
        if _windings(mesh.vertices[own[0, 0]], mesh.vertices[others]) < 0.5:
            raise UserError(
                f"{path} has a part of {len(own):,} triangles that face inwards, and it is in no other part; turn it "
                "round first, for example with MeshLab"
            )


def _windings(point: Tensor, corners: Tensor) -> float:
    """How often a closed surface of triangles [T, 3, 3] goes round a point [3]: the sum of their solid angles.

    Source: Van Oosterom and Strackee, "The Solid Angle of a Plane Triangle", 1983.
    """
    a, b, c = (corners - point).unbind(1)
    la, lb, lc = (t.norm(dim=-1) for t in (a, b, c))
    below = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return float(torch.atan2((a * torch.linalg.cross(b, c)).sum(-1), below).sum()) / (2 * math.pi)


def _parts(mesh: Mesh) -> Tensor:
    """[T] for each triangle, the number of the connected part that it belongs to."""
    sparse, graphs = require("scipy.sparse"), require("scipy.sparse.csgraph")
    count = len(mesh.vertices)
    begin, end = (mesh.triangles[:, list(corners)].flatten().numpy() for corners in ((0, 1), (1, 2)))
    links = sparse.coo_matrix((np.ones(len(begin), bool), (begin, end)), (count, count))
    number = graphs.connected_components(links, directed=False)[1]  # of vertices, those in no triangle too
    return torch.from_numpy(number)[mesh.triangles[:, 0]].unique(return_inverse=True)[1]


def volume(mesh: Mesh) -> float:
    """What the surface encloses, negative if its triangles face inwards."""
    return float(_volumes(mesh).sum())


def _volumes(mesh: Mesh) -> Tensor:
    """[T] what each triangle adds to the volume: the tetrahedron that it makes with the middle of the vertices."""
    a, b, c = (mesh.vertices - mesh.vertices.mean(0))[mesh.triangles].unbind(1)
    return (a * torch.linalg.cross(b, c)).sum(-1) / 6


def place(mesh: Mesh) -> tuple[Mesh, Placement]:
    """The mesh in the unit cube: the middle of its bounding box in the middle, its farthest vertex at RADIUS from it.

    Source: NeuRBF, which does so in the cube from -1 to 1, with 0.99.
    """
    low, high = mesh.vertices.aminmax(dim=0)
    center = (low + high) / 2
    placement = Placement(tuple(center.tolist()), RADIUS / float((mesh.vertices - center).norm(dim=-1).max()))
    return replace(mesh, vertices=placement.to_unit(mesh.vertices)), placement


def sample_surface(mesh: Mesh, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(points [count, 3], unit normals [count, 3]), uniform on the surface."""
    corners = mesh.vertices[mesh.triangles]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = normals.norm(dim=-1).cumsum(0)
    drawn = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    chosen = torch.searchsorted(areas, drawn[:, 0] * areas[-1]).clamp(max=len(areas) - 1)
    root = drawn[:, 1].sqrt()
    shares = torch.stack([1 - root, root * (1 - drawn[:, 2]), root * drawn[:, 2]], -1)
    points = (shares.unsqueeze(-1) * corners[chosen]).sum(1)
    return points, torch.nn.functional.normalize(normals[chosen], dim=-1)


def write_mesh(mesh: Mesh, path: Path) -> None:
    """Writes a PLY file."""
    made = require("trimesh").Trimesh(mesh.vertices.numpy(), mesh.triangles.numpy(), process=False)
    try:
        made.export(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}; free some space or choose another folder") from error
