"""The range that gives the least squared error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantParams, group_view, nearest_steps, qparams_from_range
from lightning_qat.core.scheme import Levels, QuantScheme

_CHUNK = 2**18
"""Weights times candidates that are handled at once: few calls for small layers, little memory for large ones."""


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
        """Return the best grid for each group of ``weight`` ``[O, I]``, errors weighted by ``importance``."""
        grouped = group_view(weight.float(), scheme)
        relevance = _relevance(weight, scheme, importance)
        minimum, maximum = torch.aminmax(grouped, dim=-1)
        best, least = None, None
        for ratios in torch.split(self._ratios(weight.device), max(1, _CHUNK // grouped.numel())):
            ratios = ratios[:, None, None]
            candidates = qparams_from_range(minimum * ratios, maximum * ratios, scheme, levels)
            errors = _errors(grouped, candidates, levels or scheme.levels(), relevance)
            error, index = _first_minimum(errors)
            found = _pick(candidates, index)
            best = found if best is None or least is None else _choose(error < least, found, best)
            least = error if least is None else torch.minimum(error, least)
        assert best is not None
        return best

    def _ratios(self, device: torch.device) -> Tensor:
        """Return the ratios tried: 1 first, which a tie leaves in place."""
        step = (self.max_ratio - self.min_ratio) / max(self.num_steps - 1, 1)
        ratios = [1.0, *(self.min_ratio + index * step for index in range(self.num_steps))]
        return torch.tensor(ratios, dtype=torch.float32, device=device)


def _relevance(weight: Tensor, scheme: QuantScheme, importance: Tensor | None) -> Tensor | None:
    """Return what each squared error counts, ``[O, G, g]``: padding, which a grid may not represent, nothing."""
    is_padded = scheme.group_size is not None and weight.shape[1] % scheme.group_size != 0
    if importance is None and not is_padded:
        return None
    importance = torch.ones_like(weight, dtype=torch.float32) if importance is None else importance.float()
    return group_view(importance.expand(weight.shape), scheme)


def _errors(grouped: Tensor, params: QuantParams, levels: Levels, relevance: Tensor | None) -> Tensor:
    """Return the squared error of each candidate and group, ``[C, O, G]``."""
    scale = params.scale.unsqueeze(-1)
    zero_point = 0.0 if params.zero_point is None else params.zero_point.unsqueeze(-1)
    error = nearest_steps(grouped, scale, zero_point, levels).add_(levels.zero_offset).mul_(scale).sub_(grouped)
    return (error.square_() if relevance is None else error.square_().mul_(relevance)).sum(-1)


def _first_minimum(errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least of ``errors`` ``[C, O, G]`` and where it first occurs, ``[1, O, G]``."""
    index = errors.argmin(0, keepdim=True)
    return errors.gather(0, index)[0], index


def _pick(params: QuantParams, index: Tensor) -> QuantParams:
    scale = params.scale.gather(0, index)[0]
    return QuantParams(scale, None if params.zero_point is None else params.zero_point.gather(0, index)[0])


def _choose(condition: Tensor, first: QuantParams, second: QuantParams) -> QuantParams:
    scale = torch.where(condition, first.scale, second.scale)
    if first.zero_point is None or second.zero_point is None:
        return QuantParams(scale)
    return QuantParams(scale, torch.where(condition, first.zero_point, second.zero_point))
