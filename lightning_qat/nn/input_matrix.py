"""The input of a layer as rows of what its weight ``[O, I]`` multiplies."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.nn.forward import drop_padding
from lightning_qat.nn.layers import QATLayer
from lightning_qat.nn.plan import find_qat_class

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def num_groups(module: nn.Module) -> int:
    """Return ``K``, the number of groups of a convolution, and 1 for other layers."""
    return module.groups if isinstance(module, CONVOLUTIONS) else 1


def num_columns(module: nn.Module) -> int:
    """Return ``I``, the number of columns of the weight's matrix."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return (find_qat_class(module, None) or QATLayer).to_matrix(weight).shape[1]


def columns_per_channel(module: nn.Module) -> int:
    """Return how many columns of the weight's matrix come from one input channel."""
    return module.weight[0, 0].numel() if isinstance(module, CONVOLUTIONS) else 1


def token_matrix(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the input ``x`` of ``module`` as tokens, float32 ``[K, N, I]``.

    Args:
        module: A Linear, Conv1d/2d/3d or Hugging Face Conv1D.
        x: Its input: ``[..., I]``, or ``[B, C, ...]`` (``[C, ...]``) for a convolution.
        mask: True where a token counts, ``[B, T]``; it applies to inputs ``[B, T, I]`` and ``[B * T, I]``.
    """
    x = x.detach().float()
    if isinstance(module, CONVOLUTIONS):
        return _unfold(module, x)
    return drop_padding(x, mask).reshape(1, -1, x.shape[-1])


def _unfold(module: Any, x: Tensor) -> Tensor:
    num_dims = len(module.kernel_size)
    x = x if x.dim() == num_dims + 2 else x.unsqueeze(0)
    padding = module._reversed_padding_repeated_twice
    x = F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    for index in range(num_dims):
        size, dilation = module.kernel_size[index], module.dilation[index]
        x = x.unfold(index + 2, dilation * (size - 1) + 1, module.stride[index])[..., ::dilation]
    batch, channels = x.shape[:2]
    positions, kernel = x.shape[2 : 2 + num_dims].numel(), x.shape[2 + num_dims :].numel()
    x = x.reshape(batch, module.groups, channels // module.groups, positions, kernel)
    return x.permute(1, 0, 3, 2, 4).reshape(module.groups, batch * positions, -1)
