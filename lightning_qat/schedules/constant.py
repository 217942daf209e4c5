"""One width from start to end."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_qat.schedules.open_loop import OpenLoop


@dataclass(frozen=True)
class Constant(OpenLoop):
    """Train at ``num_bits`` throughout.

    Args:
        num_bits: Width in bits.
    """

    num_bits: float

    @property
    def final_bits(self) -> float:
        """Width of the only rung."""
        return self.num_bits

    @property
    def is_fractional(self) -> bool:
        """The length of the run does not matter."""
        return False

    def rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]]:
        """Return the one rung."""
        return [(start, self.num_bits)]
