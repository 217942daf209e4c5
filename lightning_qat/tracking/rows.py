"""Records of several seeds brought together, with increase over the control and recovery."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_qat.records import FLOAT_BASE, FLOAT_CONTROL, EvalRecord, recovery

BASE, CONTROL, BASELINE = FLOAT_BASE, FLOAT_CONTROL, "rtn"


@dataclass(frozen=True)
class Row:
    """One method at one width and step, over all seeds.

    Attributes:
        method: Name of the method.
        num_bits: Width in bits, None in float.
        effective_bits: Bits per quantized weight, scales included.
        step: Optimizer steps of fine-tuning.
        metric: Name of the metric.
        values: Metric, one per seed.
        increase: Mean increase of the metric over the control at the same step, as a share of it.
        recovery: Recovery, or None where there is nothing to recover or nothing to compare with.
    """

    method: str
    num_bits: float | None
    effective_bits: float
    step: int
    metric: str
    values: tuple[float, ...]
    increase: float | None
    recovery: float | None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation over seeds, 0 with one, NaN if a value is not finite."""
        if not all(map(math.isfinite, self.values)):
            return math.nan
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


def make_rows(records: Sequence[EvalRecord]) -> list[Row]:
    """Return one row per method, width and step, in the order in which they first appear.

    Raises:
        ValueError: If the records hold several metrics, or a seed twice or not at all in a row.
    """
    metrics = {record.metric for record in records}
    if len(metrics) > 1:
        raise ValueError(f"The records hold several metrics, {sorted(metrics)}. Report them one by one.")
    groups: dict[tuple[str, float, int], list[EvalRecord]] = defaultdict(list)
    for record in records:
        groups[record.method, record.num_bits, record.step].append(record)
    seeds = sorted({record.seed for record in records})
    for key, members in groups.items():
        members.sort(key=lambda record: record.seed)
        if [record.seed for record in members] != seeds:
            raise ValueError(f"{key} was scored for the seeds {[r.seed for r in members]}, others for {seeds}.")
    return [_make_row(key, members, groups) for key, members in groups.items()]


def _make_row(
    key: tuple[str, float, int], members: list[EvalRecord], groups: dict[tuple[str, float, int], list[EvalRecord]]
) -> Row:
    method, num_bits, step = key
    controls = _find(groups, CONTROL, step)
    increase = None
    if controls and method not in (BASE, CONTROL) and all(record.value for record in controls):
        increase = statistics.fmean(r.value / c.value - 1 for r, c in zip(members, controls, strict=True))
    return Row(
        method=method,
        num_bits=None if method in (BASE, CONTROL) else num_bits,
        effective_bits=members[0].effective_bits,
        step=step,
        metric=members[0].metric,
        values=tuple(record.value for record in members),
        increase=increase,
        recovery=_recovery(members, _find(groups, BASELINE, step, num_bits), controls, _find(groups, BASE, 0)),
    )


def _find(
    groups: dict[tuple[str, float, int], list[EvalRecord]], method: str, step: int, num_bits: float | None = None
) -> list[EvalRecord]:
    for (found, bits, at), members in groups.items():
        if (found, at) == (method, step) and num_bits in (None, bits):
            return members
    return []


def _recovery(
    members: list[EvalRecord], baselines: list[EvalRecord], controls: list[EvalRecord], bases: list[EvalRecord]
) -> float | None:
    if not (baselines and controls and bases) or members[0].method in (BASE, CONTROL, BASELINE):
        return None
    reference = [min(control.loss, base.loss) for control, base in zip(controls, bases, strict=True)]
    return recovery([r.loss for r in members], [r.loss for r in baselines], reference)
