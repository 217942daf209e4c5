"""Table, figure and W&B from a results file."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from lightning_qat.records import read_records
from lightning_qat.tracking.figures import draw_quality_vs_bits
from lightning_qat.tracking.rows import Row, make_rows
from lightning_qat.tracking.tables import make_table
from lightning_qat.tracking.wandb_report import log_results

_FILE_WIDTH = 100


def report(results: Path, figure: Path, title: str) -> list[Row]:
    """Print the table of a results file, draw its figure, and log both to the active W&B run.

    Args:
        results: JSON Lines file of records.
        figure: Where to save the figure.
        title: Title of table and figure.

    Returns:
        The rows of the table.

    Raises:
        ValueError: If there are no records, or they do not fit together.
    """
    records = read_records(results)
    if not records:
        raise ValueError(f"{results} holds no records.")
    rows = make_rows(records)
    draw_quality_vs_bits(rows, title, figure)
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(make_table(rows, title))
    console.print(f"Records: {results}\nFigure:  {figure}", soft_wrap=True)
    log_results(records, rows, [results, figure], title)
    return rows
