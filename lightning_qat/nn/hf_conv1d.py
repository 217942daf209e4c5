"""Hugging Face's ``Conv1D`` (GPT-2): a linear layer whose weight is stored ``[I, O]``.

Imported only where a model holds one, so that transformers stays optional.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lightning_qat.nn.layers import QATLayer


class QATConv1D(QATLayer, Conv1D):  # type: ignore[misc]
    """A ``Conv1D`` that computes with its fake-quantized weight."""

    float_class = Conv1D
    bias: Tensor
    nf: int

    @staticmethod
    def to_matrix(weight: Tensor) -> Tensor:
        """Return the weight ``[I, O]`` as ``[O, I]``."""
        return weight.t()

    @staticmethod
    def from_matrix(matrix: Tensor, weight: Tensor) -> Tensor:
        """Return ``matrix`` ``[O, I]`` as ``[I, O]``."""
        return matrix.t()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` ``[..., I]`` times the fake-quantized weight, plus the bias."""
        rows = self._input(x).flatten(end_dim=-2)
        return torch.addmm(self.bias, rows, self.fake_quantized_weight()).view(*x.shape[:-1], self.nf)
