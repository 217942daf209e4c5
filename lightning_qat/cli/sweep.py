"""``lightning-qat sweep``: train for every combination of overrides, then compare the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_qat.cli.app import run_app
from lightning_qat.cli.train import train
from lightning_qat.records import EvalRecord, read_records


def main(arguments: Sequence[str]) -> int:
    """Run ``train`` in Hydra's multirun mode, which ends with a table."""
    shows = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i"}
    mode = [] if shows & set(arguments) or {"-m", "--multirun"} & set(arguments) else ["-m"]
    return run_app(train, "train", [*mode, *arguments], command="sweep")


class SweepTable(Callback):
    """Prints, after all runs of a sweep, one line for each, the best first."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read what the runs left in their folders; overrides that all have in common are left out."""
        root = Path(config.hydra.sweep.dir)
        runs = [(folder, read_records(folder / "results.jsonl")) for folder in _finished(root)]
        if not runs:
            return
        metric = config.metric
        runs.sort(key=lambda run: _mean(run[1]), reverse=metric.higher_is_better)
        table = Table(
            "run", "overrides", "bits", f"{metric.name}", title=f"Sweep of {config.name}", title_justify="left"
        )
        overrides = {folder: _overrides(folder) for folder, _ in runs}
        common = set.intersection(*map(set, overrides.values())) if len(runs) > 1 else set()
        for folder, records in runs:
            values = [record.value for record in records]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            table.add_row(
                folder.name,
                " ".join(each for each in overrides[folder] if each not in common),
                f"{records[0].effective_bits:.2f}",
                f"{_mean(records):.4f}{spread}",
            )
        Console().print(table)
        Console().print(f"Runs: {root}", soft_wrap=True)


def _finished(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/results.jsonl"))


def _mean(records: Sequence[EvalRecord]) -> float:
    return statistics.fmean(record.value for record in records)


def _overrides(folder: Path) -> list[str]:
    path = folder / ".hydra" / "overrides.yaml"
    return list(map(str, OmegaConf.load(path))) if path.is_file() else []
