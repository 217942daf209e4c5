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
    """Other images for each rank."""

    rank = 0

    def __iter__(self):
        for index, _ in enumerate(super().__iter__()):
            yield {"x": images_at(100 * self.rank + index)}


class DDPTask(ConvTask):
    """Knows its rank's images only when the processes have started."""

    def train_dataloader(self):
        Shard.rank = self.trainer.global_rank
        return Shard(16)

    def val_dataloader(self):
        return images(2)


def main() -> None:
    """Train on two ranks, and leave what each of them ended with."""
    folder = Path(sys.argv[1])
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
    main()
