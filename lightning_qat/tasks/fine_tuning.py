"""What the tasks have in common: the optimizer, and a learning rate that warms up and then follows a cosine."""

from __future__ import annotations

import math
from typing import ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler


class FineTuningTask(pl.LightningModule):
    """A module that trains all of its parameters that are not frozen.

    Args:
        lr: Peak learning rate.
        weight_decay: Weight decay.
        warmup_steps: Optimizer steps of linear warm-up.
        final_lr_fraction: Share of ``lr`` at which the cosine ends; 1 for a constant rate.
        optimizer: ``"adamw"``, or ``"sgd"`` with Nesterov momentum.
        momentum: Momentum of SGD.

    Raises:
        ValueError: If ``optimizer`` is another name.
    """

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)

    def __init__(
        self,
        lr: float,
        weight_decay: float,
        warmup_steps: int,
        final_lr_fraction: float,
        optimizer: str = "adamw",
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if optimizer not in ("adamw", "sgd"):
            raise ValueError(
                f"optimizer={optimizer!r} must be 'adamw' or 'sgd'. For another, override make_optimizer in a subclass."
            )
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_steps, self.final_lr_fraction = warmup_steps, final_lr_fraction
        self.optimizer_name, self.momentum = optimizer, momentum

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of what trains: frozen weights (LoRA's) are none of its business."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(
                trained, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.momentum > 0
            )
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer with warm-up and a cosine over the run."""
        optimizer = self.make_optimizer()
        total_steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._lr_fraction(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_fraction(self, step: int, total_steps: float) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min((step - self.warmup_steps) / max(total_steps - self.warmup_steps, 1), 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine
