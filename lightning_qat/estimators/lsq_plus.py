"""LSQ+ on an integer grid: gradients for where a learned grid ends, and a learned zero-point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_qat.core.protocols import GradientEstimator
from lightning_qat.core.scheme import Levels
from lightning_qat.estimators.lsq import scale_gradient


@dataclass(frozen=True)
class LearnedBounds:
    """Clip, then round: the outermost levels get the gradients of all that they stand for.

    Clipping passes the gradient of a value beyond a bound to that bound, and through it to scale and zero-point: with
    ``x' = (round(clip(x / s, low, high))) * s``, ``dx'/ds`` is ``round(x / s) - x / s`` inside and ``low`` or ``high``
    outside, as in LSQ; with ``low = qmin - z``, ``dx'/dz`` is 0 inside and ``-s`` outside, as in LSQ+, whose offset
    is ``-z * s``. A value that lies on a bound, as the many zeros after a ReLU do, counts as inside.

    Args:
        rounding: Rounds what is inside; it meets no value outside.

    Source: Esser et al. 2020 (arXiv:1902.08153), equations 1 to 3; Bhalgat et al. 2020 (arXiv:2004.09576), equations
    3 to 7.
    """

    rounding: GradientEstimator

    def __call__(self, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Return ``x`` rounded half to even and clamped to the whole numbers ``low`` and ``high``."""
        bounds = [torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (low, high)]
        return self.rounding(torch.clamp(x, *bounds), *bounds)


class _LearnedGrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: Tensor,
        qmax: Tensor,
        zero_offset: Tensor,
        margin: float,
    ) -> Tensor:
        low, high = qmin - zero_point, qmax - zero_point
        ctx.save_for_backward(x, scale, low, high, zero_offset)
        ctx.margin = margin
        steps = (_wide(x) * (1.0 / scale)).sub_(zero_offset).round_()
        return torch.clamp(steps, low, high).add_(zero_offset).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        x, scale, low, high, zero_offset = ctx.saved_tensors
        gradient = _wide(grads[0])
        exact = (_wide(x) * (1.0 / scale)).sub_(zero_offset)
        of_x = gradient.masked_fill((exact < low - ctx.margin) | (exact > high + ctx.margin), 0.0)
        outside = (exact < low) | (exact > high)
        steps = torch.clamp(exact.round(), low, high)
        # Inside x' changes by round(x / s) - x / s with the scale, outside by the level.
        by_scale = steps.sub_(exact.add_(zero_offset).masked_fill_(outside, 0.0)).add_(zero_offset)
        of_scale = by_scale.mul_(gradient).sum_to_size(scale.shape)
        of_zero_point = -scale * gradient.masked_fill(~outside, 0.0).sum_to_size(scale.shape)
        return of_x.to(x.dtype), of_scale, of_zero_point, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fake_quantize_learned(
    x: Tensor, scale: Tensor, zero_point: Tensor | float, levels: Levels, margin: float = 0.0
) -> Tensor:
    """Return the level nearest to each value, with the gradients of :class:`LearnedBounds` with a plain rounding.

    It is :func:`~lightning_qat.core.fake_quantize` with ``LearnedBounds(ClippedSTE())`` on a tensor of any shape,
    in half of the time and with no more memory than ``x`` takes.

    Args:
        x: Any shape, any floating dtype.
        scale: Positive scales, float32, broadcast with ``x``.
        zero_point: Their zero-points.
        levels: The levels.
        margin: How many steps beyond the outermost levels ``x`` still gets a gradient, as in
            :class:`~lightning_qat.estimators.ClippedSTE`; those of scale and zero-point are the same with any.
    """
    qmin, qmax, zero_offset = (torch.as_tensor(each, dtype=scale.dtype, device=x.device) for each in levels[:3])
    zero_point = torch.as_tensor(zero_point, dtype=scale.dtype, device=x.device).expand_as(scale)
    quantized: Tensor = _LearnedGrid.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, qmin, qmax, zero_offset, margin
    )
    return quantized


class _RoundWithin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return torch.clamp(torch.round(x), low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, low, high = ctx.saved_tensors
        leads_out = ((x < low) & (grads[0] > 0)) | ((x > high) & (grads[0] < 0))  # descent goes against the gradient
        return torch.where(leads_out, 0.0, grads[0]), None, None


def learned_zero_point(
    zero_point: Tensor, offset: Tensor, qmin: Tensor, qmax: Tensor, gradient_factor: Tensor
) -> Tensor:
    """Return ``round(zero_point + (qmax - qmin) * offset)``, a code, rounded straight through.

    LSQ+ learns the offset ``beta = -z * s`` in float, which integer kernels cannot have. Here the zero-point is rounded
    in training as in deployment, and the parameter is the movement of the range in units of its length: the same
    learning rate suits it as suits the logarithm of a scale. Beyond the codes, only the way back has a gradient.

    Args:
        zero_point: Observed zero-point ``z0``, any shape.
        offset: The parameter, same shape.
        qmin: Smallest code.
        qmax: Largest code.
        gradient_factor: What the gradient of ``offset`` is multiplied by. ``g / (s * (qmax - qmin))**2`` makes a step
            of SGD with learning rate ``lr`` change ``beta`` by ``-lr * g * dL/dbeta``, as in LSQ+; see
            :func:`~lightning_qat.estimators.lsq.lsq_factor` for ``g``.
    """
    moved = zero_point + (qmax - qmin) * scale_gradient(offset, gradient_factor)
    rounded: Tensor = _RoundWithin.apply(moved, qmin, qmax)  # type: ignore[no-untyped-call]
    return rounded
