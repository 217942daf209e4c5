"""Run by a test in two processes: PTQCallback under DDP."""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_qat import PTQCallback
from tests.callbacks.test_ptq import Quiet, Task
from tests.helpers import make_trainer

warnings.simplefilter("ignore")


def main() -> None:
    """Train on two ranks, and leave what each of them ended with."""
    folder, with_ptq = Path(sys.argv[1]), sys.argv[2] == "with"
    pl.seed_everything(3, verbose=False)
    ptq = PTQCallback(("rtn", "awq", "gptq"), bits=(4, 2), calibration_samples=8, results=folder / "results.jsonl")
    trainer = make_trainer(
        *([ptq] if with_ptq else []), strategy="ddp", devices=2, max_epochs=2, use_distributed_sampler=True
    )
    task = Task()
    trainer.fit(task, DataLoader(Quiet(48, 1), batch_size=8, shuffle=True), DataLoader(Quiet(22, 2), batch_size=8))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save(
        {"state_dict": task.state_dict(), "metrics": metrics, "rng": torch.get_rng_state()},
        folder / f"{sys.argv[2]}{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
