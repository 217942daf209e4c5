"""The quality-vs-bits table and chart of PTQCallback in W&B."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_qat.callbacks.evaluation import logged_step
from lightning_qat.callbacks.wandb_runs import for_each_run, has_wandb
from lightning_qat.charts import REFERENCE, Point, quality_chart, quality_table
from lightning_qat.records import EvalRecord


class QualityVsBits:
    """The newest record of every method at every width, and of the float control at their steps.

    Of an annealed run each rung keeps its last score, so that the chart shows all widths.
    """

    def __init__(self) -> None:
        self._newest: dict[tuple[Any, ...], EvalRecord] = {}

    def add(self, records: Iterable[EvalRecord]) -> None:
        """Take in the records of a validation."""
        for each in records:
            step = each.step if each.method == REFERENCE else None
            self._newest[each.metric, each.method, each.trained_with, each.scheme, each.num_bits, step] = each
        used = {each.step for each in self._newest.values() if each.method != REFERENCE}
        self._newest = {k: each for k, each in self._newest.items() if each.method != REFERENCE or each.step in used}

    @property
    def records(self) -> list[EvalRecord]:
        """All that are shown, those of the float control first."""
        return sorted(self._newest.values(), key=lambda each: each.method != REFERENCE)

    def log(self, trainer: pl.Trainer) -> None:
        """Log a table and a chart of every metric, always under the same keys."""
        if not has_wandb(trainer):
            return
        by_metric: dict[str, list[EvalRecord]] = {}
        for each in self.records:
            by_metric.setdefault(each.metric, []).append(each)

        def log_to(logger: Any, _: Any) -> None:
            panels = {}
            for metric, records in by_metric.items():
                panels[f"quality_vs_bits/{metric}"] = _draw(records, metric)
                panels[f"quality_vs_bits_table/{metric}"] = quality_table(records, metric)
            logger.log_metrics(panels, step=logged_step(trainer))

        for_each_run(trainer, log_to)

    def log_file(self, trainer: pl.Trainer, path: Path) -> None:
        """Log an artifact with the records file."""
        records = self.records
        if not records or not path.is_file():
            return
        metadata = {
            "schemes": sorted({each.scheme for each in records if each.scheme is not None}),
            "effective_bits": sorted({each.effective_bits for each in records if each.method != REFERENCE}),
            "metrics": {f"{each.method}_w{each.num_bits:g}/{each.metric}": each.value for each in records},
        }

        def log_to(_: Any, run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"ptq_results-{run.id}", type="results", metadata=metadata)
            artifact.add_file(str(path), name=path.name)
            run.log_artifact(artifact)

        for_each_run(trainer, log_to)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the records as primitives, for a resumed run."""
        return [asdict(each) for each in self.records]

    def load_state_dict(self, state: Iterable[dict[str, Any]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._newest.clear()
        self.add(EvalRecord(**each) for each in state)


def _draw(records: Sequence[EvalRecord], metric: str) -> Any:
    points = [Point(each.method, each.effective_bits, each.value, each.step) for each in records]
    controls = {each.step: each.value for each in records if each.method == REFERENCE}
    quantized = [point for point in points if point.method != REFERENCE]
    return quality_chart(quantized, controls, metric, f"{metric} against bits per weight, scales included")
