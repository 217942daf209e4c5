"""What the arguments of QATCallback stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_qat.core import Schedule
from lightning_qat.nn import Rule, find_final_bits
from lightning_qat.schedules import SCHEDULES, Constant, ScheduleLike, Staggered, read_schedule


def build_schedule(spec: ScheduleLike | None, rules: Sequence[Rule]) -> Schedule:
    """Return the schedule that ``spec`` stands for; see :class:`~lightning_qat.callbacks.QATCallback`.

    Args:
        spec: The argument.
        rules: The rules, whose final widths it must reach.

    Raises:
        TypeError: If it is not something that stands for a schedule.
        ValueError: If it is not valid, or does not end at those widths.
    """
    final_bits = find_final_bits(rules)
    if spec is None:
        return Constant(final_bits)
    if isinstance(spec, Mapping) and spec.get("name") == "staggered":
        spec = _read_parts(spec, rules)
    schedule = read_schedule(spec, SCHEDULES, final_bits)
    if isinstance(schedule, Staggered):
        for name, part in zip(("weights", "activations"), schedule.parts, strict=True):
            _check_end(part, _final_bits(rules, name), f"schedule of the {name}", f"{name} of the scheme are")
    else:
        _check_end(schedule, final_bits, "schedule", "scheme is")
    return schedule


def _read_parts(spec: Mapping[Any, Any], rules: Sequence[Rule]) -> dict[str, Any]:
    """Return the mapping of a staggered schedule with its parts read, whose final widths differ."""
    return {
        str(key): read_schedule(part, SCHEDULES, _final_bits(rules, key)) if key in ("weights", "activations") else part
        for key, part in spec.items()
    }


def _final_bits(rules: Sequence[Rule], part: str) -> float:
    """Return the smallest width of the weights or the activations."""
    schemes = [rule.scheme for rule in rules if rule.scheme is not None]
    if part == "weights":
        return min(scheme.num_bits for scheme in schemes)
    widths = [scheme.activation.num_bits for scheme in schemes if scheme.activation is not None]
    if not widths:
        raise ValueError(
            "The schedule gives activations widths of their own, but the scheme leaves them in float. Give a scheme "
            "with activations, such as 'w4a8', or a schedule of the weights alone."
        )
    return min(widths)


def _check_end(schedule: Schedule, final_bits: float, what: str, subject: str) -> None:
    if schedule.final_bits != final_bits:
        raise ValueError(
            f"The {what} ends at {schedule.final_bits:g} bits, but the {subject} {final_bits:g} bits wide. Let the "
            f"last rung be {final_bits:g}, or give the scheme that the schedule ends at."
        )
