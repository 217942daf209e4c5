"""What schedules along a curve have in common."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

from lightning_qat.core import WIDTHS
from lightning_qat.schedules.open_loop import OpenLoop, check_width, is_fraction, position_to_step


@dataclass(frozen=True)
class Ramp(OpenLoop, ABC):
    """Go down along a curve from ``start_bits`` to ``final_bits``, through all widths that a grid can have.

    Args:
        final_bits: Width at which the curve ends.
        start_bits: Width at which it begins.
        end: Where it ends, as an optimizer step or as a fraction of the run. Published runs that gained by annealing
            spent half of their steps or more at the final width, hence the default.

    Raises:
        ValueError: If a width does not exist, the curve goes up, or ``end`` is out of range.
    """

    final_bits: float
    start_bits: float = 8
    end: float = 0.5

    def __post_init__(self) -> None:
        """Validate the fields."""
        check_width(self.final_bits)
        check_width(self.start_bits)
        if self.start_bits < self.final_bits:
            raise ValueError(
                f"A schedule must go down, but start_bits={self.start_bits} is less than final_bits={self.final_bits}."
            )
        position_to_step(self.end, total_steps=1)

    @abstractmethod
    def share_at(self, height: Fraction) -> Fraction | float:
        """Return the share of the ramp, 0 to 1, after which the curve is at ``height`` (1 at first, 0 at last)."""

    @property
    def is_fractional(self) -> bool:
        """Whether the length of the run must be known."""
        return is_fraction(self.end) and self.end > 0

    def rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]]:
        """Return (first step, bits) of the rungs; on a run that is too short, early ones are left out.

        A width begins at the first step at which the curve is at or below it, so that the final one begins at ``end``.

        Raises:
            ValueError: If the run ends before the curve, fake quantization starts after it, or the length of the run
                is needed and not known.
        """
        end = position_to_step(self.end, total_steps)
        if total_steps is not None and end >= total_steps:
            raise ValueError(
                f"The final width ({self.final_bits:g} bits) is reached at step {end}, but the run has only "
                f"{total_steps} optimizer steps. Train longer, or let the schedule end earlier (or at a fraction)."
            )
        if end < start:
            raise ValueError(
                f"The schedule reaches {self.final_bits:g} bits at step {end}, but fake quantization starts only after "
                f"step {start}. Start earlier, or raise end={self.end}."
            )
        reached = {start + self._delay(width, end - start): width for width in self._widths()}
        return sorted(reached.items())  # of rungs that share a step, the last one stays

    def _widths(self) -> list[float]:
        return [width for width in sorted(WIDTHS, reverse=True) if self.final_bits <= width <= self.start_bits]

    def _delay(self, width: float, length: int) -> int:
        """Return after how many of ``length`` steps the curve is at or below ``width``."""
        if width == self.start_bits:
            return 0
        low, high = Fraction(str(self.final_bits)), Fraction(str(self.start_bits))
        share = self.share_at((Fraction(str(width)) - low) / (high - low))
        return math.ceil(share * length - Fraction(1, 10**9))  # a cosine is not exact
