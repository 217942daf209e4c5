"""GPTQ: round column by column, and let the columns that are left make up for the error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantizedWeight, QuantParams, nearest_steps
from lightning_qat.core.protocols import Observer
from lightning_qat.core.scheme import Levels, QuantScheme
from lightning_qat.core.stats import LayerStats
from lightning_qat.observers import MSEObserver
from lightning_qat.ptq.cholesky import inverse_factor


@dataclass(frozen=True)
class GPTQ:
    """Minimize the error of the layer's output, one input feature at a time.

    Rows do not depend on each other once the inputs are known, so all widths go through one loop.

    Args:
        damping: Share of the mean of the Hessian's diagonal that is added to it.
        block_size: Columns between two updates of all columns that are left; it changes speed only.
        act_order: Go through the columns in order of falling E[x²], the grids fixed beforehand (static
            groups), so that the result needs no group index.
        search: Where the range of each group is searched, weighted by E[x²]; None takes the layer's observer.
        search_convolutions: Whether that is done for kernels larger than 1, too. It halves the error of the layer's
            output and yet costs accuracy (``benchmarks/resnet20_ptq.py``), so by default these take the observer.

    Source: Frantar et al. 2023 (arXiv:2210.17323), algorithm 1, with act-order and static groups of the
    authors' code. We deviate in the range search, and in leaving the weights of features that are always zero
    as they are instead of setting them to zero.
    """

    needs_stats: ClassVar[bool] = True
    damping: float = 0.01
    block_size: int = 128
    act_order: bool = True
    search: MSEObserver | None = field(default_factory=MSEObserver)
    search_convolutions: bool = False

    @torch.no_grad()
    def __call__(
        self, weight: Tensor, schemes: Sequence[QuantScheme], observer: Observer, stats: LayerStats | None = None
    ) -> list[QuantizedWeight]:
        """Return ``weight`` ``[O, I]`` for each scheme.

        Raises:
            LinAlgError: If the Hessian cannot be factorized, however much it is damped.
        """
        assert stats is not None
        weight = weight.float()
        params = [self._params(weight, scheme, observer, stats) for scheme in schemes]
        order = self._order(stats.hessian)
        columns = _Columns.stack(schemes, params, stats, weight.shape)
        rows = stats.split_rows(weight).repeat(1, len(schemes), 1)
        hessian = _permute(_permute(stats.hessian, order).mT, order).mT
        steps = self._solve(_permute(rows, order), inverse_factor(hessian, self.damping), columns, order)
        steps = torch.empty_like(steps).scatter_(-1, order.unsqueeze(1).expand_as(steps), steps)
        per_scheme = steps.chunk(len(schemes), dim=1)
        return [
            _finish(steps.reshape(weight.shape), p, scheme)
            for steps, p, scheme in zip(per_scheme, params, schemes, strict=True)
        ]

    def _params(self, weight: Tensor, scheme: QuantScheme, observer: Observer, stats: LayerStats) -> QuantParams:
        is_kernel = stats.columns_per_channel > 1
        if self.search is None or (is_kernel and not self.search_convolutions):
            return observer(weight, scheme)
        return self.search(weight, scheme, importance=stats.importance(len(weight)))

    def _order(self, hessian: Tensor) -> Tensor:
        """Return the order of the columns, ``[K, I]``."""
        diagonal = torch.diagonal(hessian, dim1=-2, dim2=-1)
        if self.act_order:
            return torch.argsort(diagonal, dim=-1, descending=True, stable=True)
        return torch.arange(diagonal.shape[-1], device=hessian.device).expand_as(diagonal)

    def _solve(self, rows: Tensor, factor: Tensor, columns: _Columns, order: Tensor) -> Tensor:
        """Return ``code - zero_point`` for ``rows`` ``[K, R, I]``, which it overwrites."""
        steps = torch.empty_like(rows)
        in_features = rows.shape[-1]
        for start in range(0, in_features, self.block_size):
            stop = min(start + self.block_size, in_features)
            errors = torch.empty_like(rows[..., start:stop])
            for index in range(start, stop):
                scale, zero_point = columns.at(order[:, index])
                column = rows[..., index]
                steps[..., index] = nearest_steps(column, scale, zero_point, columns.levels)
                level = (steps[..., index] + columns.levels.zero_offset) * scale
                error = (column - level) / factor[:, index, index, None]
                rows[..., index:stop] -= error.unsqueeze(-1) * factor[:, None, index, index:stop]
                errors[..., index - start] = error
            rows[..., stop:] -= errors @ factor[:, start:stop, stop:]
        return steps


@dataclass(frozen=True)
class _Columns:
    """The grids of all rows ``R`` of the stacked schemes, ``[K, R, G]``, and which group a column belongs to."""

    scale: Tensor
    zero_point: Tensor
    group_of: Tensor
    levels: Levels

    @staticmethod
    def stack(
        schemes: Sequence[QuantScheme], params: Sequence[QuantParams], stats: LayerStats, shape: torch.Size
    ) -> _Columns:
        num_rows = shape[0] // len(stats.hessian)
        scales, zero_points = [], []
        for each in params:
            scale = each.scale.expand(shape[0], -1)
            zero_point = torch.zeros_like(scale) if each.zero_point is None else each.zero_point.expand_as(scale)
            scales.append(scale.reshape(len(stats.hessian), num_rows, -1))
            zero_points.append(zero_point.reshape(len(stats.hessian), num_rows, -1))
        size = schemes[0].group_size or shape[1]
        per_scheme = torch.tensor([scheme.levels() for scheme in schemes], dtype=torch.float32, device=scales[0].device)
        levels = Levels(*per_scheme.repeat_interleave(num_rows, dim=0).unbind(1))
        group_of = torch.arange(shape[1], device=scales[0].device) // size
        return _Columns(torch.cat(scales, 1), torch.cat(zero_points, 1), group_of, levels)

    def at(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales and zero-points ``[K, R]`` of one column per convolution group."""
        index = self.group_of[columns][:, None, None].expand(-1, self.scale.shape[1], 1)
        return self.scale.gather(2, index).squeeze(2), self.zero_point.gather(2, index).squeeze(2)


def _permute(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the columns of ``matrix`` ``[K, R, I]`` in ``order`` ``[K, I]``."""
    return matrix.gather(-1, order.unsqueeze(1).expand_as(matrix))


def _finish(steps: Tensor, params: QuantParams, scheme: QuantScheme) -> QuantizedWeight:
    if params.zero_point is not None:
        group_size = scheme.group_size or steps.shape[1]
        per_column = params.zero_point.repeat_interleave(group_size, dim=1)[:, : steps.shape[1]]
        steps = steps + per_column
    return QuantizedWeight(steps.to(torch.int8), params, scheme)
