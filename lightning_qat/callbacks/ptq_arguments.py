"""What the arguments of PTQCallback must be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def check_whole_numbers(**values: Any) -> None:
    """Check that each of the values is None or a whole number of at least 1.

    Raises:
        ValueError: If one is not; it is named.
    """
    for name, value in values.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def check_not_negative(**values: Any) -> None:
    """Check that each of the values is None or a finite number of at least 0.

    Raises:
        ValueError: If one is not; it is named.
    """
    for name, value in values.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 <= value < math.inf):
            raise ValueError(f"{name}={value!r} must be a finite number, 0 or more.")


def check_calibration_data(batches: Any) -> None:
    """Check that calibration batches are None or several batches.

    Raises:
        TypeError: If they are no list.
        ValueError: If there are none.
    """
    if batches is not None and not isinstance(batches, (list, tuple)):
        raise TypeError("calibration_data must be a list of batches, such as list(loader).")
    if batches is not None and not batches:
        raise ValueError("calibration_data has no batches.")


def read_path(path: Any, name: str) -> Path | None:
    """Return a path; None stays None.

    Raises:
        TypeError: If it is none.
    """
    if path is not None and not isinstance(path, (str, Path)):
        raise TypeError(f"{name}={path!r} must be the path of a file.")
    return None if path is None else Path(path)
