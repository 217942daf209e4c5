"""Table, figure and W&B from files of results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_qat.records import read_records
from lightning_qat.tracking.figures import draw_quality_vs_bits
from lightning_qat.tracking.rows import Row, make_rows
from lightning_qat.tracking.tables import make_table
from lightning_qat.tracking.wandb_report import log_results

_FILE_WIDTH = 100


def report(results: Sequence[Path], figure: Path, title: str) -> list[Row]:
    """Print the table of files of results, draw its figure, and log both to the active W&B run.

    Args:
        results: JSON Lines files of records.
        figure: Where to save the figure.
        title: Title of table and figure.

    Returns:
        The rows of the table.

    Raises:
        ValueError: If there are no records, or they do not fit together.
    """
    records = [record for path in results for record in read_records(path)]
    names = ", ".join(map(str, results))
    if not records:
        raise ValueError(f"{names} holds no records.")
    rows = make_rows(records)
    draw_quality_vs_bits(rows, title, figure)
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    console.print(make_table(rows, title))
    console.print(f"Records: {names}\nFigure:  {figure}", soft_wrap=True)
    log_results(records, rows, [*results, figure], title)
    return rows
