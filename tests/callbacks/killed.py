"""Run by a test that kills it: QAT and PTQ with checkpoints, from the last one if there is one, to the end."""

import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_qat import PTQCallback, QATCallback, quantized_weights
from tests.helpers import TinyTask, batch_at, loader

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
NUM_STEPS = 240


class Started(pl.Callback):
    """Says that training goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, *_) -> None:
        self.path.touch()


def main(folder: Path) -> None:
    """Train, and leave the weights."""
    task = TinyTask()
    qat = QATCallback(
        "w2g16",
        schedule=[8, 4, 3, 2],
        scale_lr=1e-2,
        observer="mse",
        freeze_at=0.9,
        oscillation={"freeze_threshold": 0.04},
        init={"method": "gptq", "calibration_data": [batch_at(50)]},
    )
    ptq = PTQCallback(("rtn", "gptq"), results=folder / "results.jsonl", calibration_data=[batch_at(51)])
    # Never at a step with a validation: Lightning leaves that out when it goes on from a checkpoint of that step.
    saver = ModelCheckpoint(folder, every_n_train_steps=27, save_top_k=1, save_last=True, monitor=None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=NUM_STEPS,
        max_epochs=-1,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[qat, ptq, saver, Started(folder / "started")],
    )
    last = folder / "last.ckpt"
    trainer.fit(task, loader(60), DataLoader(torch.zeros(1, 1)), ckpt_path=last if last.exists() else None)
    codes = {f"{name}.codes": each.codes for name, each in quantized_weights(task).items()}
    torch.save({**dict(task.named_parameters()), **codes}, folder / "final.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
