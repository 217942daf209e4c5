"""Fake quantization of a layer's input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_qat.core import GradientEstimator, QuantScheme
from lightning_qat.nn.annealed_grid import AnnealedGrid
from lightning_qat.observers import MinMaxObserver


class InputFakeQuantize(AnnealedGrid):
    """Dynamic fake quantization of a layer's input: the range is that of the input at hand.

    Args:
        scheme: An activation scheme, granularity ``"token"``.
        estimator: How the gradient passes the rounding.
        sample_dims: Number of trailing dimensions that share one scale: 1 for a linear layer (each token has
            its own), all but the batch for a convolution, since what a convolution sums must share a scale.
        device: Where the levels lie.
    """

    def __init__(
        self, scheme: QuantScheme, estimator: GradientEstimator, sample_dims: int, device: torch.device | None = None
    ) -> None:
        super().__init__(scheme, device)
        self.estimator = estimator
        self.sample_dims = sample_dims
        self._observer = MinMaxObserver()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` on the grid of its own range, in its shape and dtype."""
        if self._passes_unchanged():
            return x
        rows = x.reshape(-1, math.prod(x.shape[-self.sample_dims :]))
        params = self._observer(rows, self.scheme, self.levels)
        return self._fake_quantize(rows, params, self.estimator).reshape(x.shape)
