"""The arguments of QATCallback that measured best, by the width of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_qat.core import QuantScheme
from lightning_qat.nn import Rule

_COMMON: dict[str, Any] = {"observer": "mse", "scale_lr": "same", "distillation": True}
_FREEZING: dict[str, Any] = {"oscillation": {"freeze_threshold": (0.04, 0.011), "momentum": 0.02}}

RECOMMENDED: Mapping[float, Mapping[str, Any]] = {
    4: {**_COMMON, **_FREEZING, "init": {"method": "gptq", "weights": True}},
    3: {**_COMMON, **_FREEZING},
    2: _COMMON,
}
"""By number of bits, what ``benchmarks/stories260k_qat.py`` calls everything; the grid at 2 bits is without a zero."""


def recommended_arguments(rules: Sequence[Rule], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for the narrowest weights of some rules; of 5 bits and more, the defaults.

    Args:
        rules: The rules.
        overrides: Arguments that take the place of those; without learned scales, ``init`` has nothing to begin.
    """
    schemes = [rule.scheme for rule in rules if rule.scheme is not None]
    narrowest = min(schemes, key=lambda scheme: scheme.num_bits)
    if _has_better_grid(narrowest):
        warnings.warn(
            f"The 2-bit grid without a zero measured better than that of {str(narrowest)!r}. Give "
            f"'{_without_zero(narrowest)}' if what the model is deployed on has such a grid.",
            stacklevel=3,
        )
    found = [arguments for num_bits, arguments in RECOMMENDED.items() if narrowest.num_bits <= num_bits]
    arguments = dict(found[-1]) if found else {}
    if "scale_lr" in overrides and overrides["scale_lr"] is None:
        arguments.pop("init", None)
    return {**arguments, **overrides}


def _has_better_grid(scheme: QuantScheme) -> bool:
    is_usual = scheme.symmetric and scheme.zero_offset == 0 and scheme.scale_rule == "half_range"
    return scheme.num_bits == 2 and is_usual


def _without_zero(scheme: QuantScheme) -> str:
    head, *flags = str(scheme).split("-")
    return "-".join([head, "nozero", *flags])
