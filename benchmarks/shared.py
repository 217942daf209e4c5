"""What the benchmarks have in common."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_qat.records import package_versions


def data_folder(name: str) -> Path:
    """Return the folder of a model that is no part of the project, or stop with the reason."""
    root = Path(os.environ.get("LIGHTNING_QAT_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
    folder = root / name
    if not folder.is_dir():
        sys.exit(f"There is no {folder}. Set LIGHTNING_QAT_DATA to the folder that holds {name}/.")
    return folder.resolve()


def table(scores: Mapping[tuple[str, str], float], columns: Sequence[str], digits: int) -> list[str]:
    """Return the lines of a table of scores by (row, column); what was not measured stays empty."""
    lines = [f"| method | {' | '.join(f'W{column}' for column in columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in dict.fromkeys(row for row, _ in scores):
        cells = [f"{scores[row, column]:.{digits}f}" if (row, column) in scores else "" for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return lines


def publish(out: Path, lines: Sequence[str]) -> None:
    """Print a report and write it, with the conditions, beside the command."""
    text = "\n".join([*lines, "", f"{platform.machine()}, {os.cpu_count()} cores; {package_versions()}."]) + "\n"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(text)
