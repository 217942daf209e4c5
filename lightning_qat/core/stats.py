"""What calibration gathers about the inputs of a layer: enough for every method at every width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStats:
    """Sums over the tokens that a layer saw; a convolution sees one token per output position.

    ``K`` is the number of groups of a convolution, 1 for all other layers; the weight ``[O, I]`` belongs to
    them in ``K`` runs of ``O / K`` rows.

    Attributes:
        hessian: Sum of ``x xᵀ``, float32 ``[K, I, I]``.
        abs_mean: Mean of ``|x|``, float32 ``[K, I]``.
        num_tokens: Number of tokens.
        columns_per_channel: Neighbouring columns that come from one input channel: the kernel's size.
    """

    hessian: Tensor
    abs_mean: Tensor
    num_tokens: int
    columns_per_channel: int = 1

    def importance(self, out_features: int) -> Tensor:
        """Return the mean of ``x²`` for every weight, ``[O, I]``: what its squared error counts."""
        diagonal = torch.diagonal(self.hessian, dim1=-2, dim2=-1) / self.num_tokens
        return self.expand_rows(diagonal, out_features)

    def expand_rows(self, values: Tensor, out_features: int) -> Tensor:
        """Return values of each input feature, ``[..., K, I]``, for every weight, ``[..., O, I]``."""
        return values.repeat_interleave(out_features // values.shape[-2], dim=-2)

    def split_rows(self, weight: Tensor) -> Tensor:
        """Return weights ``[..., O, I]`` as ``[..., K, O / K, I]``."""
        return weight.reshape(*weight.shape[:-2], len(self.hessian), -1, weight.shape[-1])

    def output_error(self, error: Tensor) -> float:
        """Return the mean over tokens of the squared error of the output, summed over outputs.

        Args:
            error: Error of the weight, ``[O, I]``.
        """
        return self.output_errors(error).item()

    def output_errors(self, errors: Tensor) -> Tensor:
        """Return the same for errors ``[..., O, I]``, float64 ``[...]``."""
        return self.row_errors(errors).sum(-1)

    def row_errors(self, errors: Tensor) -> Tensor:
        """Return the same for each output by itself, float64 ``[..., O]``."""
        rows = self.split_rows(errors.float())
        return ((rows @ self.hessian) * rows).sum(-1, dtype=torch.float64).flatten(-2) / self.num_tokens
