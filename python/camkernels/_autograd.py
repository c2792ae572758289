# SPDX-License-Identifier: MIT
"""One pattern for every op: operators of the dispatcher, each the derivative of the last, wired to autograd twice.

Eager code and torch.func go through an `autograd.Function`, the only wiring that torch.func accepts and that refuses
forward-mode derivatives instead of returning zeros. Under torch.compile and torch.export the bare operator is called,
because a traced graph should hold operators; `register_autograd` differentiates it. Both call the same three operators:

    name                      (tensors, settings)                    -> outputs
    name_backward             (grads, tensors, settings, mask)       -> a gradient for each differentiable tensor
    name_backward_backward    (cotangents, grads, tensors, settings, mask) -> a gradient for each grad and such tensor

A gradient that its bool[] mask does not want is empty(0), of the dtype of its argument, or of the first argument where
that one is absent. A list of tensors ("Tensor[]") counts as one argument; its gradients are all or none, an unwanted
one and a cotangent that is absent are empty lists.

What name computes on its way may be kept for the derivatives: outputs of one axis that only they see, behind their
tensors. A call that torch.vmap folded differently finds them of another size, and computes them again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _ops

Flat = Sequence[Tensor | None]


class Argument(NamedTuple):
    """A tensor argument. points: its first axis runs over the points, so that vmap folds its own axis into it. apart:
    of an output, whether the kernels of the CPU read its cotangent where its rows lie apart, as those of a slice."""

    name: str
    type: str = "Tensor"  # or "Tensor?", "Tensor[]"
    points: bool = False
    differentiable: bool = True
    apart: bool = False

    @property
    def is_list(self) -> bool:
        return self.type == "Tensor[]"


class Operator:
    """An operator of the dispatcher and, in `next`, the one that computes its derivative."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[Argument],
        settings: str,
        outputs: Sequence[Argument],
        fake: Callable[..., Any],
        order: int = 0,
        kept: Sequence[Argument] = (),
    ):
        self.name, self.arguments, self.settings, self.outputs = name, tuple(arguments), settings, tuple(outputs)
        self.order, self.next = order, None
        self.first = 0  # the place of the first argument that is not a cotangent
        self.kept = tuple(k._replace(differentiable=False) for k in kept)
        self.saved = self.arguments + self.kept
        self.lists = tuple(i for i, a in enumerate(self.arguments) if a.is_list)  # their places
        self.differentiable = tuple(i for i, a in enumerate(self.arguments) if a.differentiable)
        self.apart = tuple(i for i, a in enumerate(self.arguments) if a.apart)
        self.returns_lists = any(o.is_list for o in self.outputs)
        declared = ", ".join([f"{a.type} {a.name}" for a in arguments] + [settings])
        results = ["Tensor[]" if o.is_list else "Tensor" for o in (*outputs, *kept)]
        returned = results[0] if len(results) == 1 else f"({', '.join(results)})"
        self.call = _ops.declare(f"{name}({declared}) -> {returned}", fake)
        torch.library.register_autograd(
            f"{_ops.NAMESPACE}::{name}", self._traced_backward, setup_context=self._traced_setup, lib=_ops.library
        )
        if order == 0:  # traced derivatives are taken of the folded call
            torch.library.register_vmap(f"{_ops.NAMESPACE}::{name}", self._traced_vmap, lib=_ops.library)

    def differentiate(self) -> Operator:
        """Declares the operator of the derivative."""
        cotangents = [
            Argument(f"grad_{o.name}", o.type if o.is_list else "Tensor?", o.points, apart=o.apart)
            for o in self.outputs
        ]
        if self.order == 0 and len(cotangents) == 1:  # nothing to compute without it
            cotangents = [cotangents[0]._replace(type="Tensor")]
        places = [len(cotangents) + i for i, a in enumerate(self.arguments) if a.differentiable]
        first = len(cotangents) + self.first

        def fake(*values: Any) -> Any:
            results = [_meta(values[i], wish, values[first]) for i, wish in zip(places, values[-1], strict=True)]
            return results[0] if len(results) == 1 else tuple(results)

        self.next = Operator(
            f"{self.name}_backward",
            [*cotangents, *self.saved],
            self.settings.removesuffix(", bool[] mask") + ", bool[] mask",
            [a for a in self.arguments if a.differentiable],
            fake,
            self.order + 1,
        )
        self.next.first = first
        return self.next

    # ---- calling ---------------------------------------------------------------------------------------------------

    def __call__(self, *tensors: Any, settings: tuple) -> Any:
        """A call, differentiable where anybody may ask for that; a "Tensor[]" argument is a list."""
        if torch.compiler.is_compiling():
            results = self.run(self.lengths(tensors), settings, self.flat(tensors))
        else:
            results = _apply(self, self.lengths(tensors), settings, self.flat(tensors))
        if not self.kept:
            return results
        found = results[: -len(self.kept)]
        return found[0] if len(self.outputs) == 1 else found

    def run(self, lengths: Sequence[int], settings: tuple, flat: Flat) -> Any:
        """Calls the operator itself."""
        dense = [t if t is None or (i in self.apart and _has_rows(t)) else t.contiguous() for i, t in enumerate(flat)]
        return self.call(*self.grouped(dense, lengths), *settings)

    def lengths(self, tensors: Sequence[Any]) -> tuple[int, ...]:
        """Those of the lists."""
        return tuple([len(tensors[i]) for i in self.lists])

    def flat(self, items: Sequence[Any]) -> Sequence[Any]:
        """One item per argument, of a list one per tensor -> all in a row."""
        return _flat(items) if self.lists else items

    def grouped(self, flat: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
        """Inverse of flat: one item per argument, a list for a "Tensor[]"."""
        items = list(flat)
        for i, length in zip(self.lists, lengths, strict=True):
            items[i : i + length] = [items[i : i + length]]
        return items

    # ---- differentiating -------------------------------------------------------------------------------------------

    def backpropagate(
        self, lengths: tuple, settings: tuple, grads: Flat, saved: Flat, needs: Sequence[bool], call: Callable
    ) -> list[Tensor | None]:
        """Gradients of the flat arguments, by call(operator, lengths, settings, arguments) of the next operator.

        saved: the arguments and what was kept."""
        if self.next is None:
            raise RuntimeError(
                f"{self.name.split('_backward')[0]}: no derivatives beyond {self.name} (second order of a value, first "
                "order of a Jacobian); use backend='reference' for more, or detach"
            )
        arguments, wanted = self.grouped(saved, lengths), self.grouped(needs, lengths)
        for i in self.lists:
            wanted[i] = any(wanted[i])
        mask = tuple([wanted[i] for i in self.differentiable])
        arrived = self._arrived(grads, settings, lengths, arguments)
        if arrived is None or not any(mask):
            return [None] * len(needs)
        plain = settings[:-1] if self.order > 0 else settings
        inputs = [*arrived, *arguments]
        results = call(self.next, self.next.lengths(inputs), (*plain, mask), self.next.flat(inputs))
        items = iter(results if isinstance(results, (tuple, list)) else [results])
        found = self.grouped([None] * len(needs), lengths)
        for i, wish in zip(self.differentiable, mask, strict=True):
            if i in self.lists:
                found[i] = [next(items) if wish else None for _ in arguments[i]]
            else:
                taken = next(items)  # also where it is not wanted
                found[i] = taken if wish else None
        return self.flat(found)

    def _arrived(self, grads: Flat, settings: tuple, lengths: tuple, arguments: list) -> list[Any] | None:
        """Cotangents of the outputs as the next operator takes them; None if there is none."""
        mask = settings[-1] if self.order > 0 else (True,) * len(self.outputs)
        if self.returns_lists:
            return self._arrived_lists(grads, mask, lengths, arguments)
        kept = [grad if wish else None for grad, wish in zip(grads, mask, strict=True)]
        return None if all(t is None for t in kept) else kept

    def _arrived_lists(self, grads: Flat, mask: tuple, lengths: tuple, arguments: list) -> list[Any] | None:
        """The same where some outputs are lists."""
        items, sizes = iter(grads), iter(lengths)
        kept: list[Any] = []
        for output, wish in zip(self.outputs, mask, strict=True):
            given = [next(items) for _ in range(next(sizes) * wish)] if output.is_list else next(items)
            kept.append(given if wish else None)
        if all(t is None for t in _flat(kept)):
            return None
        places = self.differentiable[-len(self.outputs) :]  # behind the grads
        for i, output in enumerate(self.outputs):
            if not output.is_list:
                continue
            given = kept[i] or []
            if all(g is None for g in given):
                kept[i] = []
            else:  # a list has no place for None
                pairs = zip(given, arguments[places[i]], strict=True)
                kept[i] = [torch.zeros_like(like) if g is None else g for g, like in pairs]
        return kept

    def _traced_setup(self, ctx: Any, inputs: tuple, output: Any) -> None:
        tensors, ctx.settings = inputs[: len(self.arguments)], inputs[len(self.arguments) :]
        ctx.lengths = self.lengths(tensors)
        ctx.save_for_backward(*self.flat(tensors), *self.kept_of(output))
        ctx.set_materialize_grads(False)

    def kept_of(self, results: Any) -> Sequence[Tensor]:
        """What is kept, of the flat outputs."""
        return results[-len(self.kept) :] if self.kept else ()

    def _traced_backward(self, ctx: Any, *grads: Any) -> tuple:
        def call(op: Operator, lengths: tuple, settings: tuple, flat: Flat) -> Any:
            results = op.run(lengths, settings, flat)
            return _flat(results) if isinstance(results, (tuple, list)) else results

        needs = _flat(ctx.needs_input_grad[: len(self.arguments)])
        grads = _flat(grads[: len(grads) - len(self.kept)])
        found = self.backpropagate(ctx.lengths, ctx.settings, grads, ctx.saved_tensors, needs, call)
        return (*self.grouped(found, ctx.lengths), *(None,) * len(ctx.settings))

    # ---- vmap ------------------------------------------------------------------------------------------------------

    def batched(
        self, batch: int, dims: Sequence[int | None], lengths: tuple, settings: tuple, flat: Flat, call: Callable
    ) -> Any:
        """(outputs, their batch axes) of a batch of calls, by call(operator, lengths, settings, flat)."""
        if self.can_fold(dims, lengths, settings):
            return self.fold(batch, dims, lengths, settings, flat, call)
        if self.order == 0:
            pairs = zip(self._flat_arguments(lengths), dims, strict=True)
            names = [a.name for a, d in pairs if d is not None and not a.points]
            raise RuntimeError(
                f"{self.name}: torch.vmap over {', '.join(sorted(set(names)))} is not supported, only over points; "
                "loop over the parameters, or use backend='reference'"
            )
        pairs = list(zip(flat, dims, strict=True))
        calls = [
            call(self, lengths, settings, [t if d is None else t.select(d, i) for t, d in pairs]) for i in range(batch)
        ]
        if isinstance(calls[0], tuple):
            return tuple(torch.stack(items) for items in zip(*calls, strict=True)), (0,) * len(calls[0])
        return torch.stack(calls), 0

    def fold(
        self, batch: int, dims: Sequence[int | None], lengths: tuple, settings: tuple, flat: Flat, call: Callable
    ) -> Any:
        """One call for a batch of calls that differ in the points only: (outputs, their batch axes)."""
        folded = []
        for tensor, dim, argument in zip(flat, dims, self._flat_arguments(lengths), strict=True):
            if tensor is not None and argument.points:
                tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(batch, *tensor.shape)
                tensor = tensor.flatten(0, 1)
            folded.append(tensor)
        results = call(self, lengths, settings, folded)
        results = results if isinstance(results, tuple) else (results,)
        split = [r.unflatten(0, (batch, r.shape[0] // batch)) if r.ndim > 1 else r for r in results]
        axes = tuple(0 if r.ndim > 1 else None for r in results)  # an unwanted gradient is empty(0)
        return (tuple(split), axes) if len(results) > 1 else (split[0], axes[0])

    def _traced_vmap(self, info: Any, in_dims: tuple, *inputs: Any) -> Any:
        count = len(self.arguments)
        tensors, dims = inputs[:count], _flat(in_dims[:count])
        lengths, flat = self.lengths(tensors), _flat(tensors)
        return self.batched(info.batch_size, dims, lengths, inputs[count:], flat, Operator.run)

    def _flat_arguments(self, lengths: tuple) -> list[Argument]:
        sizes = iter(lengths)
        return [a for a in self.arguments for _ in range(next(sizes) if a.is_list else 1)]

    def can_fold(self, dims: Sequence[int | None], lengths: tuple, settings: tuple) -> bool:
        arguments = self._flat_arguments(lengths)
        shared = all(d is None or a.points for d, a in zip(dims, arguments, strict=True))
        mask = settings[-1] if self.order > 0 else (True,) * len(self.outputs)
        return shared and all(o.points or not wish for o, wish in zip(self.outputs, mask, strict=True))


class _Call(Function):
    """Differentiable call of an Operator in eager code and under torch.func; the arguments flat, so of fixed arity."""

    @staticmethod
    def forward(op: Operator, lengths: tuple, settings: tuple, *flat: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # this Function is the autograd: 50 us less per call
            results = op.run(lengths, settings, flat)
        return tuple(_flat(results)) if isinstance(results, (tuple, list)) else results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.op, ctx.lengths, ctx.settings, *flat = inputs
        kept = ctx.op.kept_of(output)
        ctx.save_for_backward(*flat, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        needs, grads = ctx.needs_input_grad[3:], grads[: len(grads) - len(ctx.op.kept)]
        found = ctx.op.backpropagate(ctx.lengths, ctx.settings, grads, ctx.saved_tensors, needs, _apply)
        return (None, None, None, *found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, op: Operator, lengths: tuple, settings: tuple, *flat: Tensor | None) -> Any:
        return op.batched(info.batch_size, in_dims[3:], lengths, settings, flat, _apply)


# Function.apply asks for it at every call, which takes 100 us to find out anew.
_Call.forward.__signature__ = inspect.signature(_Call.forward)  # type: ignore[attr-defined]


def _apply(op: Operator, lengths: tuple, settings: tuple, flat: Flat) -> Any:
    """A call, differentiable where anybody may ask for that."""
    asked = torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    return (_Call.apply if asked else _Call.forward)(op, lengths, settings, *flat)


def _flat(items: Sequence[Any]) -> list[Any]:
    return [t for item in items for t in (item if isinstance(item, (list, tuple)) else (item,))]


def _has_rows(tensor: Tensor) -> bool:
    """Whether these are rows without gaps inside, on the CPU; not of a tensor that stands for others."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.ndim != 2:
        return False
    return tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1]


def _meta(value: Any, wish: bool, like: Tensor) -> Any:
    if isinstance(value, (list, tuple)):
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in value] if wish else []
    if not wish:
        return (like if value is None else value).new_empty(0)
    return torch.empty_like(value, memory_format=torch.contiguous_format)
