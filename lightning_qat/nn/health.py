"""How well the weights sit on their grids, layer by layer, from one look at each weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_qat.core import QuantParams, QuantScheme, dequantize, group_view, nearest_codes
from lightning_qat.nn.convert import weight_fake_quants
from lightning_qat.nn.layers import QATLayer

_NUM_CODES = 256


@dataclass(frozen=True)
class WeightSums:
    """What one look at a quantized weight finds, still on its device, so that nothing waits for an accelerator.

    Attributes:
        powers: Float32 ``[2]``: the sum of the squared weights, and that of their squared quantization errors.
        counts: Int64 ``[2]``: the number of weights that lie over half a step beyond the outermost level, and the
            number of codes that are used.
        numel: Number of weights looked at.
        num_levels: Number of levels of the grid.
    """

    powers: Tensor
    counts: Tensor
    numel: int
    num_levels: int

    def dead_levels(self, used: float) -> float:
        """Return the share of levels that no weight uses, of those that so many weights could use."""
        return 1 - used / min(self.num_levels, self.numel)


@dataclass(frozen=True)
class LayerHealth:
    """The state of one quantized weight.

    Attributes:
        name: Name of its layer, of several that share it the first.
        scheme: The grid on the current rung.
        num_weights: Number of weights.
        sqnr_db: Power of the weights over power of their quantization error in decibels; infinite without an error.
        clipped_fraction: Share of the weights over half a step beyond the outermost level.
        dead_levels: Share of the levels that no weight of the layer uses, of those that its weights could use: a layer
            with fewer weights than levels cannot use them all.
        scales: Smallest, median and largest absolute scale.
    """

    name: str
    scheme: str
    num_weights: int
    sqnr_db: float
    clipped_fraction: float
    dead_levels: float
    scales: tuple[float, float, float]


@torch.no_grad()
def layer_health(root: nn.Module) -> list[LayerHealth]:
    """Return the state of every quantized weight of ``root``, but for those that pass unchanged on this rung."""
    rows = []
    for name, layer in weight_fake_quants(root):
        quantizer = layer.weight_fake_quant
        if quantizer.pass_through:
            continue
        matrix = layer.whole_matrix()
        params = quantizer.qparams(matrix)
        found = weight_sums(matrix, params, quantizer.rung_scheme)
        (signal, noise), (clipped, used) = found.powers.tolist(), found.counts.tolist()
        scales = params.scale.abs()
        rows.append(
            LayerHealth(
                name=name,
                scheme=str(quantizer.rung_scheme),
                num_weights=found.numel,
                sqnr_db=decibels(signal, noise),
                clipped_fraction=clipped / found.numel,
                dead_levels=found.dead_levels(used),
                scales=(scales.min().item(), scales.median().item(), scales.max().item()),
            )
        )
    return rows


@torch.no_grad()
def sample_rows(weight: Tensor, params: QuantParams, most: int) -> tuple[Tensor, QuantParams]:
    """Return evenly spaced rows of a weight ``[O, I]``, together about ``most`` weights, and the grids of these."""
    stride = max(1, weight.numel() // most)
    if params.scale.shape[0] == 1:  # one scale for all
        return weight[::stride], params
    zero_point = None if params.zero_point is None else params.zero_point[::stride]
    return weight[::stride], QuantParams(params.scale[::stride], zero_point)


@torch.no_grad()
def weight_sums(weight: Tensor, params: QuantParams, scheme: QuantScheme) -> WeightSums:
    """Look at a weight.

    Args:
        weight: ``[O, I]``, any floating dtype.
        params: Scales and zero-points.
        scheme: Granularity and levels.
    """
    weight = weight.float()
    codes = nearest_codes(weight, params, scheme)
    noise = dequantize(codes, params, scheme) - weight
    half_step = 0.5 * params.scale.abs().unsqueeze(-1)
    clipped = (group_view(noise.abs(), scheme) > half_step * 1.001).sum()  # above rounding in float32
    is_used = torch.zeros(_NUM_CODES, dtype=torch.bool, device=weight.device)
    is_used[codes.flatten().long() + _NUM_CODES // 2] = True
    powers = torch.stack([weight.square().sum(), noise.square().sum()])
    qmin, qmax, _, _ = scheme.levels()
    return WeightSums(powers, torch.stack([clipped, is_used.sum()]), weight.numel(), int(qmax - qmin) + 1)


def decibels(signal: float, noise: float) -> float:
    """Return a ratio of powers in decibels; infinite without noise, NaN without either."""
    if noise <= 0:
        return math.inf if signal > 0 else math.nan
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@torch.no_grad()
def gradient_to_scale_ratio(layer: QATLayer) -> Tensor | None:
    """Return how fast learned scales move relative to their weights; None if either has no gradient.

    This is LSQ's ``R = (|dL/ds| / s) / (||dL/dw|| / ||w||)`` (Esser et al. 2020, arXiv:1902.08153, section 2.2), which
    should be near 1: the relative change of a scale over that of the weights, for the same learning rate. The parameter
    is the logarithm of a scale, so that its gradient is that relative change already. Of several scales it is the root
    mean square.

    Returns:
        A 0-d tensor; NaN or infinite if a norm is zero.
    """
    ratio, weight = layer.weight_fake_quant.log_scale_ratio, layer.weight
    if ratio is None or ratio.grad is None or weight.grad is None:
        return None
    of_scales = torch.linalg.vector_norm(ratio.grad) / math.sqrt(ratio.numel())
    of_weights = torch.linalg.vector_norm(weight.grad.float()) / torch.linalg.vector_norm(weight.float())
    result: Tensor = of_scales / of_weights
    return result
