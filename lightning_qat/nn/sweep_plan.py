"""Which widths a sweep has, and which layers: what is refused before any time is spent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from torch import nn

from lightning_qat.core import PASS_THROUGH_BITS, WIDTHS, QuantScheme
from lightning_qat.nn.layers import QATLayer
from lightning_qat.nn.plan import Plan
from lightning_qat.nn.rules import Rule, find_final_bits
from lightning_qat.nn.selection import make_plan


def read_bits(bits: float | Sequence[float] | None, name: str) -> tuple[float, ...] | None:
    """Return one or several widths as a tuple; None stays None.

    Raises:
        ValueError: If one is no width of a quantized weight, or occurs twice.
    """
    if bits is None:
        return None
    widths = tuple(bits) if isinstance(bits, Iterable) else (bits,)
    allowed = sorted(set(WIDTHS) - {PASS_THROUGH_BITS})
    is_number = not any(isinstance(width, bool) for width in widths)
    if not widths or not is_number or not set(widths) <= set(allowed) or len(set(widths)) < len(widths):
        raise ValueError(f"{name}={bits!r} must be one or more different widths out of {allowed}.")
    return widths


def plan_sweep(
    root: nn.Module,
    bits: Sequence[float],
    rules: Sequence[Rule] | None,
    ignore: Sequence[str],
    target_module: str | None,
    mapping: Mapping[type[nn.Module], type[QATLayer]] | None,
) -> Plan:
    """Return the layers of a float ``root`` that a sweep over ``bits`` quantizes; frozen ones, too.

    Args:
        root: The float model.
        bits: The widths.
        rules: Rules at the smallest width. Default: symmetric per channel at the smallest of ``bits``.
        ignore: Patterns of modules that stay in float.
        target_module: Name of the submodule outside which nothing is quantized.
        mapping: Further layer classes.

    Raises:
        ValueError: If a width is below those of the rules, or they do not fit the model.
    """
    rules = rules or [Rule("*", QuantScheme(min(bits)))]
    lowest = find_final_bits(rules)
    if min(bits) < lowest:
        raise ValueError(
            f"bits={min(bits):g} is narrower than the scheme, {lowest:g} bits. Give the scheme at the smallest "
            "width; a wider one follows from it."
        )
    return make_plan(root, rules, ignore, target_module, mapping, include_frozen=True)


def progress_bar(batches: Sequence[Any], label: str) -> Iterator[Any]:
    """Yield ``batches``, with a bar on the standard error."""
    yield from track(batches, label, console=Console(stderr=True), transient=True)
