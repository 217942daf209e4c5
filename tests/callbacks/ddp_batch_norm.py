"""Run by a test in two processes: statistics of batch normalization and frozen weights under DDP."""

import sys
import warnings
from pathlib import Path

import torch

from lightning_qat import QATCallback
from lightning_qat.nn import quantized_weights
from tests.callbacks.test_batch_norm import ConvTask, expected_statistics, images, images_at, statistics
from tests.helpers import make_trainer

warnings.simplefilter("ignore")


class Shard(images):
    """Other images for each rank, and on request more of them in each batch of the first."""

    rank, sizes = 0, (8, 8)

    def __iter__(self):
        for index, _ in enumerate(super().__iter__()):
            yield {"x": images_at(100 * self.rank + index, self.sizes[self.rank])}


class DDPTask(ConvTask):
    """Knows its rank's images only when the processes have started."""

    def train_dataloader(self):
        Shard.rank = self.trainer.global_rank
        return Shard(16)

    def val_dataloader(self):
        return images(2)


def train_with_uneven_batches(folder: Path) -> None:
    """Freeze when the memory for batches is full in the first rank, but not in the second."""
    Shard.sizes = (16, 8)
    task = DDPTask()
    memory_gib = 10.5 * images_at(0).nbytes / 2**30
    callback = QATCallback("w3", batch_norm={"reestimate": 10, "freeze_at": 7, "memory_gib": memory_gib})
    trainer = make_trainer(
        callback, strategy="ddp", devices=2, max_steps=12, use_distributed_sampler=False, limit_val_batches=0
    )
    trainer.fit(task)
    num_batches = len(callback.techniques[0]._capture.batches)
    ended = {"modes": task.modes, "statistics": statistics(task), "num_batches": num_batches}
    torch.save(ended, folder / f"rank{trainer.global_rank}.pt")


def train(folder: Path) -> None:
    """Train on two ranks, and leave what each of them ended with."""
    task = DDPTask()
    oscillation = {"freeze_threshold": 0.1, "momentum": 0.2, "start": 4}
    callback = QATCallback("w3", batch_norm=3, oscillation=oscillation)
    trainer = make_trainer(callback, strategy="ddp", devices=2, max_steps=16, use_distributed_sampler=False)
    trainer.fit(task)
    mine = [{"x": images_at(100 * trainer.global_rank + index)} for index in range(3)]
    torch.save(
        {
            "statistics": statistics(task),
            "own": expected_statistics(task, mine),
            "weights": {name: each.codes for name, each in quantized_weights(task).items()},
            "frozen": {name: state.frozen for name, state in callback.techniques[0]._states.items()},
        },
        folder / f"rank{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    (train_with_uneven_batches if "uneven" in sys.argv else train)(Path(sys.argv[1]))
