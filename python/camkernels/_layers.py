# SPDX-License-Identifier: MIT
"""What layers share: beside its parameters, a state_dict says in plain numbers what they are parameters of."""

from __future__ import annotations

from collections.abc import Callable
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
