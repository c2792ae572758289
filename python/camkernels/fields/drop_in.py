# SPDX-License-Identifier: MIT
"""Replacements for classes of maincold2/CAM: same constructor, same forward, same state_dict, computed by our ops.

In the public file, replace `class FCLayer_aff(nn.Module): ...` by `from camkernels.fields.drop_in import FCLayer_aff`:

file                                                class               here
CAM_image.py                                        FCLayer_aff         FCLayer_aff
CAM_nerfacc/examples/radiance_fields/mlp.py         MLP                 CamMLP
CAM_ffnerv/model.py                                 TempMod             TempMod
CAM_mipnerf/internal/models.py (flax)               affine              camkernels.fields.RayModulation
CAM_1D/network.py, radiance_fields/mlp.py           SinusoidalEncoder   camkernels.fields.SinusoidalEncoder
CAM_image.py                                        RandFourierFeature  camkernels.fields.RandFourierFeature
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import coordinate_modulation, modulate, modulated_mlp
from .._checks import check_choice
from .quantization import quantize_tanh
from .radiance import skips_of

FUSED: dict[type, str | None] = {
    nn.Identity: None, nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.SiLU: "silu", nn.Tanh: "tanh"
}  # fmt: skip


def _initial_grid(*nodes: int, planes: bool = False) -> nn.Parameter:
    """gamma 1 and beta 0, beside each other as channels [1, 2, *nodes], or as planes [6, 1, *nodes]."""
    leading = (3, 1) if planes else (1, 1)
    return nn.Parameter(torch.cat([torch.ones(*leading, *nodes), torch.zeros(*leading, *nodes)], 0 if planes else 1))


class FCLayer_aff(nn.Module):
    """act(gamma(coord) norm(W x + b) + beta(coord)), norm over the values of a point, gamma and beta of a 32 x 32 grid.

    forward(input [B, N, in_features], coord [B, N, 1, 2] in [-1, 1]) -> [B, N, out_features], or coord [1, B N, 1, 2];
    the public class only works for B = 1.
    """

    def __init__(self, in_features: int, out_features: int, act: Callable[[Tensor], Tensor] | None = None):
        super().__init__()
        self.w = self.h = 32
        self.linear = nn.Linear(in_features, out_features)
        self.affine = _initial_grid(self.w, self.h)
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, input: Tensor, coord: Tensor) -> Tensor:
        modulation = coordinate_modulation(coord.reshape(*input.shape[:-1], 2), self.affine)
        weight, bias = self.linear.weight, self.linear.bias
        options = {"norm": "point", "activation": FUSED.get(type(self.act)), "output_layer": False}
        y = modulated_mlp(input, [weight], [bias], modulation, **options)
        return y if type(self.act) in FUSED else self.act(y)


class CamMLP(nn.Module):
    """Layers act(gamma_i(coord) (W_i h + b_i) + beta_i(coord)), the input again behind every skip_layer-th.

    The public `MLP`. coord_dim: 0 for no modulation, 1 for a line of 5 nodes, 2 for 10 x 3 nodes, 3 for products of
    three planes of 512 x 512, whose coordinates are detached and whose shift, starting at 0, never moves.
    forward(x [..., input_dim], coord [..., coord_dim] in [-1, 1] or None) -> [..., output_dim].
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int | None = None,
        net_depth: int = 8,
        net_width: int = 256,
        skip_layer: int | None = 4,
        hidden_init: Callable | None = nn.init.xavier_uniform_,
        hidden_activation: Callable[[Tensor], Tensor] | None = None,
        output_enabled: bool = True,
        output_init: Callable | None = nn.init.xavier_uniform_,
        output_activation: Callable[[Tensor], Tensor] | None = None,
        bias_enabled: bool = True,
        bias_init: Callable | None = nn.init.zeros_,
        coord_dim: int = 0,
    ):
        super().__init__()
        check_choice("CamMLP", "coord_dim", coord_dim, (0, 1, 2, 3))
        self.input_dim, self.net_depth, self.net_width, self.skip_layer = input_dim, net_depth, net_width, skip_layer
        self.hidden_init, self.output_init, self.bias_init = hidden_init, output_init, bias_init
        self.hidden_activation = nn.ReLU() if hidden_activation is None else hidden_activation
        self.output_activation = nn.Identity() if output_activation is None else output_activation
        self.output_enabled, self.bias_enabled, self.coord_dim = output_enabled, bias_enabled, coord_dim
        self.skips = skips_of(net_depth, skip_layer)
        widths = [input_dim] + [net_width + input_dim * (i in self.skips) for i in range(net_depth)]
        self.affines = nn.ParameterList(self._grid() for _ in range(net_depth if coord_dim else 0))
        self.hidden_layers = nn.ModuleList(nn.Linear(n, net_width, bias=bias_enabled) for n in widths[:-1])
        if output_enabled:
            self.output_layer = nn.Linear(widths[-1], output_dim, bias=bias_enabled)
        self.output_dim = output_dim if output_enabled else widths[-1]
        self.initialize()

    def _grid(self) -> nn.Parameter:
        if self.coord_dim == 3:
            return _initial_grid(512, 512, planes=True)
        return _initial_grid(*{1: (5, 1), 2: (10, 3)}[self.coord_dim])

    def initialize(self) -> None:
        """Draws weights and biases anew with the functions that the constructor was given."""
        outputs = [(self.output_layer, self.output_init)] if self.output_enabled else []
        for layer, init in [(layer, self.hidden_init) for layer in self.hidden_layers] + outputs:
            if init is not None:
                init(layer.weight)
            if self.bias_enabled and self.bias_init is not None:
                self.bias_init(layer.bias)

    def forward(self, x: Tensor, coord: Tensor | None = None) -> Tensor:
        if coord is not None and self.net_depth and not self.coord_dim:
            raise ValueError(
                f"CamMLP: coord must be None where coord_dim is 0, got {list(coord.shape)}; build the network with a "
                "coord_dim"
            )
        modulation = None if coord is None or not self.net_depth else self._modulation(coord)
        h = self._hidden(x, modulation) if self.net_depth else x
        if not self.output_enabled:
            return h
        return self.output_activation(_mlp(h, [self.output_layer], output_layer=True))

    def _modulation(self, coord: Tensor) -> Tensor:
        """[..., net_depth, 2]; layer by layer, because joining the planes would copy them in every step."""
        if self.coord_dim == 3:
            grids, coord = [a.unflatten(0, (1, 2, 3)).squeeze(3) for a in self.affines], coord.detach()
        else:
            grids = [a.squeeze(-1) if self.coord_dim == 1 else a for a in self.affines]
        options = {"padding": "zeros", "combine": "plane_product" if self.coord_dim == 3 else "single"}
        return torch.cat([coordinate_modulation(coord, grid, **options) for grid in grids], -2)

    def _hidden(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        act = self.hidden_activation
        if type(act) in FUSED:
            return _mlp(x, self.hidden_layers, modulation, activation=FUSED[type(act)], skips=self.skips)
        h = x
        for i, layer in enumerate(self.hidden_layers):
            h = act(_mlp(h, [layer], None if modulation is None else modulation[..., i : i + 1, :], activation=None))
            h = torch.cat([h, x], -1) if i in self.skips else h
        return h


def _mlp(x: Tensor, layers: Sequence[nn.Linear], modulation: Tensor | None = None, **options) -> Tensor:
    weights = [layer.weight for layer in layers]
    biases = None if layers[0].bias is None else [layer.bias for layer in layers]
    return modulated_mlp(x, weights, biases, modulation, **({"output_layer": False} | options))


class TempMod(nn.Module):
    """gamma_c(t) n + beta_c(t), n = x normalised over each frame and channel; gamma, beta of `mod_dim` times.

    TempMod(new_ngf=channels, mod_dim=..., wbit=bits); forward(x [B, C, H, W], [left, right, d_left, d_right]) with node
    numbers [B] and distances [B, 1, 1, 1] to them. A right node beyond the last, as the public code gives it at t = 1
    with a distance of 0 from the left one, is the last.
    """

    def __init__(self, *, new_ngf: int, mod_dim: int, wbit: int):
        super().__init__()
        shape = (mod_dim, new_ngf, 1, 1)
        self.mod_grid = nn.ParameterList([nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))])
        self.wbit = wbit

    def forward(self, x: Tensor, t_ind: Sequence[Tensor]) -> Tensor:
        left, right, d_left, d_right = t_ind
        right = right.clamp(max=len(self.mod_grid[0]) - 1)
        grids = [quantize_tanh(p, self.wbit) for p in self.mod_grid]
        gamma, beta = (d_right * grid[left] + d_left * grid[right] for grid in grids)
        return modulate(x, gamma, beta, norm="frame", activation=None)
