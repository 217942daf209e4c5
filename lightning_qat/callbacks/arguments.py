"""What the arguments of QATCallback stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_qat.core import Schedule
from lightning_qat.core.registry import build
from lightning_qat.schedules import SCHEDULES, Constant, Staircase


def build_schedule(spec: str | Schedule | Sequence[float] | Mapping[Any, Any] | None, final_bits: float) -> Schedule:
    """Return the schedule that ``spec`` stands for; see :class:`~lightning_qat.callbacks.QATCallback`.

    Raises:
        ValueError: If it is not valid, or does not end at ``final_bits``.
    """
    if spec is None:
        return Constant(final_bits)
    schedule = _read_schedule(spec)
    if schedule.final_bits != final_bits:
        raise ValueError(
            f"The schedule ends at {schedule.final_bits:g} bits, but the scheme is {final_bits:g} bits wide. Let the "
            f"last rung be {final_bits:g}, or give the scheme that the schedule ends at."
        )
    return schedule


def _read_schedule(spec: str | Schedule | Sequence[float] | Mapping[Any, Any]) -> Schedule:
    if isinstance(spec, Schedule):
        return spec
    if isinstance(spec, str) or (isinstance(spec, Mapping) and "name" in spec):
        return build(spec, SCHEDULES, "schedule")
    if isinstance(spec, Mapping):
        return Staircase(dict(spec))
    if isinstance(spec, Sequence):
        return Staircase([*spec])
    raise TypeError(
        f"schedule={spec!r} must be a list of widths ([8, 4, 3]), a mapping from positions to widths ({{0: 8, 500: 4}} "
        "in optimizer steps, {0.0: 8, 0.5: 4} in fractions of the run), or leave it out for one width throughout."
    )
