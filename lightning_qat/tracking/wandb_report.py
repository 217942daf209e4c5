"""Results in the W&B run that is active, if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import wandb

from lightning_qat.charts import Point, quality_chart
from lightning_qat.records import EvalRecord
from lightning_qat.tracking.rows import CONTROL, Row

_COLUMNS = ("method", "num_bits", "effective_bits", "step", "mean", "std", "increase", "recovery")


def log_results(records: Sequence[EvalRecord], rows: Sequence[Row], files: Sequence[Path], title: str) -> None:
    """Log table, chart, figure and an artifact with the files to the active run."""
    run = wandb.run
    if run is None:
        return
    table = wandb.Table(columns=list(_COLUMNS), data=[[getattr(row, name) for name in _COLUMNS] for row in rows])
    points = [Point(row.method, row.effective_bits, row.mean, row.step) for row in rows if row.num_bits is not None]
    controls = {row.step: row.mean for row in rows if row.method == CONTROL}
    chart = quality_chart(points, controls, rows[0].metric, title)
    images = {path.stem: wandb.Image(str(path)) for path in files if path.suffix == ".png"}
    run.log({"results": table, "quality_vs_bits_chart": chart, **images})
    artifact = wandb.Artifact(f"results-{run.id}", type="results", metadata={"records": len(records)})
    for path in files:
        artifact.add_file(str(path))
    run.log_artifact(artifact)
