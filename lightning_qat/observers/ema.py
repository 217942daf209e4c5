"""The average range of the calibration batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.observers.running_minmax import RunningMinMaxObserver


@dataclass(frozen=True)
class EMAObserver(RunningMinMaxObserver):
    """Average the smallest and the largest value of each batch: one batch with an outlier counts little.

    Args:
        decay: What the earlier batches count, in [0, 1). The average begins with the range of the first batch.

    Source: Jacob et al. 2018 (arXiv:1712.05877), section 3.1. PyTorch's ``MovingAverageMinMaxObserver`` with
    ``averaging_constant = 1 - decay``; its default of 0.01 would hardly leave the first batch within a calibration of
    some tens of steps.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        """Validate the decay."""
        if not 0 <= self.decay < 1:
            raise ValueError(f"EMAObserver needs 0 <= decay < 1, got {self.decay}.")

    def update(self, seen: Tensor, batch: Tensor) -> Tensor:
        """Return the average over the earlier batches and this one; a batch that fed the layer nothing has no part."""
        average = seen + (1 - self.decay) * (batch - seen)
        either = self.merge(seen, batch)  # of which one is empty
        return torch.where(torch.isinf(seen) | torch.isinf(batch), either, average)
