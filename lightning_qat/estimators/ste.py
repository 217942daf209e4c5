"""The clipped straight-through estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_qat.core.grid import hard_round


class _RoundClipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, margin: float) -> Tensor:
        ctx.save_for_backward(x, low, high)
        ctx.margin = margin
        return hard_round(x, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        x, low, high = ctx.saved_tensors
        inside = (x > low - ctx.margin) & (x < high + ctx.margin)
        return torch.where(inside, grads[0], 0.0), None, None, None


@dataclass(frozen=True)
class ClippedSTE:
    """Pass the gradient as if there were no rounding, and stop it where the value is clipped.

    Args:
        margin: How many steps beyond the outermost levels the gradient still passes. With the symmetric
            scale absmax / 7.5 the largest positive weight of a group lies half a step beyond the last
            level; a margin of 0, as in torchao, freezes it: about 1 weight in 80 at groups of 32.

    Source: Bengio et al. 2013 (arXiv:1308.3432), section 4; clipped as in Jacob et al. 2018
    (arXiv:1712.05877). The margin of one step is our deviation.

    Example::

        >>> x = torch.tensor([-9.5, 0.3, 7.6, 8.2], requires_grad=True)
        >>> ClippedSTE()(x, -8, 7).sum().backward()
        >>> x.grad
        tensor([0., 1., 1., 0.])
    """

    margin: float = 1.0

    def __call__(self, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Return ``x`` rounded half to even and clamped to ``[low, high]``."""
        bounds = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high))
        rounded: Tensor = _RoundClipped.apply(x, *bounds, self.margin)  # type: ignore[no-untyped-call]
        return rounded
