"""The range of all values that a layer was fed during calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantParams, qparams_from_range
from lightning_qat.core.scheme import Levels, QuantScheme


@dataclass(frozen=True)
class RunningMinMaxObserver:
    """Cover every value that was seen: nothing of the calibration batches is clipped.

    What it remembers is the smallest and the largest value, float32 ``[2]``.
    """

    def empty(self, device: torch.device | None = None) -> Tensor:
        """Return what is known before anything was seen."""
        return torch.tensor([torch.inf, -torch.inf], dtype=torch.float32, device=device)

    def collect(self, x: Tensor) -> Tensor:
        """Return the range of ``x``, of any shape and floating dtype, but not empty."""
        return torch.stack(torch.aminmax(x)).float()

    def merge(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the range of what both have seen."""
        return torch.stack([torch.minimum(first[0], second[0]), torch.maximum(first[1], second[1])])

    def update(self, seen: Tensor, batch: Tensor) -> Tensor:
        """Return the range of the earlier batches and this one."""
        return self.merge(seen, batch)

    def __call__(self, seen: Tensor, scheme: QuantScheme, levels: Levels | None = None) -> QuantParams:
        """Return the grid over the range, scale and zero-point ``[1, 1]``."""
        return qparams_from_range(seen[0].view(1, 1), seen[1].view(1, 1), scheme, levels)
