"""The range that learned scales begin with in LSQ, from the mean of the absolute weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantParams, group_view, qparams_from_range, round_scale
from lightning_qat.core.scheme import Levels, QuantScheme


@dataclass(frozen=True)
class AbsMeanObserver:
    """Take ``2 * mean(|w|) / sqrt(Qp)`` as the scale; ``Qp`` is the outermost level, and at least 1.

    At 1 bit this is the binary grid with the least squared error, ``±mean(|w|)``.

    Source: LSQ (arXiv:1902.08153), section 2.1; at 1 bit XNOR-Net (arXiv:1603.05279), equation 6, as in ParetoQ. On the
    grid without a zero, which neither has, ``Qp`` is 1.5.
    """

    every_forward: ClassVar[bool] = False
    refresh_every_n_steps: ClassVar[int] = 1

    @torch.no_grad()
    def __call__(
        self, weight: Tensor, scheme: QuantScheme, levels: Levels | None = None, importance: Tensor | None = None
    ) -> QuantParams:
        """Return the grid for each group of ``weight`` ``[O, I]``; ``importance`` has no effect.

        Raises:
            ValueError: If the scheme is asymmetric: a mean says nothing of a zero-point.
        """
        if not scheme.symmetric:
            raise ValueError("The observer 'absmean' is for symmetric grids. Use 'minmax' or 'mse' for this scheme.")
        _, qmax, zero_offset, _ = levels or scheme.levels()
        outermost = torch.as_tensor(qmax + zero_offset, dtype=torch.float32, device=weight.device).clamp(min=1)
        groups = group_view(weight.float(), scheme)
        mean_abs = groups.abs().sum(-1) / group_view(torch.ones_like(weight, dtype=torch.float32), scheme).sum(-1)
        sign = qparams_from_range(*torch.aminmax(groups, dim=-1), scheme, levels).scale.sign()
        return QuantParams(round_scale(sign * 2 * mean_abs * outermost.rsqrt(), scheme.torch_scale_dtype))
