"""Quality against bits in W&B: a table of records, and a line chart that opens without building a panel.

W&B is imported where it is used, so that nobody else pays for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_qat.records import FLOAT_CONTROL, EvalRecord

REFERENCE = FLOAT_CONTROL
"""What the line of the float control is called."""


@dataclass(frozen=True)
class Point:
    """A model on the chart.

    Attributes:
        method: The line that it is on.
        effective_bits: Bits per quantized weight, scales included.
        value: The metric.
        step: Optimizer steps, for the control that it is to be compared with.
    """

    method: str
    effective_bits: float
    value: float
    step: int


def quality_table(records: Iterable[EvalRecord], metric: str) -> Any:
    """Return a ``wandb.Table`` of records, one a row, with the values in a column named after the metric."""
    import wandb

    fields = ("method", "num_bits", "effective_bits", "model_bits", "value", "step", "trained_with")
    rows = [[getattr(each, field) for field in fields] for each in records]
    return wandb.Table(columns=[metric if field == "value" else field for field in fields], data=rows)


def quality_chart(points: Sequence[Point], controls: Mapping[int, float], metric: str, title: str) -> Any:
    """Return a W&B line chart of a metric against effective bits, a line for each method.

    Values that are not finite are left out: nothing can be drawn of them.

    Args:
        points: The quantized models.
        controls: The metric of the float control by optimizer step. It is drawn over all bits, at each at the step
            of the newest point there.
        metric: Name of the metric.
        title: Title of the chart.
    """
    import wandb

    drawn = [*_reference(points, controls), *points]
    rows = [[each.effective_bits, each.value, each.method] for each in drawn if math.isfinite(each.value)]
    table = wandb.Table(columns=["effective_bits", metric, "method"], data=rows)
    return wandb.plot.line(table, "effective_bits", metric, stroke="method", title=title)


def _reference(points: Sequence[Point], controls: Mapping[int, float]) -> list[Point]:
    steps: dict[float, int] = {}
    for point in points:
        if point.step in controls:
            steps[point.effective_bits] = max(point.step, steps.get(point.effective_bits, 0))
    return [Point(REFERENCE, bits, controls[steps[bits]], steps[bits]) for bits in sorted(steps)]
