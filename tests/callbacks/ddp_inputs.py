"""Run by a test in two processes: calibration of static inputs under DDP."""

import sys
import warnings
from pathlib import Path

import torch

from lightning_qat import QATCallback
from lightning_qat.nn import static_inputs
from tests.helpers import TinyTask, loader, make_trainer

warnings.simplefilter("ignore")


class Ranked(TinyTask):
    """Has batches of its own on each rank, and remembers the range of what its first layer was fed."""

    def training_step(self, batch, batch_idx):
        x = (1 + 5 * self.global_rank) * torch.randn(
            8, 16, generator=torch.Generator().manual_seed(100 * self.global_rank + batch_idx)
        )
        self.fed.append(torch.stack(x.aminmax()))
        return self.loss(x)


def main() -> None:
    """Train on two ranks, and leave what each of them ended with."""
    folder, observer = Path(sys.argv[1]), sys.argv[2]
    task = Ranked()
    task.fed = []
    qat = QATCallback(
        "w4a4-static",
        schedule={0: 16, 2: 8, 9: 4},  # the parameters of inputs must be in the graph in every phase
        scale_lr=1e-2,
        activation_observer=observer,
        activation_calibration_steps=3,
    )
    trainer = make_trainer(qat, strategy="ddp", devices=2, max_steps=12)
    trainer.fit(task, loader(), loader(2))
    quantizers = static_inputs(task)
    torch.save(
        {
            "fed": torch.stack(task.fed[2:5]),
            "seen": {name: each.seen for name, each in quantizers.items()},
            "grids": {name: each.qparams().scale.detach() for name, each in quantizers.items()},
            "parameters": {name: p.detach() for name, p in task.named_parameters()},
        },
        folder / f"{observer}{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main()
