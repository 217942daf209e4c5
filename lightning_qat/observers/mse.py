"""The range that gives the least squared error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantParams, fake_quantize, group_view, qparams_from_range
from lightning_qat.core.scheme import Levels, QuantScheme


@dataclass(frozen=True)
class MSEObserver:
    """Shrink (or stretch) the min-max range of each group to where the squared error is least.

    The search is exhaustive over ``num_steps`` ratios; the min-max range itself is among the candidates, so
    the error is never above that of :class:`~lightning_qat.observers.MinMaxObserver`.

    Args:
        num_steps: Number of ratios tried.
        min_ratio: Smallest ratio of the min-max range.
        max_ratio: Largest ratio; above 1 it can bring the largest positive weight back inside the grid.
        refresh_every_n_steps: Optimizer steps between two searches during training. One search costs about
            ``num_steps`` fake quantizations, and weights move slowly.

    Source: the clipping search of GPTQ's reference quantizer (arXiv:2210.17323), with the squared error
    instead of the power 2.4, and weighted by ``importance`` where one is given (llm-compressor's
    "imatrix", after llama.cpp).
    """

    every_forward: ClassVar[bool] = False
    num_steps: int = 100
    min_ratio: float = 0.2
    max_ratio: float = 1.2
    refresh_every_n_steps: int = 100

    def __post_init__(self) -> None:
        """Validate the search."""
        if self.num_steps < 1 or not 0 < self.min_ratio <= self.max_ratio:
            raise ValueError(f"MSEObserver needs num_steps >= 1 and 0 < min_ratio <= max_ratio, got {self}.")

    @torch.no_grad()
    def __call__(
        self, weight: Tensor, scheme: QuantScheme, levels: Levels | None = None, importance: Tensor | None = None
    ) -> QuantParams:
        """Return the best grid for each group of ``weight`` ``[O, I]``, errors weighted by ``importance`` ``[I]``."""
        weight = weight.float()
        relevance = None if importance is None else group_view(importance.float().expand_as(weight), scheme)
        best, least = None, torch.tensor(torch.inf)
        for params in self._candidates(weight, scheme, levels):
            # Grouped after the error was taken: padding, which a grid without a zero cannot represent, has none.
            error = group_view(fake_quantize(weight, params, scheme, levels) - weight, scheme).square()
            error = (error if relevance is None else error * relevance).sum(-1)
            best = params if best is None else _choose(error < least, params, best)
            least = torch.minimum(error, least.to(error.device))
        assert best is not None
        return best

    def _candidates(self, weight: Tensor, scheme: QuantScheme, levels: Levels | None) -> Iterator[QuantParams]:
        minimum, maximum = torch.aminmax(group_view(weight, scheme), dim=-1)
        step = (self.max_ratio - self.min_ratio) / max(self.num_steps - 1, 1)
        for ratio in (1.0, *(self.min_ratio + index * step for index in range(self.num_steps))):
            yield qparams_from_range(minimum * ratio, maximum * ratio, scheme, levels)


def _choose(condition: Tensor, first: QuantParams, second: QuantParams) -> QuantParams:
    scale = torch.where(condition, first.scale, second.scale)
    if first.zero_point is None or second.zero_point is None:
        return QuantParams(scale)
    return QuantParams(scale, torch.where(condition, first.zero_point, second.zero_point))
