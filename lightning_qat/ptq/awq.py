"""AWQ: scale up the input features that matter, so that they are rounded more finely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantizedWeight, QuantParams, group_view, quantize
from lightning_qat.core.protocols import Observer
from lightning_qat.core.scheme import QuantScheme
from lightning_qat.core.stats import LayerStats
from lightning_qat.observers import MSEObserver
from lightning_qat.ptq.ranges import search_scaled_ranges

_CHUNK = 2**22
"""Weights times candidates for a scale that are handled at once."""


@dataclass(frozen=True)
class AWQ:
    """Search the scale of each input channel and the range of each group, by the error of the layer's output.

    The layer computes ``Q(W s) / s``: no norm or linear layer before it has to take ``1 / s``, so every layer
    of every model can be treated.

    Args:
        num_scales: Exponents tried for each of the two forms of ``s``; 0, no scaling, is one of them.
        num_finalists: How many of the scales that are best after a coarse search of ranges get a fine one, besides
            no scaling.
        coarse_search: Where ranges are searched for every scale, weighted by E[x²].
        search: Where they are searched for the finalists.

    Source: Lin et al. 2023 (arXiv:2306.00978), with the scales ``x̄^α`` and ``x̄^α / w̄^(1-α)`` that
    llm-compressor tries. We deviate in the objective, which is the exact squared error of this layer's output
    over all tokens, ``tr(ΔW H ΔWᵀ)``, and in searching the range anew for each scale.
    """

    needs_stats: ClassVar[bool] = True
    num_scales: int = 10
    num_finalists: int = 3
    coarse_search: MSEObserver = field(default_factory=lambda: MSEObserver(4, min_ratio=0.4, max_ratio=0.85))
    search: MSEObserver = field(default_factory=lambda: MSEObserver(40, min_ratio=0.3, max_ratio=1.08))

    @torch.no_grad()
    def __call__(
        self, weight: Tensor, schemes: Sequence[QuantScheme], observer: Observer, stats: LayerStats | None = None
    ) -> list[QuantizedWeight]:
        """Return ``weight`` ``[O, I]`` for each scheme."""
        assert stats is not None
        weight = weight.float()
        return [self._quantize(weight, scheme, observer, stats) for scheme in schemes]

    def _quantize(self, weight: Tensor, scheme: QuantScheme, observer: Observer, stats: LayerStats) -> QuantizedWeight:
        scales = self._scales(weight, scheme, stats)
        coarse = _Candidates.search(weight, scales, scheme, stats, self.coarse_search)
        order = coarse.errors[1:].argsort(stable=True) + 1
        finalists = torch.cat([scales[:1], scales[order[: self.num_finalists]]])  # no scaling is always among them
        fine = _Candidates.search(weight, finalists, scheme, stats, self.search, observer)
        best = fine if fine.errors.min() <= coarse.errors.min() else coarse
        return best.quantize(weight, scheme, stats)

    def _scales(self, weight: Tensor, scheme: QuantScheme, stats: LayerStats) -> Tensor:
        """Return the candidates for ``s``, ``[C, K, I]``."""
        inputs = _per_channel(stats.abs_mean, stats.columns_per_channel)
        weights = _per_channel(_relative_size(weight, scheme, stats), stats.columns_per_channel)
        scales = [torch.ones_like(inputs)]
        for index in range(1, self.num_scales):
            alpha = index / self.num_scales
            scales += [_normalize(inputs**alpha), _normalize(inputs**alpha / (weights ** (1 - alpha) + 1e-4))]
        return torch.stack(scales)


@dataclass(frozen=True)
class _Candidates:
    """Scales ``[C, K, I]`` with the ranges that suit them, ``[C]``, and the errors of the output, ``[C]``."""

    errors: Tensor
    scales: Tensor
    params: list[QuantParams]

    @staticmethod
    def search(
        weight: Tensor,
        scales: Tensor,
        scheme: QuantScheme,
        stats: LayerStats,
        search: MSEObserver,
        observer: Observer | None = None,
    ) -> _Candidates:
        errors, params = [], []
        size = 1 if scheme.granularity == "tensor" else max(1, _CHUNK // weight.numel())
        for some in torch.split(scales, size):
            rows = stats.expand_rows(some, len(weight))
            found, row_errors = search_scaled_ranges(weight, rows, scheme, stats, search, observer)
            errors += row_errors.sum(-1).tolist()
            params += found
        return _Candidates(torch.tensor(errors, dtype=torch.float64), scales, params)

    def quantize(self, weight: Tensor, scheme: QuantScheme, stats: LayerStats) -> QuantizedWeight:
        """Return the weight with the best of the scales."""
        index = int(self.errors.argmin())
        rows = stats.expand_rows(self.scales[index], len(weight))
        codes = quantize(weight * rows, self.params[index], scheme)
        input_scale = self.scales[index, 0] if self.scales.shape[1] == 1 else rows
        return QuantizedWeight(codes, self.params[index], scheme, None if (rows == 1).all() else input_scale)


def _relative_size(weight: Tensor, scheme: QuantScheme, stats: LayerStats) -> Tensor:
    """Return the mean over rows of each weight's share of the largest in its group, ``[K, I]``."""
    grouped = group_view(weight.abs(), scheme)
    relative = grouped / grouped.amax(-1, keepdim=True).clamp(min=1e-12)
    relative = relative.reshape(len(weight), -1)[:, : weight.shape[1]]
    return stats.split_rows(relative).mean(1)


def _per_channel(values: Tensor, columns_per_channel: int) -> Tensor:
    """Give all columns ``[K, I]`` of one input channel their mean: one channel has one scale."""
    means = values.reshape(len(values), -1, columns_per_channel).mean(-1)
    return means.repeat_interleave(columns_per_channel, dim=-1)


def _normalize(scale: Tensor) -> Tensor:
    """Centre scales ``[K, I]`` around 1; a channel that is always zero gets the smallest of the others."""
    positive = torch.where(scale > 0, scale, torch.inf)
    smallest = positive.amin(-1, keepdim=True)
    smallest = torch.where(torch.isfinite(smallest), smallest, 1.0)
    scale = torch.maximum(scale, smallest)
    middle = (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()
    return scale / middle
