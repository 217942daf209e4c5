"""Checkpoints at given optimizer steps, such as the ends of the rungs of a schedule."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from typing_extensions import override


class StepCheckpoint(pl.Callback):
    """Save ``dirpath/stepN.ckpt`` after each optimizer step ``N`` of ``steps``.

    Args:
        dirpath: Folder of the checkpoints.
        steps: Numbers of optimizer steps done.
    """

    def __init__(self, dirpath: str | Path, steps: Iterable[int]) -> None:
        self.dirpath = Path(dirpath)
        self.steps = set(steps)
        self._last_saved: int | None = None

    def path(self, step: int) -> Path:
        """Return where the checkpoint of ``step`` is saved."""
        return self.dirpath / f"step{step}.ckpt"

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier run: files that it left are overwritten."""
        self._last_saved = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a step of the list was just done."""
        step = trainer.global_step
        if step in self.steps and step != self._last_saved:  # not at every batch of an accumulation
            trainer.save_checkpoint(self.path(step))
            self._last_saved = step
