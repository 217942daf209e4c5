"""The range from the smallest to the largest weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantParams, group_view, qparams_from_range
from lightning_qat.core.scheme import Levels, QuantScheme


@dataclass(frozen=True)
class MinMaxObserver:
    """Cover every weight: nothing is clipped beyond half a step."""

    every_forward: ClassVar[bool] = True
    refresh_every_n_steps: ClassVar[int] = 1

    @torch.no_grad()
    def __call__(
        self, weight: Tensor, scheme: QuantScheme, levels: Levels | None = None, importance: Tensor | None = None
    ) -> QuantParams:
        """Return the grid over the range of each group of ``weight`` ``[O, I]``; ``importance`` has no effect."""
        minimum, maximum = torch.aminmax(group_view(weight, scheme), dim=-1)
        return qparams_from_range(minimum, maximum, scheme, levels)
