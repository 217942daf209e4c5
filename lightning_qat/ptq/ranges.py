"""The range of each group, searched for the least error of the layer's output."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantParams, fake_quantize
from lightning_qat.core.protocols import Observer
from lightning_qat.core.scheme import QuantScheme
from lightning_qat.core.stats import LayerStats


def search_ranges(
    weight: Tensor, scheme: QuantScheme, stats: LayerStats, search: Observer, observer: Observer | None = None
) -> QuantParams:
    """Return the ranges of ``weight`` ``[O, I]``; see :func:`search_scaled_ranges`."""
    (params,), _ = search_scaled_ranges(weight, torch.ones_like(weight)[None], scheme, stats, search, observer)
    return params


def search_scaled_ranges(
    weight: Tensor,
    scales: Tensor,
    scheme: QuantScheme,
    stats: LayerStats,
    search: Observer,
    observer: Observer | None = None,
) -> tuple[list[QuantParams], Tensor]:
    """Search the ranges of a weight times each of several scales, as if they were one tall weight.

    Each row gets the range that ``search`` finds with errors weighted by E[x²], or the one of ``observer``,
    whichever has the smaller error of the output: where inputs are strongly correlated, as in convolutions, E[x²]
    alone misjudges what clipping costs.

    Args:
        weight: The weight, ``[O, I]``.
        scales: What it is multiplied with before rounding and divided by afterwards, ``[C, O, I]``.
        scheme: The scheme; with one range for the whole tensor, ``C`` must be 1.
        stats: Statistics of the inputs.
        search: Searches for ranges.
        observer: The alternative. Default: none.

    Returns:
        The ranges for each scale, and the errors of the outputs, float64 ``[C, O]``.
    """
    scaled = (weight * scales).flatten(0, 1)
    importance = (stats.importance(len(weight)) / scales.square()).flatten(0, 1)

    def errors_of(params: QuantParams) -> Tensor:
        nearest = fake_quantize(scaled, params, scheme).reshape(scales.shape)
        return stats.row_errors(nearest / scales - weight)

    params = search(scaled, scheme, importance=importance)
    errors = errors_of(params)
    if observer is not None:
        other = observer(scaled, scheme)
        params, errors = _keep_better_rows(params, errors, other, errors_of(other))
    return _split(params, len(scales)), errors


def _keep_better_rows(
    first: QuantParams, errors: Tensor, second: QuantParams, other_errors: Tensor
) -> tuple[QuantParams, Tensor]:
    """Return the ranges with the smaller errors, row by row; of the whole tensor, if that has one range."""
    is_better = other_errors < errors
    if len(first.scale) < errors.numel():
        is_better = (other_errors.sum() < errors.sum()).expand_as(errors)
    rows = is_better.flatten()[: len(first.scale), None]
    zero_point = first.zero_point
    if zero_point is not None and second.zero_point is not None:
        zero_point = torch.where(rows, second.zero_point, zero_point)
    scale = torch.where(rows, second.scale, first.scale)
    return QuantParams(scale, zero_point), torch.where(is_better, other_errors, errors)


def _split(params: QuantParams, number: int) -> list[QuantParams]:
    """Return the ranges of each of the weights of which a tall one consists."""
    scales = params.scale.chunk(number)
    zero_points = [None] * number if params.zero_point is None else params.zero_point.chunk(number)
    return [QuantParams(s, z) for s, z in zip(scales, zero_points, strict=True)]
