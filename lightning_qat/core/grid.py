"""The one quantization grid: the four functions that QAT, PTQ and export all call.

Shapes: ``O`` output channels, ``I`` input features, ``G`` groups per channel, ``g`` members of a group.
Every weight is seen as a matrix ``[O, I]``; all arithmetic is in float32, whatever the weight's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.core.scheme import Levels, QuantScheme

if TYPE_CHECKING:
    from lightning_qat.core.protocols import GradientEstimator


@dataclass(frozen=True)
class QuantParams:
    """Where the grid of each group lies.

    Attributes:
        scale: Distance between neighbouring levels, float32 ``[O, G]`` (``[1, 1]`` per tensor).
        zero_point: Code of the weight 0, whole numbers in float32 ``[O, G]``; None if symmetric.
    """

    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as it is deployed: where QAT and every PTQ method end, and evaluation and export start.

    Attributes:
        codes: Integer codes, int8 ``[O, I]``. The weight is ``(codes - zero_point + zero_offset) * scale``, with the
            ``zero_offset`` of the scheme: 0.5 on the grids without a zero (of 1 bit, too), else 0.
        params: Scales and zero-points.
        scheme: The grid that the codes belong to.
        input_scale: What the layer's input is divided by before the product, float32 ``[I]`` (``[O, I]`` if
            the groups of a convolution differ), or None.
    """

    codes: Tensor
    params: QuantParams
    scheme: QuantScheme
    input_scale: Tensor | None = None

    def __repr__(self) -> str:
        """Describe the weight in one line."""
        out_features, in_features = self.codes.shape
        return f"QuantizedWeight({out_features} x {in_features}, {self.scheme})"

    def dequantize(self) -> Tensor:
        """Return the weight that the codes stand for, float32 ``[O, I]``, input scale undone."""
        weight = dequantize(self.codes, self.params, self.scheme)
        return weight if self.input_scale is None else weight / self.input_scale


