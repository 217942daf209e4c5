"""Round to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_qat.core.grid import QuantizedWeight, quantize
from lightning_qat.core.protocols import Observer
from lightning_qat.core.scheme import QuantScheme
from lightning_qat.core.stats import LayerStats


@dataclass(frozen=True)
class RTN:
    """Give every weight the code of the nearest level; the baseline that needs no data."""

    needs_stats: ClassVar[bool] = False

    def __call__(
        self, weight: Tensor, schemes: Sequence[QuantScheme], observer: Observer, stats: LayerStats | None = None
    ) -> list[QuantizedWeight]:
        """Return ``weight`` ``[O, I]`` rounded to the grid that ``observer`` chooses, for each scheme."""
        results = []
        for scheme in schemes:
            params = observer(weight, scheme)
            results.append(QuantizedWeight(quantize(weight, params, scheme), params, scheme))
        return results
