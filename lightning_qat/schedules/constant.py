"""One width from start to end."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_qat.schedules.open_loop import OpenLoop, check_width


@dataclass(frozen=True)
class Constant(OpenLoop):
    """Train at ``num_bits`` throughout.

    Args:
        num_bits: Width in bits.

    Raises:
        ValueError: If no grid has that width.
    """

    num_bits: float

    def __post_init__(self) -> None:
        """Validate the width."""
        check_width(self.num_bits)

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
