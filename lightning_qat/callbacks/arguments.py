"""What the arguments of QATCallback stand for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from lightning_qat.core import PASS_THROUGH_BITS, WIDTHS, Schedule
from lightning_qat.core.registry import build
from lightning_qat.nn import Rule
from lightning_qat.schedules import SCHEDULES, Constant, Staircase


def find_final_bits(rules: Sequence[Rule]) -> float:
    """Return the smallest width of all schemes, at which a schedule must end.

    Raises:
        ValueError: If no rule has a scheme.
    """
    widths = [rule.scheme.final_bits for rule in rules if rule.scheme is not None]
    if not widths:
        raise ValueError("No rule has a scheme, so nothing would be quantized. Remove the callback or give one.")
    return min(widths)


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


def check_positive(value: Any, name: str, kind: Any = Real) -> None:
    """Check that an optional number is a positive, finite one of the given kind.

    Raises:
        TypeError: If it is no such number.
        ValueError: If it is not positive or not finite.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} must be a {'whole ' if kind is Integral else ''}number.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name}={value} must be positive and finite; leave it out for the default.")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def read_bits(bits: float | Sequence[float] | None, name: str) -> tuple[float, ...] | None:
    """Return one or several widths as a tuple; None stays None.

    Raises:
        ValueError: If one is no width of a quantized weight, or occurs twice.
    """
    if bits is None:
        return None
    widths = tuple(bits) if isinstance(bits, Iterable) else (bits,)
    allowed = sorted(set(WIDTHS) - {PASS_THROUGH_BITS})
    if not widths or True in map(_is_bool, widths) or not set(widths) <= set(allowed) or len(set(widths)) < len(widths):
        raise ValueError(f"{name}={bits!r} must be one or more different widths out of {allowed}.")
    return widths
