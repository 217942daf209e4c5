"""Bits that go down along a line."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from lightning_qat.schedules.ramp import Ramp


@dataclass(frozen=True)
class Linear(Ramp):
    """Go down along a line, rounded up to the next width that a grid can have.

    At step ``t`` of ``T`` the line is at ``start_bits + (final_bits - start_bits) * t / T``. Whole widths get equal
    shares of the ramp.

    Example::

        >>> Linear(final_bits=4).rungs(start=0, total_steps=1000)
        [(0, 8), (125, 7), (250, 6), (375, 5), (500, 4)]
    """

    def share_at(self, height: Fraction) -> Fraction | float:
        """Return the share of the ramp after which the line is at ``height``."""
        return 1 - height
