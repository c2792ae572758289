# SPDX-License-Identifier: MIT
"""The definitions of the modulated MLP family, put together as each public code does, give its recorded results."""

import math

import pytest
import torch
import torch.nn.functional as F

from camkernels import testing
from camkernels.reference import coordinate_modulation, modulate, modulated_mlp

NAMES = testing.golden_names("cam_") + testing.golden_names("mipnerf_")


class Tensors:
    """The arrays of a fixture in a dtype; those whose gradient was recorded are leaves."""

    def __init__(self, golden, dtype):
        self.golden, self.dtype = golden, dtype
        self.leaves = {
            key: golden.tensor(key, dtype).requires_grad_(f"g.{key}" in golden)
            for key in golden.arrays
            if key.startswith(("in.", "p.", "aux."))
        }

    def __getitem__(self, key):
        return self.leaves[key]

    def listed(self, pattern):
        """The tensors named by a pattern with {}, counted from 0, or the one that it names itself."""
        names = [pattern] if "{}" not in pattern else [pattern.format(i) for i in range(len(self.leaves))]
        return [self[name] for name in names if name in self.leaves]

    def layers(self, *patterns):
        """(weights, biases) of the layers named."""
        return tuple([t for p in patterns for t in self.listed(f"{p}.{kind}")] for kind in ("weight", "bias"))


def encode(x, degrees):
    """[x, sin(2^k x), sin(2^k x + pi/2)], frequency-major."""
    scaled = (x.unsqueeze(-2) * 2.0 ** torch.arange(*degrees, dtype=x.dtype).unsqueeze(-1)).flatten(-2)
    return torch.cat([x, torch.sin(torch.cat([scaled, scaled + math.pi / 2], -1))], -1)


# ---- one dimension, images -------------------------------------------------------------------------------------------


def cam_1d_model(t):
    x = t["in.x"]
    weights, biases = t.layers("p.net.{}", "p.net_last")
    grids = torch.cat(t.listed("p.affine.{}")).squeeze(-1)
    modulation = coordinate_modulation(2 * x - 1, grids, padding="zeros")
    degrees = t.golden.hyper["pe_degrees"]
    features = x if degrees is None else encode(x, degrees)
    return {"out.y": modulated_mlp(features, weights, biases, modulation, activation=None)}


def cam_image_layer(t):
    modulation = coordinate_modulation(2 * t["in.coord"] - 1, t["p.grid"])
    options = {"norm": "point", "output_layer": False}
    return {"out.y": modulated_mlp(t["in.x"], [t["p.weight"]], [t["p.bias"]], modulation, **options)}


def cam_image_model(t):
    coords, projection = t["in.coord"], t["aux.pos_enc.proj"]
    phase = coords @ (projection * t.golden.hyper["sigma"])
    weights, biases = t.layers("p.FC_{}.linear", "p.FC_final.linear")
    modulation = coordinate_modulation(2 * coords - 1, torch.cat(t.listed("p.FC_{}.affine")))
    features = torch.cat([phase.sin(), phase.cos()], -1)
    options = {"norm": "point", "output_activation": "sigmoid"}
    return {"out.y": modulated_mlp(features, weights, biases, modulation, **options)}


# ---- radiance fields -------------------------------------------------------------------------------------------------


def trunk(t, prefix, x, coords):
    """The trunk of the nerfacc variants."""
    hyper, grids = t.golden.hyper, t.listed(f"p.{prefix}affines.{{}}")
    depth, skip = hyper["net_depth"], hyper["skip_layer"]
    if hyper["coord_dim"] == 3:  # gamma planes, then beta planes; the lookup is detached
        nodes = torch.stack(grids).squeeze(2).unflatten(1, (2, 3))
        modulation = coordinate_modulation(coords.detach(), nodes, padding="zeros", combine="plane_product")
    else:
        nodes = torch.cat(grids)
        nodes = nodes.squeeze(-1) if hyper["coord_dim"] == 1 else nodes
        modulation = coordinate_modulation(coords, nodes, padding="zeros")
    skips = range(skip, depth, skip)
    return modulated_mlp(x, *t.layers(f"p.{prefix}hidden_layers.{{}}"), modulation, skips=skips, output_layer=False)


def cam_nerf_trunk(t):
    return {"out.y": trunk(t, "", t["in.x"], t["in.coord"])}


def cam_nerf_field(t):
    hyper, x = t.golden.hyper, t["in.x"]
    coords = x * (2 / 3) if hyper["coord_dim"] == 3 else 2 * t["in.t"] - 1
    h = trunk(t, "mlp.base.", encode(x, hyper["pe_pos"]), coords)
    bottleneck = modulated_mlp(h, *t.layers("p.mlp.bottleneck_layer.output_layer"))
    view = torch.cat([bottleneck, encode(t["in.dir"], hyper["pe_view"])], -1)
    layers = t.layers("p.mlp.rgb_layer.hidden_layers.{}", "p.mlp.rgb_layer.output_layer")
    sigma = modulated_mlp(h, *t.layers("p.mlp.sigma_layer.output_layer"), output_activation="relu")
    return {"out.rgb": modulated_mlp(view, *layers, output_activation="sigmoid"), "out.sigma": sigma}


