"""The results as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from lightning_qat.tracking.rows import BASE, CONTROL, Row

LABELS = {
    BASE: "float base",
    CONTROL: "float control",
    "rtn": "round to nearest",
    "imatrix": "RTN, weighted range",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "qat": "QAT",
    "qat_annealed": "QAT, annealed",
}


def make_table(rows: Sequence[Row], title: str) -> Table:
    """Return a table with a section for every width."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("method", no_wrap=True)
    for heading in ("bits", "effective\nbits", "step", rows[0].metric, "over\ncontrol", "recovery"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*_cells(row), end_section=following is not None and _begins_section(row, following))
    return table


def _begins_section(row: Row, following: Row) -> bool:
    """Return whether a row is the first of a step or, after the floats of that step, of a width."""
    return following.step != row.step or row.num_bits not in (None, following.num_bits)


def _cells(row: Row) -> list[str]:
    return [
        LABELS.get(row.method, row.method),
        "-" if row.num_bits is None else f"{row.num_bits:g}",
        "-" if row.num_bits is None else f"{row.effective_bits:.2f}",
        str(row.step),
        f"{row.mean:.3f}" + (f" ± {row.std:.3f}" if len(row.values) > 1 else ""),
        "-" if row.increase is None else f"{row.increase:+.1%}",
        _recovery_cell(row),
    ]


def _recovery_cell(row: Row) -> str:
    if row.recovery is not None:
        return f"{row.recovery:.0%}"
    return "n/a" if row.method not in (BASE, CONTROL, "rtn") else "-"
