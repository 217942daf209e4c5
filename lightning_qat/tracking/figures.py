"""The quality-vs-bits figure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from lightning_qat.tracking.rows import BASE, CONTROL, Row
from lightning_qat.tracking.tables import LABELS

_COLORS = {"rtn": "#d1495b", "qat": "#00798c", "gptq": "#edae49", "awq": "#66a182", "qat_annealed": "#8d6a9f"}

_VISIBLE_INCREASE = 0.01
_CROWDED_RATIO = 1.25


def draw_quality_vs_bits(rows: Sequence[Row], title: str, path: str | Path) -> Path:
    """Draw the metric of every method against its width, the float control as a reference, and save it.

    Of several steps at one width the last is drawn.

    Args:
        rows: What to draw.
        title: Title of the figure.
        path: Where to save it; the ending gives the format.

    Returns:
        ``path``.
    """
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    rows = _last_of_each(rows)
    quantized = [row for row in rows if row.num_bits is not None]
    widths = sorted({row.num_bits for row in quantized if row.num_bits is not None})
    positions = {num_bits: index for index, num_bits in enumerate(widths)}
    markers = itertools.cycle("osD^vP")
    for method in dict.fromkeys(row.method for row in quantized):
        ours = sorted((row for row in quantized if row.method == method), key=lambda row: row.effective_bits)
        _draw_method(axes, method, ours, positions, next(markers))
    _draw_control(axes, rows, positions)
    _annotate_increase(axes, quantized, positions)
    _label_widths(axes, quantized, positions)
    _label_metric(axes, rows)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.legend(frameon=False)
    axes.grid(axis="y", which="both", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return Path(path)


def _last_of_each(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without those of which there is a later one of the same method and width, in float all."""
    last: dict[tuple[str, float | None], int] = {}
    for row in rows:
        key = (row.method, row.num_bits)
        last[key] = max(row.step, last.get(key, 0))
    return [row for row in rows if row.num_bits is None or row.step == last[row.method, row.num_bits]]


def _draw_method(axes: Axes, method: str, rows: Sequence[Row], positions: dict[float, int], marker: str) -> None:
    axes.errorbar(
        [positions[row.num_bits] for row in rows if row.num_bits is not None],
        [row.mean for row in rows],
        yerr=[row.std for row in rows] if any(row.std for row in rows) else None,
        label=LABELS.get(method, method),
        color=_COLORS.get(method),
        marker=marker,
        markersize=7,
        linewidth=2,
        capsize=4,
    )


def _annotate_increase(axes: Axes, rows: Sequence[Row], positions: dict[float, int]) -> None:
    """Write how far the worst and the best point of each width are above the control, where that can be seen."""
    for num_bits, position in positions.items():
        points = sorted((row for row in rows if row.num_bits == num_bits), key=lambda row: row.mean)
        is_crowded = len(points) > 1 and points[1].mean < _CROWDED_RATIO * points[0].mean
        for row, offset in ((points[-1], (8, 5)), (points[0], (8, -14 if is_crowded else 5)))[: len(points)]:
            if row.increase is not None and abs(row.increase) >= _VISIBLE_INCREASE:
                label, color = f"{row.increase:+.0%}", _COLORS.get(row.method)
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # where the control passes behind
                point = (position, row.mean)
                axes.annotate(label, point, offset, textcoords="offset points", color=color, bbox=box)


def _draw_control(axes: Axes, rows: Sequence[Row], positions: dict[float, int]) -> None:
    """Draw the control at the step at which each width was scored."""
    at_step = {row.step: row for row in rows if row.method == CONTROL}
    quantized = sorted(
        (row for row in rows if row.num_bits is not None and row.step in at_step), key=lambda row: row.step
    )
    steps = {row.num_bits: row.step for row in quantized if row.num_bits is not None}
    if steps:
        widths = sorted(steps)
        values = [at_step[steps[num_bits]].mean for num_bits in widths]
        axes.plot([positions[n] for n in widths], values, "--", color="#333333", label="float control, same step")
    else:
        for row in rows:
            if row.method == BASE:
                axes.axhline(row.mean, linestyle="--", color="#333333", label=LABELS[BASE])


def _label_widths(axes: Axes, rows: Sequence[Row], positions: dict[float, int]) -> None:
    effective = {row.num_bits: row.effective_bits for row in rows if row.num_bits is not None}
    axes.set_xticks(list(positions.values()), [f"{n:g}\n({effective[n]:.2f})" for n in positions])
    axes.set_xlabel("bits per weight (including scales)")


def _label_metric(axes: Axes, rows: Sequence[Row]) -> None:
    metric = rows[0].metric
    worst, best = max(row.mean for row in rows), min(row.mean for row in rows)
    is_log = metric == "perplexity" and worst > 1.5 * best
    axes.set_ylabel(metric + (" (log scale)" if is_log else ""))
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
