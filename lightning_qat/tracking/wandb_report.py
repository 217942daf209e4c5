"""Results in the W&B run that is active, if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import wandb

from lightning_qat.records import EvalRecord
from lightning_qat.tracking.rows import Row

_COLUMNS = ("method", "num_bits", "effective_bits", "step", "mean", "std", "increase", "recovery")


def log_results(records: Sequence[EvalRecord], rows: Sequence[Row], files: Sequence[Path], title: str) -> None:
    """Log table, chart, figure and an artifact with the files to the active run."""
    run = wandb.run
    if run is None:
        return
    table = wandb.Table(columns=list(_COLUMNS), data=[[getattr(row, name) for name in _COLUMNS] for row in rows])
    drawn = [row for row in rows if row.num_bits is not None]
    points = wandb.Table(
        columns=["effective_bits", rows[0].metric, "method"],
        data=[[row.effective_bits, row.mean, row.method] for row in drawn],
    )
    chart = wandb.plot.line(points, "effective_bits", rows[0].metric, stroke="method", title=title)
    images = {path.stem: wandb.Image(str(path)) for path in files if path.suffix == ".png"}
    run.log({"results": table, "quality_vs_bits_chart": chart, **images})
    artifact = wandb.Artifact(f"results-{run.id}", type="results", metadata={"records": len(records)})
    for path in files:
        artifact.add_file(str(path))
    run.log_artifact(artifact)
