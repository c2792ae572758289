# SPDX-License-Identifier: MIT
"""What layers share: beside its parameters, a state_dict says in plain numbers what they are parameters of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class KeepsGeometry(nn.Module):
    """A layer whose extra state is its geometry. A subclass defines get_extra_state and set_extra_state, which refuses
    any other geometry; a state_dict without one is accepted."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A bare parameter, as other codes save it, has no geometry to compare with.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)


def as_frequencies(
    op: str, frequencies: Tensor | Sequence[float], dtype: torch.dtype | None = None, device: Any = None
) -> Tensor:
    """The frequencies [n] as a tensor of that dtype, None: of their own, at least float32.

    Raises TypeError unless they are real numbers, ValueError unless they have one axis.
    """
    own = frequencies.dtype if isinstance(frequencies, Tensor) else torch.float32
    try:
        given = frequencies if isinstance(frequencies, Tensor) else list(frequencies)
        found = torch.as_tensor(given, dtype=dtype or torch.promote_types(own, torch.float32), device=device)
    except (TypeError, ValueError):
        found = None
    if found is None or own.is_complex:
        raise TypeError(
            f"{op}: frequencies must be a tensor or a list of numbers, one per channel, got {frequencies!r}"
        )
    if found.ndim != 1:
        raise ValueError(f"{op}: frequencies must have one axis, a number per channel, got {list(found.shape)}")
    return found


class KeepsFrequencies(nn.Module):
    """A layer with a buffer of frequencies, or None, that is in float32 where the layer is converted to 16 bits: of
    rounded ones, phases of many radians would be others."""

    _frequency_buffer = "frequencies"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = getattr(self, self._frequency_buffer)
        super()._apply(fn, recurse)
        after = getattr(self, self._frequency_buffer)
        if before is not None and after.dtype in (torch.float16, torch.bfloat16):
            setattr(self, self._frequency_buffer, before.to(after.device, torch.float32))
        return self
