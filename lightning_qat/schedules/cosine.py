"""Bits that go down along half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from lightning_qat.schedules.ramp import Ramp


@dataclass(frozen=True)
class Cosine(Ramp):
    """Go down along half a cosine, rounded up to the next width that a grid can have.

    At step ``t`` of ``T`` the curve is at ``final_bits + (start_bits - final_bits) * (1 + cos(pi * t / T)) / 2``: it
    stays longer near both ends than a line does.

    Example::

        >>> Cosine(final_bits=4).rungs(start=0, total_steps=1000)
        [(0, 8), (167, 7), (250, 6), (334, 5), (500, 4)]
    """

    def share_at(self, height: Fraction) -> Fraction | float:
        """Return the share of the ramp after which the curve is at ``height``."""
        return math.acos(2 * height - 1) / math.pi
