"""A histogram that grows with what it sees, without ever moving a value to another bin than its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST_EXPONENT = -100
_LARGEST_EXPONENT = 128
_HEAD = 3  # smallest value, largest value, exponent


@dataclass(frozen=True)
class Histogram:
    """Counts of values in ``num_bins`` bins of one width over ``[-2**e, 2**e)``.

    The exponent ``e`` is the least that fits the values. When it grows by one, two neighbouring bins become one, so
    that the counts are at every time those of all values at the present width: nothing is interpolated. The values
    span at least a quarter of the bins.

    A histogram is a float32 tensor ``[3 + num_bins]``: the smallest value, the largest, the exponent, the counts.

    Args:
        num_bins: Number of bins, even.
    """

    num_bins: int = 4096

    def __post_init__(self) -> None:
        """Validate the number of bins."""
        if type(self.num_bins) is not int or self.num_bins < 2 or self.num_bins % 2:
            raise ValueError(f"num_bins={self.num_bins!r} must be a positive, even number.")

    def empty(self, device: torch.device | None = None) -> Tensor:
        """Return the histogram of nothing."""
        head = torch.tensor([torch.inf, -torch.inf, _SMALLEST_EXPONENT], dtype=torch.float32, device=device)
        return torch.cat([head, head.new_zeros(self.num_bins)])

    def collect(self, x: Tensor) -> Tensor:
        """Return the histogram of ``x``, of any shape and floating dtype, but not empty."""
        x = x.flatten().float()
        smallest, largest = torch.aminmax(x)
        exponent = torch.frexp(torch.maximum(smallest.abs(), largest.abs()))[1]
        exponent = exponent.clamp(_SMALLEST_EXPONENT, _LARGEST_EXPONENT).float()
        ones = torch.ones((), dtype=torch.int64, device=x.device).expand(x.shape)  # float32 counts to 2**24, no further
        counts = self._count(torch.floor(x * torch.exp2(-exponent) * self._half), ones)
        return torch.cat([torch.stack([smallest, largest, exponent]), counts.float()])

    def merge(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the histogram of what both have seen."""
        exponent = torch.maximum(first[2], second[2])
        head = [torch.minimum(first[0], second[0]), torch.maximum(first[1], second[1]), exponent]
        return torch.cat([torch.stack(head), self._widen(first, exponent) + self._widen(second, exponent)])

    def update(self, seen: Tensor, batch: Tensor) -> Tensor:
        """Return the histogram of the earlier batches and this one."""
        return self.merge(seen, batch)

    def edges(self, seen: Tensor) -> Tensor:
        """Return the lower end of every bin, float32 ``[num_bins]``, and of the one after the last."""
        steps = torch.arange(-self._half, self._half + 1, device=seen.device, dtype=torch.float32)
        return steps / self._half * torch.exp2(seen[2])

    @staticmethod
    def counts(seen: Tensor) -> Tensor:
        """Return the number of values in each bin, ``[num_bins]``."""
        return seen[_HEAD:]

    @property
    def _half(self) -> int:
        return self.num_bins // 2

    def _widen(self, seen: Tensor, exponent: Tensor) -> Tensor:
        """Return the counts of ``seen`` in the bins of a larger ``exponent``."""
        steps = torch.arange(-self._half, self._half, device=seen.device, dtype=torch.float32)
        return self._count(torch.floor(steps * torch.exp2(seen[2] - exponent)), self.counts(seen))

    def _count(self, steps: Tensor, numbers: Tensor) -> Tensor:
        # NaN has no bin; that it was seen is known from the smallest value.
        index = (steps + self._half).nan_to_num(0.0).clamp(0, self.num_bins - 1).long()
        return numbers.new_zeros(self.num_bins).scatter_add(0, index, numbers)
