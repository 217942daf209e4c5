"""What stands for a schedule in an argument."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_qat.core.protocols import Schedule
from lightning_qat.core.registry import build
from lightning_qat.schedules.staircase import Staircase

ScheduleLike = str | Schedule | Sequence[float] | Mapping[Any, Any]
"""A schedule: its name, a mapping with ``name`` and arguments, an object; or what a staircase is made of."""


def read_schedule(
    spec: ScheduleLike, registry: Mapping[str, type[Schedule]], final_bits: float | None = None
) -> Schedule:
    """Return the schedule that ``spec`` stands for.

    Args:
        spec: A name (``"linear"``), a mapping with ``name`` and arguments, a list of widths, a mapping from positions
            to widths, or a schedule.
        registry: Schedules by name.
        final_bits: Width of the scheme, for schedules that take it as an argument and are not given it.

    Raises:
        TypeError: If it is none of these, or an argument does not exist.
        ValueError: If it is not valid.
    """
    if isinstance(spec, Schedule) and not isinstance(spec, type):
        return spec
    if isinstance(spec, str) or (isinstance(spec, Mapping) and "name" in spec):
        named: dict[str, Any] = {"name": spec} if isinstance(spec, str) else {str(key): spec[key] for key in spec}
        cls = registry.get(named["name"])
        if final_bits is not None and cls is not None and "final_bits" in inspect.signature(cls).parameters:
            named = {"final_bits": final_bits, **named}
        return build(named, registry, "schedule")
    if isinstance(spec, Mapping):
        return Staircase(dict(spec))
    if isinstance(spec, Sequence):
        return Staircase([*spec])
    raise TypeError(
        f"schedule={spec!r} must be a list of widths ([8, 4, 3]), a mapping from positions to widths ({{0: 8, 500: 4}} "
        "in optimizer steps, {0.0: 8, 0.5: 4} in fractions of the run), a name or a mapping with one, an object with "
        "all that lightning_qat.core.Schedule has, or leave it out for one width throughout."
    )
