"""Bits that go down in steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_qat.schedules.open_loop import OpenLoop, check_width, position_to_step


@dataclass(frozen=True)
class Staircase(OpenLoop):
    """Go down from rung to rung.

    Args:
        bits: Widths from first to last, which share the steps from the start of fake quantization to the
            end of the run equally (``[8, 4, 3, 2]``); or where each rung begins, as optimizer steps
            (``{0: 8, 500: 4, 1000: 3}``) or as fractions of the whole run (``{0.0: 8, 0.25: 4, 0.5: 3}``).

    Raises:
        ValueError: If a width does not exist or they do not go down, the first rung is not at 0, or
            positions are mixed or out of range.

    Example::

        >>> Staircase([8, 4, 3, 2]).rungs(start=0, total_steps=1000)
        [(0, 8), (250, 4), (500, 3), (750, 2)]
        >>> Staircase([8, 4, 3, 2]).rungs(start=0, total_steps=2)  # too short for four rungs
        [(0, 4), (1, 2)]
    """

    bits: Sequence[float] | Mapping[float, float]
    positions: tuple[float, ...] = field(init=False)
    widths: tuple[float, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Split ``bits`` into positions and widths, and validate them."""
        is_mapping = isinstance(self.bits, Mapping)
        if isinstance(self.bits, Mapping):
            for position in self.bits:
                position_to_step(position, total_steps=1)
        object.__setattr__(self, "positions", tuple(sorted(self.bits)) if is_mapping else ())
        widths = (self.bits[key] for key in self.positions) if isinstance(self.bits, Mapping) else self.bits
        object.__setattr__(self, "widths", tuple(widths))
        for num_bits in self.widths:
            check_width(num_bits)
        if not self.widths:
            raise ValueError("The schedule is empty. Give widths, such as [8, 4, 3], or leave it out.")
        if any(a <= b for a, b in zip(self.widths, self.widths[1:], strict=False)):
            raise ValueError(f"The widths of a staircase must go down from rung to rung, got {list(self.widths)}.")
        if is_mapping:
            self._check_positions()

    def _check_positions(self) -> None:
        if self.positions[0] != 0:
            raise ValueError(
                f"The first rung must begin at 0, not at {self.positions[0]}. To start later, use "
                "fake_quant_after_n_steps."
            )
        if len({type(position) for position in self.positions[1:]}) > 1:
            raise ValueError(
                f"The positions {list(self.positions)} mix optimizer steps (whole numbers) with fractions of the run. "
                "Use one kind."
            )

    @property
    def final_bits(self) -> float:
        """Width of the last rung."""
        return self.widths[-1]

    @property
    def is_fractional(self) -> bool:
        """Whether the length of the run must be known."""
        if not self.positions:
            return len(self.widths) > 1
        return any(isinstance(position, float) and position for position in self.positions)

    def rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]]:
        """Return (first step, bits) of the rungs; on a run that is too short, early ones are left out.

        Raises:
            ValueError: If the run ends before a rung, fake quantization starts after one, or the length of
                the run is needed and not known.
        """
        steps = self._first_steps(start, total_steps)
        if total_steps is not None and steps[-1] >= total_steps:
            raise ValueError(
                f"The last rung ({self.final_bits:g} bits) begins at step {steps[-1]}, but the run has only "
                f"{total_steps} optimizer steps. Train longer, or let it begin earlier (or at a fraction of the run)."
            )
        if len(self.positions) > 1 and start > 0 and steps[1] < start:
            raise ValueError(
                f"The rung of {self.widths[1]:g} bits begins at step {steps[1]}, but fake quantization starts "
                f"only after step {start}. Start earlier or move the rungs."
            )
        reached = dict(zip(steps, self.widths, strict=True))  # of rungs that share a step, the last one stays
        return sorted(reached.items())

    def _first_steps(self, start: int, total_steps: int | None) -> list[int]:
        if self.positions:
            return [start, *(position_to_step(position, total_steps) for position in self.positions[1:])]
        if len(self.widths) == 1:
            return [start]
        if total_steps is None:
            raise ValueError("Rungs that share the run equally need a run with a known end.")
        remaining = total_steps - start
        return [start + index * remaining // len(self.widths) for index in range(len(self.widths))]