def group_view(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """Return ``[O, I]`` as ``[O, G, g]``, the last group padded with zeros if it is short.

    Per tensor the result is ``[1, 1, O * I]``.

    Raises:
        ValueError: If the group size does not divide ``I`` and the scheme does not allow padding.
    """
    if scheme.granularity == "tensor":
        return weight.reshape(1, 1, -1)
    out_features, in_features = weight.shape
    num_groups = scheme.num_groups(in_features)
    if scheme.group_size and num_groups * scheme.group_size != in_features:
        weight = F.pad(weight, (0, num_groups * scheme.group_size - in_features))
    return weight.reshape(out_features, num_groups, weight.shape[1] // num_groups)


def ungroup(grouped: Tensor, shape: torch.Size) -> Tensor:
    """Undo :func:`group_view`: return ``[O, G, g]`` in the shape of the weight ``[O, I]``, without padding."""
    is_padded = grouped.numel() != shape.numel()
    return grouped.flatten(1)[:, : shape[1]] if is_padded else grouped.reshape(shape)


def qparams_from_range(
    minimum: Tensor, maximum: Tensor, scheme: QuantScheme, levels: Levels | None = None
) -> QuantParams:
    """Return the grid that covers ``[minimum, maximum]``, widened to include 0.

    Args:
        minimum: Lower end of each group, ``[O, G]``.
        maximum: Upper end of each group, ``[O, G]``.
        scheme: Symmetry, scale rule and scale dtype.
        levels: Levels to use in place of the scheme's own.

    Returns:
        Scales rounded to the scheme's ``scale_dtype`` and never zero, and zero-points in ``[qmin, qmax]``.
    """
    qmin, qmax, _, divisor = levels or scheme.levels()
    low, high = minimum.float().clamp(max=0), maximum.float().clamp(min=0)
    if not scheme.symmetric:
        scale = round_scale((high - low) / divisor, scheme.torch_scale_dtype)
        zero_point = _clamp(qmin - torch.round(low / scale), qmin, qmax)
        return QuantParams(scale, zero_point)
    extreme = torch.maximum(low.abs(), high)
    if scheme.scale_rule == "signed_max":
        extreme = torch.where(high > low.abs(), -high, low.abs())
    return QuantParams(round_scale(extreme / divisor, scheme.torch_scale_dtype))


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to what a file of ``dtype`` can hold, no closer to zero than its smallest normal number."""
    rounded = scale.to(dtype).float()
    tiny = torch.finfo(dtype).smallest_normal
    return torch.where(rounded.abs() < tiny, torch.full_like(rounded, tiny).copysign(rounded), rounded)


def hard_round(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Round half to even and clamp: the rounding whose gradient is zero."""
    return _clamp(torch.round(x), low, high)


def _clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    return torch.clamp(x, low, high)  # type: ignore[arg-type]  # torch's stubs take two numbers or two tensors


def nearest_steps(
    weight: Tensor, scale: Tensor, zero_point: Tensor | float, levels: Levels, rounding: GradientEstimator = hard_round
) -> Tensor:
    """Return ``code - zero_point`` of the level nearest to each weight, in float32; all arguments broadcast."""
    qmin, qmax, zero_offset, _ = levels
    # Multiplying by the reciprocal, not dividing, is what torchao does; the two differ in 0.3 % of int4 codes.
    x = weight * (1.0 / scale) - zero_offset
    return rounding(x, qmin - zero_point, qmax - zero_point)


def _nearest_steps(
    weight: Tensor, params: QuantParams, scheme: QuantScheme, levels: Levels, rounding: GradientEstimator
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Return ``code - zero_point`` as float32 ``[O, G, g]``, and scale and zero-point to broadcast with it."""
    scale = params.scale.unsqueeze(-1)
    zero_point = 0.0 if params.zero_point is None else params.zero_point.unsqueeze(-1)
    weight = group_view(weight.float(), scheme)
    return nearest_steps(weight, scale, zero_point, levels, rounding), scale, zero_point


def fake_quantize(
    weight: Tensor,
    params: QuantParams,
    scheme: QuantScheme,
    levels: Levels | None = None,
    rounding: GradientEstimator = hard_round,
) -> Tensor:
    """Return the level nearest to each weight: ``dequantize(quantize(weight))`` to the bit, differentiable.

    Args:
        weight: ``[O, I]``, any floating dtype.
        params: Scales and zero-points.
        scheme: Granularity, and the levels unless ``levels`` is given.
        levels: Levels to use in place of the scheme's own.
        rounding: How values are rounded and how the gradient passes; see :mod:`lightning_qat.estimators`.

    Returns:
        ``[O, I]`` in the dtype of ``weight``.
    """
    levels = levels or scheme.levels()
    steps, scale, _ = _nearest_steps(weight, params, scheme, levels, rounding)
    # Adding the offset even if it is zero turns -0.0 into 0.0, which integer codes cannot tell apart.
    return ungroup((steps + levels.zero_offset) * scale, weight.shape).to(weight.dtype)


@torch.no_grad()
def quantize(weight: Tensor, params: QuantParams, scheme: QuantScheme) -> Tensor:
    """Return the code of the level nearest to each weight, int8 ``[O, I]``.

    Args:
        weight: ``[O, I]``, any floating dtype.
        params: Scales and zero-points.
        scheme: Granularity and levels.

    Raises:
        ValueError: If a weight or a scale is NaN or infinite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("NaN or infinite weights have no integer code. Check the checkpoint or the learning rate.")
    if not torch.isfinite(params.scale).all():
        raise ValueError(f"A scale is beyond the range of {scheme.scale_dtype}. Choose scale_dtype='float32'.")
    return nearest_codes(weight, params, scheme)


@torch.no_grad()
def nearest_codes(weight: Tensor, params: QuantParams, scheme: QuantScheme) -> Tensor:
    """Return what :func:`quantize` does, without its checks, which wait for an accelerator."""
    steps, _, zero_point = _nearest_steps(weight, params, scheme, scheme.levels(), hard_round)
    return ungroup(steps + zero_point, weight.shape).to(torch.int8)


@torch.no_grad()
def dequantize(codes: Tensor, params: QuantParams, scheme: QuantScheme) -> Tensor:
    """Return the levels that ``codes`` (int8 ``[O, I]``) stand for, float32 ``[O, I]``."""
    zero_point = 0.0 if params.zero_point is None else params.zero_point.unsqueeze(-1)
    steps = group_view(codes.float(), scheme) - zero_point
    return ungroup((steps + scheme.levels().zero_offset) * params.scale.unsqueeze(-1), codes.shape)
