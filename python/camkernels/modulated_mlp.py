# SPDX-License-Identifier: MIT
"""Modulated MLP: the function `modulated_mlp`, the layer `ModulatedMLP`, and the operators."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference, triton
from ._autograd import Argument, Operator
from ._backends import BACKENDS, Call, choose, define, round_to_autocast
from ._checks import check_choice, check_dtype, check_flag, check_floating, check_size
from ._gpu import allows_bfloat16, allows_tf32
from ._layers import KeepsFrequencies, as_frequencies
from ._modulation import (
    ACTIVATIONS,
    Activation,
    Omega,
    Plan,
    check_frequencies,
    check_list,
    check_mlp,
    compute_dtype,
    is_per_channel,
    per_group,
    plan_layers,
    widest_of,
)

__all__ = ["ModulatedMLP", "modulated_mlp"]

# ---- operators -------------------------------------------------------------------------------------------------------
# C: the dtype of hidden values, float64 where a tensor is, else float32. x [N, in] and modulation [M, hidden, 2] or
# [M, hidden, 2, width] are in C or the weights' dtype; M divides N, point i has row i // (N // M). weights [out, in],
# biases [out] each, or no item, of one dtype; frequencies [width] in C. Of each linear layer, the output layer last:
# the number of its activation (as csrc/math/activation.h), its omega, and whether x is appended behind it.
# tf32, bfloat16: products of float32 may be those of TF32, which is for GPUs, or of bfloat16, which is for the CPU.
# keep: the linear layers' results may be kept for the backward pass, in C: [N, out rounded up to PADDING] of each layer
# whose derivative needs them, one after the other; those of few inputs are left out. On other devices than the CPU
# nothing is kept.

PADDING = 16
KEPT_BYTES = 2 << 30  # values are kept up to this size, beyond it computed again; CAMKERNELS_RECOMPUTE=0|1 overrides

_TENSORS = (
    Argument("x", points=True),
    Argument("weights", "Tensor[]"),
    Argument("biases", "Tensor[]"),
    Argument("modulation", "Tensor?", points=True),
    Argument("frequencies", "Tensor?", differentiable=False),
)
_SETTINGS = (
    "int[] activations, float[] omegas, bool[] skips, bool output_layer, bool point_norm, float eps, bool tf32, "
    "bool bfloat16, bool keep, bool deterministic"
)


def _kept_values(x: Tensor, weights: Sequence[Tensor], activations: Sequence[int], output_layer: bool) -> int:
    """How many values a call keeps at most: as choose_kept in csrc/cpu/modulated_mlp_net.h."""
    needed = weights[: len(weights) - (output_layer and activations[-1] == 0)]
    sizes = [(w.shape[0] + PADDING - 1) // PADDING * PADDING for w in sorted(needed, key=lambda w: w.shape[1])]
    every, left_out = sum(sizes), 0
    for size in sizes:
        left_out += size * (4 * left_out < every)
    return x.shape[0] * (every - left_out)


def _meta(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], modulation: Tensor | None,
    frequencies: Tensor | None, *settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    activations, _, skips, output_layer, *_, keep, _ = settings
    width = weights[-1].shape[0] + (x.shape[1] if skips[-1] else 0)
    kept = _kept_values(x, weights, activations, output_layer) if keep else 0
    dtype = compute_dtype(x, modulation, frequencies, *weights)
    return weights[0].new_empty(x.shape[0], width), x.new_empty(kept, dtype=dtype)


def _declare(prefix: str) -> Operator:
    y, kept = Argument("y", points=True), Argument("hidden")
    op = Operator(f"{prefix}modulated_mlp", _TENSORS, _SETTINGS, [y], _meta, kept=[kept])
    op.differentiate().differentiate()
    return op


_COMPILED = _declare("")  # "cpu" and "cuda": the dispatcher tells them apart
_TRITON = _declare("triton_")
for _name, _module, _function in (
    ("", "modulated_mlp", "value"),
    ("_backward", "modulated_mlp", "backward"),
    ("_backward_backward", "second_order", "modulated_mlp_backward_backward"),
):
    triton.implement(f"triton_modulated_mlp{_name}", _module, _function)


def mlp_settings(plan: Plan) -> tuple:
    """All but keep and deterministic."""
    names, omegas = list(plan.activations), list(plan.omegas)
    if plan.output_layer:
        names, omegas = [*names, plan.output_activation], [*omegas, plan.output_omega]
    skips = [i in plan.skips for i in range(len(names))]
    numbers = [ACTIVATIONS.index(name) for name in names]
    return (numbers, omegas, skips, plan.output_layer, plan.norm == "point", plan.eps, allows_tf32(), allows_bfloat16())


def _keep(tensors: Sequence[Tensor | None], values: int, dtype: torch.dtype) -> bool:
    """Whether values of the forward pass are kept for the backward pass."""
    if tensors[0].device.type != "cpu" or not torch.is_grad_enabled():
        return False
    if torch.compiler.is_exporting():  # most programs infer, and none could be for any batch if its size decided
        return False
    if not any(t is not None and t.requires_grad for t in tensors):
        return False
    forced = os.environ.get("CAMKERNELS_RECOMPUTE")
    return values * dtype.itemsize <= KEPT_BYTES if forced not in ("0", "1") else forced == "0"


def prepare_modulation(
    dtype: torch.dtype, leading: torch.Size, weights: Sequence[Tensor], modulation: Tensor | None, plan: Plan
) -> tuple[Tensor | None, Tensor | None]:
    """Modulation and frequencies as the operators take them; dtype: of hidden values."""
    if modulation is not None:
        widths = [w.shape[0] for w in weights[: plan.hidden]]
        tail = 3 if is_per_channel("modulated_mlp", modulation, leading, widths) else 2
        modulation = per_group(modulation, leading, tail)
        modulation = modulation if modulation.dtype in (dtype, weights[0].dtype) else modulation.to(dtype)
    frequencies = plan.frequencies if "residual_sine" in plan.activations else None
    return modulation, None if frequencies is None else frequencies.to(dtype)


def _kernels(
    operator: Operator, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None,
    modulation: Tensor | None, plan: Plan,
) -> Tensor:  # fmt: skip
    """modulated_mlp by an operator."""
    dtype = compute_dtype(x, modulation, *weights)
    modulation, frequencies = prepare_modulation(dtype, x.shape[:-1], weights, modulation, plan)
    points = x.reshape(-1, x.shape[-1])
    points = points if x.dtype in (dtype, weights[0].dtype) else points.to(dtype)
    biases = list(biases or ())
    settings = mlp_settings(plan)
    values = _kept_values(points, weights, settings[0], plan.output_layer)
    keep = operator is _COMPILED and _keep([points, *weights, *biases, modulation], values, dtype)
    settings = (*settings, keep, torch.are_deterministic_algorithms_enabled())
    y = operator(points, list(weights), biases, modulation, frequencies, settings=settings)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# ---- functions -------------------------------------------------------------------------------------------------------


def modulated_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    modulation: Tensor | None = None,
    *,
    norm: str | None = None,
    eps: float = 1e-5,
    activation: Activation = "relu",
    output_activation: str | None = None,
    output_layer: bool = True,
    skips: Sequence[int] = (),
    omega: Omega = 1.0,
    frequencies: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """h <- act_i(gamma_i * norm(W_i h + b_i) + beta_i), then concat(h, x) if i is in skips, for every hidden layer i.

    x [..., in], weights [out, in] each, biases [out] each or None -> [..., out] in the weights' dtype, or autocast's
    where it is on. modulation [..., hidden, 2], or [..., hidden, 2, width] per channel: (gamma, beta) of the hidden
    layers, as `coordinate_modulation` gives them, its leading axes broadcast to x's. Exact definition:
    `camkernels.reference.modulated_mlp`.

    norm: None or "point", over the values of a point. activation: one name or None, or a list of one per hidden layer;
    names in `camkernels.reference.modulate`. output_layer: the last weight is a plain linear layer, with
    output_activation; False: it is a hidden layer too. omega: of "sine", a number or one per hidden layer. frequencies
    [width]: constants of "residual_sine". backend: "cpu", "cuda", "reference"; None takes the best.

    Hidden values are multiplied as exactly as float32 allows, unless PyTorch allows less when this function is called
    (`torch.set_float32_matmul_precision`, or the two settings below). All add in float32, float64 stays float64.
    GPU, `torch.backends.cuda.matmul.fp32_precision = "tf32"`: "cuda" rounds both factors to the 10 bits behind the
        leading one that TF32 has, "triton" cuts them.
    CPU with AVX512_BF16, `torch.backends.mkldnn.matmul.fp32_precision = "bf16"`: "cpu" rounds both factors of a layer's
        products, forward and in the gradients of its inputs and weights, to bfloat16, and multiplies them by the matrix
        unit where there is AMX, too; gradients of biases are exact.
    Derivatives do as their call did, and an exported program as at its export; torch.compile compiles again where
    `torch.set_float32_matmul_precision`, or the setting for GPUs, has changed. "reference", and "triton" in second
    derivatives, multiply by PyTorch, which asks for its setting at every product.

    First and second derivatives in x, weights, biases and modulation; call backward outside of autocast, as PyTorch
    advises: inside, the products of its own backward are rounded.
    Hidden values are float32, or float64 if a tensor is float64. On the CPU at most three quarters of those that the
    backward pass needs are kept up to 2 GiB per call, all are computed again beyond; the environment variable
    CAMKERNELS_RECOMPUTE=0|1 overrides that. A NaN in x or modulation makes the rows of its points NaN, one in a weight
    or bias of a hidden layer those of all points, of the output layer its column; nothing is hidden or clamped.
    Derivatives at values that are not finite differ between backends.

    Raises ValueError for shapes, values, mixed devices, TypeError for dtypes, RuntimeError where `backend` cannot run.

    Source: Lee et al., "Coordinate-Aware Modulation for Neural Fields", ICLR 2024.

    >>> weights = [torch.randn(16, 3), torch.randn(16, 16), torch.randn(1, 16)]
    >>> modulated_mlp(torch.rand(5, 3), weights, modulation=torch.rand(5, 2, 2), norm="point").shape
    torch.Size([5, 1])
    """
    op = "modulated_mlp"
    check_floating(op, "x", x)
    check_list(op, "weights", weights)
    options = {
        "norm": norm, "eps": eps, "activation": activation, "output_activation": output_activation,
        "output_layer": output_layer, "skips": skips, "omega": omega, "frequencies": frequencies,
    }  # fmt: skip
    chosen = choose(Call(op, x.device.type, x.device.index, widest_of(weights)), backend)
    if chosen == "reference":
        y = define(reference.modulated_mlp, x, weights, biases, modulation, **options)
    else:
        plan = plan_layers(op, len(weights), **options)
        check_mlp(op, x, weights, biases, modulation, plan)
        y = _kernels(_TRITON if chosen == "triton" else _COMPILED, x, weights, biases, modulation, plan)
    return round_to_autocast(y)


# ---- layers ----------------------------------------------------------------------------------------------------------


class ModulatedMLP(KeepsFrequencies):
    """MLP whose hidden layers take a scale and a shift: x [..., in_features] -> [..., out_features].

    hidden_layers layers of `width` features, then a linear layer; with output_layer=False the last hidden layer has
    out_features, and forward returns it (with x behind it if that layer is in skips). Parameters `layers.{i}.weight`
    and `layers.{i}.bias`, drawn as torch.nn.Linear draws them. The weights of a sine layer are drawn as SIREN's: from
    U(-1/in, 1/in) in the first layer, else U(-sqrt(6/in)/omega, sqrt(6/in)/omega).

    The other arguments, the forms of modulation, and the errors: `modulated_mlp`.

    >>> from camkernels import CoordinateModulation
    >>> mlp = ModulatedMLP(2, 3, width=32, hidden_layers=3, norm="point")
    >>> modulation = CoordinateModulation(hidden_layers=3)
    >>> coords = torch.rand(5, 2) * 2 - 1
    >>> mlp(coords, modulation(coords)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        width: int = 64,
        hidden_layers: int = 2,
        *,
        activation: Activation = "relu",
        output_activation: str | None = None,
        norm: str | None = None,
        bias: bool = True,
        output_layer: bool = True,
        skips: Sequence[int] = (),
        omega: Omega = 1.0,
        frequencies: Tensor | Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        op = "ModulatedMLP"
        for name, size in (("in_features", in_features), ("out_features", out_features), ("width", width)):
            check_size(op, name, size)
        check_flag(op, "bias", bias)
        check_flag(op, "output_layer", output_layer)
        check_size(op, "hidden_layers", hidden_layers, least=0 if output_layer else 1)
        check_dtype(op, "dtype", dtype)
        check_choice(op, "backend", backend, (None, *BACKENDS))
        self.options = {
            "activation": activation, "output_activation": output_activation, "norm": norm, "skips": skips,
            "output_layer": output_layer, "omega": omega,
        }  # fmt: skip
        self.plan = plan_layers(op, hidden_layers + output_layer, **self.options)
        self.options["skips"] = tuple(sorted(self.plan.skips))
        self.in_features, self.out_features, self.width = in_features, out_features, width
        self.backend = backend
        place = {"dtype": dtype, "device": torch.get_default_device() if device is None else device}
        self._frequencies = None
        if frequencies is not None:  # as they were given: a conversion of the layer rounds the buffer's
            self._frequencies = as_frequencies(op, frequencies, torch.float64, "cpu").tolist()
        wide = torch.promote_types(dtype, torch.float32)
        constants = None if frequencies is None else torch.tensor(self._frequencies, dtype=wide, device=place["device"])
        self.register_buffer("frequencies", constants, persistent=False)
        outs = [width] * hidden_layers + [out_features]
        outs = outs if output_layer else outs[1:]
        for out, name in zip(outs, self.plan.activations, strict=False):
            check_frequencies(op, constants, name, out)
        ins = [in_features] + [out + in_features * (i in self.plan.skips) for i, out in enumerate(outs)]
        shapes = zip(ins, outs, strict=False)
        self.layers = nn.ModuleList(nn.utils.skip_init(nn.Linear, *shape, bias=bias, **place) for shape in shapes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights and biases anew, in the order of the layers."""
        for layer in self.layers:
            layer.reset_parameters()
        for i, (name, omega) in enumerate(zip(self.plan.activations, self.plan.omegas, strict=True)):
            if name == "sine":
                fan_in = self.layers[i].in_features
                bound = 1 / fan_in if i == 0 else math.sqrt(6 / fan_in) / (abs(omega) or 1.0)
                nn.init.uniform_(self.layers[i].weight, -bound, bound)
        if self.frequencies is not None:
            self.frequencies.copy_(torch.tensor(self._frequencies))

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """x [..., in_features], modulation as in `modulated_mlp` -> [..., out_features]."""
        return modulated_mlp(x, modulation=modulation, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Those of `modulated_mlp`, but for x and modulation."""
        weights = [layer.weight for layer in self.layers]
        biases = None if self.layers[0].bias is None else [layer.bias for layer in self.layers]
        options = {**self.options, "frequencies": self.frequencies, "backend": self.backend}
        return {"weights": weights, "biases": biases} | options

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.in_features}, {self.out_features}, {options}"
