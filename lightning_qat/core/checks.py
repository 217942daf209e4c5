"""Checks of arguments that several parts take."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def check_positive(value: Any, name: str, kind: Any = Real) -> None:
    """Check that an optional number is a positive, finite one of the given kind.

    Raises:
        TypeError: If it is no such number.
        ValueError: If it is not positive or not finite.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name}={value!r} must be a {'' if kind is Real else 'whole '}number.")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name}={value} must be positive and finite; leave it out for the default.")


def check_choice(value: Any, name: str, choices: tuple[str, ...]) -> None:
    """Check that a value is one of several names.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, choices))}.")
