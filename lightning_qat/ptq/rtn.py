"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_qat.core.grid import QuantizedWeight, quantize
from lightning_qat.core.protocols import Observer
from lightning_qat.core.scheme import QuantScheme


@dataclass(frozen=True)
class RTN:
    """Give every weight the code of the nearest level; the baseline that needs no data."""

    def __call__(self, weight: Tensor, scheme: QuantScheme, observer: Observer) -> QuantizedWeight:
        """Return ``weight`` ``[O, I]`` rounded to the grid that ``observer`` chooses."""
        params = observer(weight, scheme)
        return QuantizedWeight(quantize(weight, params, scheme), params, scheme)
