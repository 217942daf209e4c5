"""The range between two percentiles of what a layer was fed during calibration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantParams, qparams_from_range
from lightning_qat.core.scheme import Levels, QuantScheme
from lightning_qat.observers.histogram import Histogram


@dataclass(frozen=True)
class PercentileObserver(Histogram):
    """Leave the same small share of values out at either end; none if that would leave only zeros.

    Args:
        num_bins: Bins of the histogram from which the percentiles are read, to within the width of one.
        percentile: Share of the values, in percent, that are not above the upper end; as many are not below the
            lower end. In (50, 100].

    Source: the calibration of McKinstry et al. 2018 (arXiv:1809.04191), there of absolute values.
    """

    percentile: float = 99.99

    def __post_init__(self) -> None:
        """Validate the arguments."""
        super().__post_init__()
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile={self.percentile} must be above 50 and at most 100.")

    def __call__(self, seen: Tensor, scheme: QuantScheme, levels: Levels | None = None) -> QuantParams:
        """Return the grid between the two percentiles, scale and zero-point ``[1, 1]``."""
        share = self.percentile / 100
        low, high = self.quantile(seen, 1 - share), self.quantile(seen, share)
        width = torch.exp2(seen[2]) / self._half
        is_empty = (low >= -width) & (high <= width)  # nearly all values are 0
        low, high = torch.where(is_empty, seen[0], low), torch.where(is_empty, seen[1], high)
        return qparams_from_range(low.view(1, 1), high.view(1, 1), scheme, levels)

    def quantile(self, seen: Tensor, share: float) -> Tensor:
        """Return the least value that ``share`` of all values do not exceed, to within a bin; float32, 0-d."""
        own = seen.cpu()  # where there is double precision
        total = self.counts(own).double().cumsum(0)
        target = share * total[-1:]
        index = torch.searchsorted(total, target).clamp(max=self.num_bins - 1)
        inside = 1 - (total[index] - target) / self.counts(own)[index].clamp(min=1)
        edges = self.edges(own).double()
        value = edges[index] + inside.clamp(0, 1) * (edges[index + 1] - edges[index])
        return value.float().clamp(own[0], own[1]).squeeze(0).to(seen.device)
