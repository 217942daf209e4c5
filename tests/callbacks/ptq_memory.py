"""Run by a test in a process of its own: what a pass of PTQCallback adds to the memory of the process.

Prints, for each validation, the size before the pass and the peak within it, in bytes.
"""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat import PTQCallback
from tests.helpers import make_trainer

warnings.simplefilter("ignore")


def status(key: str) -> int:
    """Return a size of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Probe(pl.Callback):
    """Listed before PTQCallback, and after it."""

    before: list = []  # noqa: RUF012
    peaks: list = []  # noqa: RUF012

    def __init__(self, is_first):
        self.is_first = is_first

    def on_validation_start(self, trainer, pl_module):
        if self.is_first:
            Path("/proc/self/clear_refs").write_text("5")
            self.before.append(status("VmRSS"))

    def on_validation_end(self, trainer, pl_module):
        if not self.is_first:
            self.peaks.append(status("VmHWM"))


class Wide(pl.LightningModule):
    """A table that is not quantized makes the model large, and its layers cheap to quantize."""

    def __init__(self, num_rows):
        super().__init__()
        self.table = nn.Embedding(num_rows, 64)
        self.net = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])

    def forward(self, x):
        return self.net(self.table(x))

    def training_step(self, batch, batch_idx):
        return self(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 1e-3)


def main() -> None:
    """Validate as often as asked for."""
    num_rows, num_validations = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    ptq = PTQCallback(("rtn", "awq", "gptq"), bits=(8, 4, 3, 2), calibration_samples=8, results=sys.argv[3])
    trainer = make_trainer(Probe(True), ptq, Probe(False), max_epochs=num_validations, max_steps=-1)
    data = torch.randint(0, 1000, (32, 8), generator=torch.Generator().manual_seed(1))
    trainer.fit(Wide(num_rows), DataLoader(data, batch_size=16), DataLoader(data, batch_size=16))
    print(json.dumps([Probe.before, Probe.peaks]))


if __name__ == "__main__":
    main()
