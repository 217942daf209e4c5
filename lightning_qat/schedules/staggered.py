"""Weights and inputs at widths of their own: weights first, or activations first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_qat.core.protocols import Schedule
from lightning_qat.schedules.open_loop import OpenLoop
from lightning_qat.schedules.specs import read_schedule


@dataclass(frozen=True)
class Staggered(OpenLoop):
    """Give the quantizers of weights and those of inputs a schedule each.

    Weights first: ``Staggered(weights=[4], activations={0.0: 16, 0.3: 8})``, in which 16 bits are float. Activations
    first: ``Staggered(weights={0.0: 16, 0.3: 4}, activations=[8])``.

    Args:
        weights: The schedule of the weights: any but one that follows a metric, as an object, or a list or mapping for
            a staircase. ``QATCallback`` also takes names (``"linear"``).
        activations: The schedule of the inputs, likewise.

    Raises:
        ValueError: If one of them is not valid.

    Example::

        >>> schedule = Staggered(weights=[4], activations={0.0: 16, 0.3: 8})
        >>> schedule.rungs(0, 100), schedule.activation_rungs(0, 100)
        ([(0, 4)], [(0, 16), (30, 8)])
    """

    weights: Schedule | Sequence[float] | Mapping[float, float]
    activations: Schedule | Sequence[float] | Mapping[float, float]

    def __post_init__(self) -> None:
        """Read the parts."""
        for name in ("weights", "activations"):
            part: Any = read_schedule(getattr(self, name), {})
            if part.monitor is not None or isinstance(part, Staggered):
                raise ValueError(
                    f"The schedule of the {name} must look at the step alone, and be one for itself; "
                    f"{type(part).__name__} is not. Give a list of widths, a mapping, 'linear' or 'cosine'."
                )
            object.__setattr__(self, name, part)

    @property
    def parts(self) -> tuple[Schedule, Schedule]:
        """The schedules of weights and of inputs."""
        return self.weights, self.activations  # type: ignore[return-value]  # read in __post_init__

    @property
    def final_bits(self) -> float:
        """The smaller of the two final widths."""
        return min(part.final_bits for part in self.parts)

    @property
    def is_fractional(self) -> bool:
        """Whether the length of the run must be known."""
        return any(part.is_fractional for part in self.parts)

    def rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]]:
        """Return (first step, bits) of the rungs of the weights."""
        return self.parts[0].rungs(start, total_steps)

    def activation_rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]] | None:
        """Return (first step, bits) of the rungs of the inputs."""
        return self.parts[1].rungs(start, total_steps)
