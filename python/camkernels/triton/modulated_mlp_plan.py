# SPDX-License-Identifier: MIT
"""What a kernel of the modulated MLP is compiled for: sizes of its layers and chunks, and places in its memory."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import triton
import triton.language as tl

LEAST = 16  # of each size of a product


def padded(size: int) -> int:
    return max(LEAST, triton.next_power_of_2(size))


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for. Tuples have an item per linear layer."""

    features: int  # of x
    outs: tuple[int, ...]
    activations: tuple[int, ...]
    omegas: tuple[float, ...]
    skips: tuple[bool, ...]  # whether x is appended behind the layer
    hidden: int  # layers that are normalised and modulated
    channels: int  # of the modulation: 0 for none, 1 per layer, else per channel
    point_norm: bool
    eps: float
    number: tl.dtype
    precision: str  # of a product of two float32
    block: int
    chunk: int  # the widest
    in_memory: bool = False  # chunks pass through memory; else they stay in registers
    keeps: bool = False  # what passes through memory stays there, for gradients
    sums_modulation: bool = False  # its gradient is summed over the points of a tile
    group: tuple[int, int] | None = None  # x is encoded here: groups of so many features, padded to so many

    @property
    def layers(self) -> int:
        return len(self.outs)

    @property
    def takes_x(self) -> tuple[bool, ...]:
        return (True, *self.skips[:-1])

    @property
    def owns(self) -> tuple[int, ...]:
        """Features that a layer takes from the one before."""
        return (0, *self.outs[:-1])

    @property
    def ins(self) -> tuple[int, ...]:
        return tuple(own + self.features * takes for own, takes in zip(self.owns, self.takes_x, strict=True))

    @property
    def outputs(self) -> int:
        return self.outs[-1] + self.features * self.skips[-1]

    @property
    def chunks(self) -> tuple[int, ...]:
        """Width of a layer's chunks."""
        return tuple(min(self.chunk, padded(out)) for out in self.outs)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many chunks a layer has."""
        return tuple(triton.cdiv(out, chunk) for out, chunk in zip(self.outs, self.chunks, strict=True))

    @property
    def x_width(self) -> int:
        """Features of x with padding."""
        if self.group is None:
            return padded(self.features)
        used, wide = self.group
        return padded(self.features // used * wide)

    @property
    def x_group(self) -> tuple[int, int]:
        return self.group or (self.features, self.x_width)

    @property
    def x_chunk(self) -> int:
        return min(self.chunk, self.x_width) if self.group is None or self.in_memory else self.x_width

    @property
    def x_count(self) -> int:
        return triton.cdiv(self.x_width if self.group else self.features, self.x_chunk)

    # ---- what a tile leaves in memory --------------------------------------------------------------------------------

    @property
    def row_at(self) -> tuple[int, ...]:
        """Where a layer's chunks are left, then one over its deviations; last the size of the whole.

        Unless they are kept, results take the place of the layer's chunks, and a layer that of the last but one."""
        if self.keeps:
            return self._places([count + 1 for count in self._columns], 0)
        place = self.block * max(self._columns)
        return (*(layer % 2 * place for layer in range(self.layers)), 2 * place)

    @property
    def result_at(self) -> tuple[int, ...]:
        """Where the layers' results are left; then the size so far."""
        return self._places(self._columns, self.row_at[-1]) if self.keeps else self.row_at

    @property
    def gradient_at(self) -> tuple[int, ...]:
        """Where the gradients of W h + b are left, last that of x; then the size so far."""
        return self._places([*self._columns, self.x_count * self.x_chunk], self.result_at[-1])

    @property
    def features_at(self) -> int:
        """Where encoded features are left."""
        return (self.gradient_at if self.keeps else self.row_at)[-1]

    @property
    def _columns(self) -> list[int]:
        return [count * chunk for count, chunk in zip(self.counts, self.chunks, strict=True)]

    @property
    def size(self) -> int:
        """Numbers that a tile leaves; encoded features are the last."""
        return self.features_at + (self.block * self.x_width if self.group else 0)

    def _places(self, columns: list[int], start: int) -> tuple[int, ...]:
        return tuple(accumulate((self.block * count for count in columns), initial=start))

    @property
    def bias_at(self) -> tuple[int, ...]:
        """Where a layer's part of all biases begins; last their number."""
        return tuple(accumulate(self.outs, initial=0))

    @property
    def weight_at(self) -> tuple[int, ...]:
        """Where a layer's part of all weights begins; last their number."""
        return tuple(accumulate((out * count for out, count in zip(self.outs, self.ins, strict=True)), initial=0))

    @property
    def piece_at(self) -> tuple[int, ...]:
        """Where a layer's part of the pieces of all weights begins, a product of chunks each; last their number."""
        parts = [a + self.x_count * takes for a, takes in zip((0, *self.counts[:-1]), self.takes_x, strict=True)]
        return tuple(accumulate((a * count for a, count in zip(parts, self.counts, strict=True)), initial=0))

    @property
    def normalised(self) -> tuple[bool, ...]:
        return tuple(self.point_norm and layer < self.hidden for layer in range(self.layers))

    @property
    def x_later(self) -> tuple[bool, ...]:
        """Whether x is used behind a layer, too."""
        return tuple(any(self.skips[i:]) for i in range(self.layers))

    @property
    def needs_last(self) -> bool:
        """Whether the derivative needs the last layer's values."""
        return self.hidden == self.layers or self.activations[-1] != 0
