"""Run by a test in two processes: a schedule that follows a metric, and scales that come to rest, under DDP."""

import sys
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lightning_qat import QATCallback
from tests.callbacks.test_schedules_in_fit import Scripted, diverges_at, plateau
from tests.helpers import make_trainer

warnings.simplefilter("ignore")


class Task(Scripted):
    """Each rank trains on batches of its own, and validates to a metric of its own."""

    def __init__(self):
        super().__init__(diverges_at(15))

    def training_step(self, batch, batch_idx):
        return self.loss(batch + self.global_rank)

    def validation_step(self, batch, batch_idx):
        value = self.script(self.trainer.global_step) if self.global_rank == 0 else -float(self.trainer.global_step)
        self.log("val/loss", torch.tensor(float(value)), sync_dist=False)


def main() -> None:
    """Train on two ranks, and leave what each of them ended with."""
    callback = QATCallback(
        "w2g16",
        scale_lr=1e-3,
        schedule=plateau([8, 2], end=None),
        freeze_at={"drift_below": 10.0, "every_n_steps": 3},
    )
    trainer = make_trainer(callback, strategy="ddp", devices=2, max_steps=30, val_check_interval=5)
    task = Task()
    batches = torch.randn(80, 16, generator=torch.Generator().manual_seed(1))
    trainer.fit(task, DataLoader(batches, batch_size=1), DataLoader(torch.zeros(4, 1)))
    assert callback.timeline is not None
    torch.save(
        {
            "rungs": callback.timeline.rungs,
            "freeze_step": callback.timeline.freeze_step,
            "weight": task.net[0].weight.detach(),
            "scale": task.net[0].weight_fake_quant.qparams(task.net[0].weight).scale.detach(),
        },
        Path(sys.argv[1]) / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
