"""Learned step size quantization (LSQ): what a learned scale's gradient is multiplied by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.core.grid import round_scale

_SMALLEST = 1e-15
"""Observed scales below this belong to groups of zeros, and are not learned."""

_SMALLEST_SHARE = 10.0
"""A scale that is more times smaller than the mean of its layer takes smaller steps than LSQ's."""


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grads[0] * factor, None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """Return ``x`` unchanged; its gradient is multiplied by ``factor``, which broadcasts with it.

    Example::

        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> scale_gradient(x, torch.tensor(0.5)).sum().backward()
        >>> x.grad
        tensor([0.5000, 0.5000])
    """
    scaled: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled


def lsq_factor(num_values: int, qmax: Tensor | float) -> Tensor:
    """Return LSQ's gradient scale ``1 / sqrt(N * Qp)``, which brings the relative updates of scale and weights level.

    Source: Esser et al. 2020 (arXiv:1902.08153), section 2.2. ``Qp`` is the largest code, but at least 1: the grids
    without a positive code (1 bit) would have a factor without bound.

    Args:
        num_values: ``N``: weights that share one scale, or features of one input. (ParetoQ counts those of the whole
            tensor also where each row has a scale of its own.)
        qmax: ``Qp``, the largest code, as a number or a 0-d tensor.

    Returns:
        The factor, a 0-d float32 tensor.
    """
    return torch.as_tensor(qmax, dtype=torch.float32).clamp(min=1).mul(num_values).rsqrt()


def log_scale(scale: Tensor, log_ratio: Tensor, gradient_factor: Tensor) -> Tensor:
    """Return ``scale * exp(log_ratio)``: a learned scale that is positive by construction.

    The parameter is the logarithm of the ratio to the observed scale ``s0``. Its gradient is ``g * dL/ds / s``, so that
    one step of SGD with learning rate ``lr`` changes the scale by ``-lr * g * dL/ds`` to first order, as in LSQ, where
    the scale is the parameter itself. Below ``s0`` it is ``g * dL/ds * s / s0**2``: steps get smaller, and throw no
    scale that has become small far beyond where it was. For the same reason ``s0`` counts as at least a tenth of the
    layer's mean there: the step that suits the layer is beyond measure for a channel that is almost dead. Optimizers
    that normalize gradients (Adam) do not see the factor.

    Args:
        scale: Observed scales ``s0``, any shape.
        log_ratio: The parameter, same shape.
        gradient_factor: LSQ's ``g``; see :func:`lsq_factor`.
    """
    largest = (scale * torch.exp(log_ratio.detach().clamp(min=0))).abs()
    largest = torch.maximum(largest, scale.abs().mean() / _SMALLEST_SHARE).clamp(min=_SMALLEST)
    learned = scale * torch.exp(scale_gradient(log_ratio, gradient_factor / largest.square()))
    return torch.where(scale.abs() > _SMALLEST, learned, scale)  # of a group of zeros the gradient is not finite


class _RoundScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return round_scale(scale, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def round_straight_through(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return :func:`~lightning_qat.core.round_scale` of ``scale``; the gradient passes as it is, in float32.

    A cast has a gradient of its own type: in float16 one that a gradient scaler has multiplied would overflow.
    """
    rounded: Tensor = _RoundScale.apply(scale, dtype)  # type: ignore[no-untyped-call]
    return rounded
