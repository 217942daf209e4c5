"""Round to nearest on the grid that suits the layer's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from lightning_qat.core.grid import QuantizedWeight, quantize
from lightning_qat.core.protocols import Observer
from lightning_qat.core.scheme import QuantScheme
from lightning_qat.core.stats import LayerStats
from lightning_qat.observers import MSEObserver
from lightning_qat.ptq.ranges import search_ranges


@dataclass(frozen=True)
class IMatrix:
    """Round to nearest, the range of each group chosen for the least squared error weighted by E[x²].

    A row whose output would be worse than with the observer's range keeps that.

    Args:
        search: Where the range is searched.

    Source: the importance matrix of llama.cpp, as in llm-compressor's ``imatrix_mse`` observer; here with the
    squared error and an exhaustive search, and with the comparison to the observer's range.
    """

    needs_stats: ClassVar[bool] = True
    search: MSEObserver = field(default_factory=MSEObserver)

    def __call__(
        self, weight: Tensor, schemes: Sequence[QuantScheme], observer: Observer, stats: LayerStats | None = None
    ) -> list[QuantizedWeight]:
        """Return ``weight`` ``[O, I]`` rounded to the best grid for each scheme."""
        assert stats is not None
        results = []
        for scheme in schemes:
            params = search_ranges(weight.float(), scheme, stats, self.search, observer)
            results.append(QuantizedWeight(quantize(weight, params, scheme), params, scheme))
        return results
