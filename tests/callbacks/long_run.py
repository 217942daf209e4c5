"""Run by a test in a process of its own: QAT for 1,000 steps with quantization after training in every 20th.

Prints the size of the process before each validation, in bytes.
"""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_qat import PTQCallback, QATCallback
from tests.callbacks.ptq_memory import status
from tests.helpers import TinyTask, batch_at, loader, make_trainer

warnings.simplefilter("ignore")
NUM_STEPS, INTERVAL = 1000, 20


class Sizes(pl.Callback):
    """Notes the size of the process."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_validation_start(self, trainer, pl_module) -> None:
        self.sizes.append(status("VmRSS"))


def main() -> None:
    """Train with all that keeps something from step to step."""
    torch.set_num_threads(1)
    task, sizes = TinyTask(), Sizes()
    task.net = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8))
    qat = QATCallback(
        "w2g16a8-static",
        schedule=[8, 4, 3, 2],
        scale_lr=1e-2,
        observer="mse",
        freeze_at=0.9,
        distillation={"task_weight": 1.0},
        oscillation={"freeze_threshold": 0.04},
        init={"method": "gptq", "calibration_data": [batch_at(50)]},
    )
    ptq = PTQCallback(("rtn", "awq", "gptq"), results=sys.argv[1], calibration_data=[batch_at(51)])
    trainer = make_trainer(
        qat,
        ptq,
        sizes,
        max_steps=NUM_STEPS,
        max_epochs=-1,
        val_check_interval=INTERVAL,
        check_val_every_n_epoch=None,
        enable_checkpointing=True,
        default_root_dir=Path(sys.argv[1]).parent,
    )
    trainer.fit(task, loader(60), loader(3))
    print(json.dumps(sizes.sizes))


if __name__ == "__main__":
    main()
