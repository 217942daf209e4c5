"""What schedules that only look at the step have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

from lightning_qat.core import WIDTHS


class OpenLoop:
    """A schedule without memory: metrics do not change it and a resumed run needs no state.

    A subclass has to say ``final_bits``, ``is_fractional`` and ``rungs``; see
    :class:`~lightning_qat.core.protocols.Schedule`.
    """

    monitor: ClassVar[str | None] = None

    def activation_rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]] | None:
        """Return None: inputs are on the rungs of the weights."""
        return None

    def update(self, metrics: Mapping[str, float], step: int, start: int, total_steps: int | None) -> str | None:
        """Ignore ``metrics``."""
        return None

    def may_go_back(self, step: int, start: int, total_steps: int | None) -> bool:
        """Return False: a rung is never left for the one before it."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Ignore ``state``."""


def check_width(num_bits: Any) -> None:
    """Check that ``num_bits`` is a width that a grid can have.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(num_bits, (bool, str)) or num_bits not in WIDTHS:
        raise ValueError(f"{num_bits!r} is not a width in bits; a schedule goes through some of {WIDTHS}.")


def is_fraction(position: Any) -> bool:
    """Return whether a position is a share of the run and not a number of optimizer steps."""
    return isinstance(position, float)


def position_to_step(position: float, total_steps: int | None) -> int:
    """Return the optimizer step of a position: a whole number is a step, a fraction a share of the run.

    The share is taken as it is written (0.29 of 100 steps is step 29, although ``0.29 * 100 < 29``) and
    rounded down, so that every share below 1 is reached.

    Raises:
        ValueError: If a share is asked for and ``total_steps`` is None, the position is out of range, or it is
            no number.
    """
    if type(position) not in (int, float):
        raise ValueError(f"{position!r} must be a number of optimizer steps (int) or a fraction of the run (float).")
    if isinstance(position, int):
        if position < 0:
            raise ValueError(f"A position in optimizer steps cannot be negative, got {position}.")
        return position
    if not 0 <= position < 1:
        raise ValueError(
            f"A fraction of the run must be in [0, 1), got {position}: training ends before 1.0 is reached. "
            "Write a whole number for optimizer steps."
        )
    if total_steps is None:
        raise ValueError(f"The position {position} is a fraction of a run that has no known end.")
    return math.floor(Fraction(repr(position)) * total_steps)
