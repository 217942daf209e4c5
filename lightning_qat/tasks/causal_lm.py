"""Next-token training and perplexity for any model that maps token ids to logits."""

from __future__ import annotations

import math

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.text import Perplexity


class CausalLMTask(pl.LightningModule):
    """Train a causal language model; batches are token ids int64 ``[B, T + 1]``.

    Logs ``train/loss`` (nats per token) and ``val/perplexity``.

    Args:
        model: Maps token ids ``[B, T]`` to logits ``[B, T, V]``.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay.
        warmup_steps: Optimizer steps of linear warm-up.
        final_lr_fraction: Share of ``lr`` at which the cosine ends; 1 for a constant rate.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 20,
        final_lr_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        self.model = model
        self.lr, self.weight_decay = lr, weight_decay
        self.warmup_steps, self.final_lr_fraction = warmup_steps, final_lr_fraction
        self.perplexity = Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[B, T, V]`` for ``tokens`` ``[B, T]``."""
        logits: Tensor = self.model(tokens)
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy in nats per token."""
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("train/loss", loss)
        return loss

    def calibration_step(self, batch: Tensor) -> None:
        """Run the model on what it sees in training: the batch without its last token."""
        self(batch[:, :-1])

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add a batch to the perplexity."""
        self.perplexity(self(batch[:, :-1]).float(), batch[:, 1:])
        self.log("val/perplexity", self.perplexity, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with warm-up and a cosine over the run."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay, betas=(0.9, 0.95))
        total_steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self._lr_fraction(step, total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_fraction(self, step: int, total_steps: float) -> float:
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = min((step - self.warmup_steps) / max(total_steps - self.warmup_steps, 1), 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine
