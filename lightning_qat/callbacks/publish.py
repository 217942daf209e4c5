"""Metrics from where ``self.log`` is not to be had: in a callback, or at the end of validation."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch

from lightning_qat.callbacks.wandb_runs import harmless


def publish(trainer: pl.Trainer, figures: Mapping[str, float], step: int) -> None:
    """Send ``figures`` to all loggers, and to the callbacks that monitor metrics."""
    for logger in trainer.loggers:
        with harmless(logger):
            logger.log_metrics({**figures, "epoch": trainer.current_epoch}, step=step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})
