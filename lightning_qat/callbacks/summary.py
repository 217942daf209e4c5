"""The one compact table that is printed before training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.nn import Plan
from lightning_qat.nn.bits import bit_report


def print_summary(
    root: nn.Module, plan: Plan, timeline: Timeline, scale_policy: str, techniques: Sequence[tuple[str, str]] = ()
) -> None:
    """Print what is quantized, what is not and why, effective bits and the schedule."""
    table = Table(title="Quantization-aware training", show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for title, text in (*summary_rows(root, plan, timeline, scale_policy), *techniques):
        table.add_row(title.replace("_", " ").capitalize(), text)
    Console().print(table)


def summary_rows(root: nn.Module, plan: Plan, timeline: Timeline, scale_policy: str) -> list[tuple[str, str]]:
    """Return the rows of the summary as (title, text)."""
    report = bit_report(root)
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in plan.skipped.items():
        reasons[reason].append(name)
    floats = [f"{_name_some(names)}: {reason}" for reason, names in reasons.items()]
    idle = [("Rules without effect", ", ".join(plan.idle_targets))] if plan.idle_targets else []
    return [
        ("Quantized", _describe_layers(plan)),
        *idle,
        ("Left in float", "\n".join(floats) or "nothing that holds a matrix"),
        (
            "Bits per weight",
            f"{report.quantized:.2f} in the quantized layers, {report.model:.2f} in the whole model (with scales)",
        ),
        ("Schedule", str(timeline)),
        ("Scales", scale_policy),
    ]


def _describe_layers(plan: Plan) -> str:
    """Return how many layers have which scheme, and by name those that have another than most."""
    by_scheme: dict[str, list[str]] = defaultdict(list)
    for layer in plan.layers:
        by_scheme[str(layer.scheme)].append(layer.name)
    most = max(map(len, by_scheme.values()))
    usual = next(scheme for scheme, names in by_scheme.items() if len(names) == most)
    adapted = sum(len(layer.parameters) > 1 for layer in plan.layers)
    merged = f"; {adapted} of them with their adapters merged, as they are deployed" if adapted else ""
    named = {scheme: "" if scheme == usual else f" ({_name_some(names)})" for scheme, names in by_scheme.items()}
    counts = [f"{_count(len(by_scheme[scheme]), 'layer')} at {scheme}{names}" for scheme, names in named.items()]
    return ", ".join(counts) + merged


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _name_some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
