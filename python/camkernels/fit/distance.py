# SPDX-License-Identifier: MIT
"""Signed distance to a closed surface of triangles, exact, for many points at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..neighbors import NeighborIndex

_POINTS_AT_ONCE = 1 << 16
_SLACK = 1 + 1e-9  # of squared distances, for the rounding of a bound


class SignedDistance:
    """Distance of points to a closed surface, negative inside: vertices [V, 3], triangles [T, 3], counter-clockwise.

    The nearest triangle is searched in a tree of boxes, within the distance of the nearest vertex or midpoint of a
    triangle. The sign is that of the offset along the pseudonormal of the face, edge or vertex that is nearest: exact
    for a surface without holes, whose triangles do not cross and are oriented alike.

    Source: Baerentzen and Aanaes, "Signed Distance Computation Using the Angle Weighted Pseudonormal", 2005.

    >>> corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    >>> triangles = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    >>> SignedDistance(corners, triangles)(torch.tensor([[0.125, 0.25, 0.25], [-3.0, -4.0, 0.0]])).tolist()
    [-0.125, 5.0]
    """

    def __init__(self, vertices: Tensor, triangles: Tensor):
        vertices = vertices.double()
        order = _morton_order(vertices[triangles].mean(1))
        triangles = triangles[order]
        self.corners = vertices[triangles]
        self.normals = pseudonormals(vertices, triangles)
        self.boxes = _boxes(self.corners)
        self.landmarks = NeighborIndex(torch.cat([vertices[triangles.unique()], self.corners.mean(1)]))

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, 3] -> float64 [N]."""
        return torch.cat([self._distance(part) for part in x.double().split(_POINTS_AT_ONCE)])

    def _distance(self, x: Tensor) -> Tensor:
        point, triangle = self._candidates(x)
        nearest, feature = nearest_on_triangles(x[point], self.corners[triangle])
        offset = x[point] - nearest
        squares = offset.square().sum(-1)
        least = squares.new_full([len(x)], torch.inf).scatter_reduce_(0, point, squares, "amin")
        winners = (squares == least[point]).nonzero()[:, 0]
        winner = point.new_empty(len(x)).scatter_(0, point[winners], winners)
        along = (offset[winner] * self.normals[triangle[winner], feature[winner]]).sum(-1)
        return torch.where(along < 0, -least.sqrt(), least.sqrt())

    def _candidates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (point, triangle), all that can be a point's nearest triangle among them."""
        bound = self.landmarks.search(x, 1)[1][:, 0] * _SLACK
        point = torch.arange(len(x))
        node = torch.zeros_like(point)
        for low, high in self.boxes[1:]:
            point = point.repeat_interleave(2)
            node = (2 * node.unsqueeze(-1) + torch.arange(2)).flatten()
            outside = torch.maximum(low[node] - x[point], x[point] - high[node]).clamp(min=0)
            near = outside.square().sum(-1) <= bound[point]
            point, node = point[near], node[near]
        return point, node.clamp(max=len(self.corners) - 1)


def pseudonormals(vertices: Tensor, triangles: Tensor) -> Tensor:
    """[T, 7, 3]: of each triangle's face, of its edges from corner 0, 1 and 2, and of its corners; not of unit length.

    An edge has the sum of the normals of its faces, a vertex that sum weighted by the angles of the faces there.
    """
    corners = vertices[triangles]
    edges = corners.roll(-1, 1) - corners
    face = torch.nn.functional.normalize(torch.linalg.cross(edges[:, 0], edges[:, 1]), dim=-1)
    back = -edges.roll(1, 1)
    angles = torch.atan2(torch.linalg.cross(edges, back).norm(dim=-1), (edges * back).sum(-1))
    at_vertex = torch.zeros_like(vertices)
    at_vertex.index_add_(0, triangles.flatten(), (angles.unsqueeze(-1) * face.unsqueeze(1)).flatten(0, 1))
    ends = torch.stack([triangles, triangles.roll(-1, 1)], -1).sort(-1).values
    edge = (ends[..., 0] * len(vertices) + ends[..., 1]).unique(return_inverse=True)[1]
    at_edge = vertices.new_zeros(int(edge.max()) + 1, 3)
    at_edge.index_add_(0, edge.flatten(), face.repeat_interleave(3, 0))
    return torch.cat([face.unsqueeze(1), at_edge[edge], at_vertex[triangles]], 1)


def nearest_on_triangles(x: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
    """The points of triangles [N, 3, 3] nearest to x [N, 3], and where they lie: 0 face, 1 to 3 edge, 4 to 6 corner."""
    edges = corners.roll(-1, 1) - corners
    offsets = x.unsqueeze(1) - corners
    normal = torch.linalg.cross(edges[:, 0], edges[:, 1]).unsqueeze(1)
    inside = ((torch.linalg.cross(edges, offsets) * normal).sum(-1) >= 0).all(-1)
    area = (normal * normal).sum(-1)
    inside &= area[:, 0] > 0
    height = (offsets[:, 0] * normal[:, 0]).sum(-1, keepdim=True) / area.clamp(min=1e-300)
    on_face = x - height * normal[:, 0]

    tiny = torch.finfo(x.dtype).tiny
    along = ((offsets * edges).sum(-1) / (edges * edges).sum(-1).clamp(min=tiny)).clamp(0, 1)
    on_edges = corners + along.unsqueeze(-1) * edges
    edge = (x.unsqueeze(1) - on_edges).square().sum(-1).argmin(-1, keepdim=True)
    on_edge = on_edges.gather(1, edge.unsqueeze(-1).expand(-1, 1, 3))[:, 0]
    edge, along = edge[:, 0], along.gather(1, edge)[:, 0]
    feature = torch.where(along <= 0, 4 + edge, torch.where(along >= 1, 4 + (edge + 1) % 3, 1 + edge))
    return torch.where(inside.unsqueeze(-1), on_face, on_edge), torch.where(inside, 0, feature)


def _morton_order(points: Tensor) -> Tensor:
    """An order in which points that follow each other are near each other."""
    low, high = points.aminmax(dim=0)
    cells = ((points - low) / (high - low).clamp(min=1e-300) * 1023).long()
    code = sum(((cells >> bit & 1) << torch.tensor([3 * bit, 3 * bit + 1, 3 * bit + 2])).sum(-1) for bit in range(10))
    return code.argsort(stable=True)


def _boxes(corners: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(lowest, highest corner) of the nodes of a binary tree, level by level from the root; a leaf is a triangle."""
    low, high = corners.aminmax(dim=1)
    missing = (1 << (len(corners) - 1).bit_length()) - len(corners)
    low, high = (torch.cat([t, t[-1:].expand(missing, -1)]) for t in (low, high))
    levels = [(low, high)]
    while len(low) > 1:
        low, high = low.unflatten(0, (-1, 2)).amin(1), high.unflatten(0, (-1, 2)).amax(1)
        levels.append((low, high))
    return levels[::-1]
