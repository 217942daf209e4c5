"""A tiny LightningModule whose batches depend on nothing but the step, and a Trainer for it."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


def batch_at(index: int, size: int = 8) -> Tensor:
    """Return the batch of a step: a resumed run sees the same as one that was never stopped."""
    return torch.randn(size, 16, generator=torch.Generator().manual_seed(1000 + index))


class TinyTask(pl.LightningModule):
    """Learns a fixed random map; records the loss of every batch in ``losses``."""

    def __init__(self, seed: int = 0, optimizer: str = "adamw", lr: float = 1e-2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.register_buffer("target", torch.randn(16, 8, generator=torch.Generator().manual_seed(7)))
        self.optimizer, self.lr = optimizer, lr
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, x: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(x), torch.tanh(x @ self.target))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch_at(self.trainer.fit_loop.total_batch_idx))
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch_at(10_000 + batch_idx)))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch_at(10_000 + batch_idx)))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch_at(10_000 + batch_idx))

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=1e-2)
        return torch.optim.AdamW(self.parameters(), self.lr)


class StopAt(pl.Callback):
    """Stop training after an optimizer step, unexpectedly for the schedule."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


class loader:
    """A resumable loader of placeholders: :class:`TinyTask` makes its own batches."""

    def __init__(self, num_batches: int = 100):
        self.num_batches, self.position = num_batches, 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self):
        while self.position < self.num_batches:
            self.position += 1
            yield torch.zeros(1, 1)
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def make_trainer(*callbacks: pl.Callback, **kwargs) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**{**defaults, **kwargs}, callbacks=list(callbacks))


def fit(task: pl.LightningModule, *callbacks: pl.Callback, ckpt_path=None, num_batches: int = 100, **kwargs):
    """Fit ``task`` and return the Trainer."""
    trainer = make_trainer(*callbacks, **kwargs)
    trainer.fit(task, loader(num_batches), loader(2), ckpt_path=ckpt_path)
    return trainer