def quantized(p, bits):
    """Symmetric per tensor, half to even, straight through to the raw value."""
    if bits == 32:
        return p
    scale, n = p.detach().abs().amax().clamp_min(1e-6), 2.0 ** (bits - 1) - 1
    return p + (torch.round((p / scale).abs() * n) / n * scale * torch.sign(p) - p).detach()


def of_directions(directions, gammas, betas):
    """(gamma, beta) of each ray, [..., layers, 2]: azimuth along the first axis of the grids, elevation the second."""
    x, y, z = directions.unbind(-1)
    azimuth = torch.atan2(y, x) / math.pi / 2 + 0.5
    elevation = torch.atan2(z, torch.sqrt(x * x + y * y)) * (-2 / math.pi)
    grids = torch.stack([torch.stack(gammas), torch.stack(betas)], 1)
    return coordinate_modulation(torch.stack([elevation, azimuth], -1) * 2 - 1, grids)


def mipnerf_affine(t):
    bits = t.golden.hyper["bits"]
    gammas, betas = ([quantized(t[f"p.{name}"], bits)] for name in ("gamma", "beta"))
    gamma, beta = of_directions(t["in.viewdirs"], gammas, betas)[:, 0, :, None, None].unbind(1)
    y = modulate(t["in.x"], gamma, beta, norm="ray", eps=t.golden.hyper["eps"], activation=None)
    return {"out.y": y}


def mipnerf_mlp(t):
    def dense(h, i):
        return F.linear(h, t[f"p.Dense_Q_{i}.kernel"].t(), t[f"p.Dense_Q_{i}.bias"])

    gammas, betas = (t.listed(f"p.affine_{{}}.{name}") for name in ("gamma", "beta"))
    modulation = of_directions(t["in.viewdirs"], gammas, betas)
    h = t["in.x"]
    for i in range(len(gammas)):
        gamma, beta = modulation[:, i, :, None, None].unbind(1)
        h = modulate(dense(h, i), gamma, beta, norm="ray", eps=1e-6)
        h = torch.cat([h, t["in.x"]], -1) if i % t.golden.hyper["skip_layer"] == 0 and i > 0 else h
    condition = t["in.condition"].unsqueeze(1).expand(-1, h.shape[1], -1)
    view = F.relu(dense(torch.cat([dense(h, 9), condition], -1), 10))
    return {"out.raw_density": dense(h, 8), "out.raw_rgb": dense(view, 11)}


# ---- video -----------------------------------------------------------------------------------------------------------


def of_time(times, gamma, beta, bits=32):
    """gamma and beta [N, C, 1, 1] of frames, from grids [T, C, 1, 1]."""
    grids = torch.stack([gamma, beta])[..., 0, 0]
    if bits != 32:
        n, w = 2.0 ** (bits - 1) - 1, torch.tanh(grids)
        grids = w + (torch.floor(w.abs() * n) / n * torch.sign(w) - w).detach()
    found = coordinate_modulation(2 * times.unsqueeze(-1) - 1, grids.transpose(1, 2).unsqueeze(0))
    return found[:, 0, :, :, None, None].unbind(1)


def cam_video_tempmod(t):
    gamma, beta = of_time(t["in.t"], t["p.gamma"], t["p.beta"], t.golden.hyper["bits"])
    return {"out.y": modulate(t["in.h"], gamma, beta, norm="frame", activation=None)}


def latent(grid, times):
    """Node i at t = i/T, the last one held."""
    index = times * len(grid)
    left = torch.floor(index + 1e-6).long()
    share = (index - left).reshape(-1, 1, 1, 1)
    return (1 - share) * grid[left] + share * grid[(left + 1).clamp(max=len(grid) - 1)]


def cam_video_generator(t):
    times, hyper = t["in.t"], t.golden.hyper
    h = torch.cat([latent(grid, times) for grid in t.listed("p.video_grid.{}")], 1)
    heads = []
    for i, stride in enumerate(hyper["stride_list"]):
        h = F.conv2d(h, *(t[f"p.layers.{i}.conv.conv1.{kind}"] for kind in ("weight", "bias")), padding=1)
        gamma, beta = of_time(times, *(t[f"p.layers.{i}.norm.mod_grid.{k}"] for k in (0, 1)))
        h = modulate(F.pixel_shuffle(h, stride), gamma, beta, norm="frame", activation="gelu")
        if f"p.head_layers.{i}.weight" in t.leaves:
            heads.append(F.conv2d(h, *(t[f"p.head_layers.{i}.{kind}"] for kind in ("weight", "bias"))))
    first, last = heads
    return {"out.head0": first, "out.head1": torch.cat([(torch.tanh(last[:, :3]) + 1) / 2, last[:, 3:]], 1)}


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, dtype):
    assert len(NAMES) == 18
    tensors = Tensors(golden := testing.load_golden(name), dtype)
    outputs = globals()[golden.meta["op"]](tensors)
    assert set(outputs) == {key for key in golden.arrays if key.startswith("out.")}
    leaves = {key: leaf for key, leaf in tensors.leaves.items() if leaf.requires_grad}
    assert {f"g.{key}" for key in leaves} == {key for key in golden.arrays if key.startswith("g.")} and leaves
    cotangents = [golden.tensor(key.replace("out.", "ct."), dtype) for key in outputs]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), cotangents)
    found = outputs | {f"g.{key}": grad for key, grad in zip(leaves, gradients, strict=True)}
    for key, result in found.items():
        assert result.dtype == dtype
        testing.assert_close_golden(result, golden, key, dtype)
