"""A run under one of Lightning's two names, given as the first argument; prints what came of it as JSON."""

import hashlib
import importlib
import json
import logging
import sys
import tempfile
import warnings

if __name__ == "__main__":  # set before Lightning is imported
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
pl = importlib.import_module(sys.argv[1] if __name__ == "__main__" else "lightning.pytorch")

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from lightning_qat import PTQCallback, QATCallback, load_qat  # noqa: E402


class Task(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x):
        return self.net(x)

    def loss(self, x):
        return (self(x) - x[:, :8].tanh()).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def make_trainer(folder, epochs, extra=(), **options):
    qat = QATCallback(
        "w3a8-static",
        schedule={0: 8, 6: 3},
        scale_lr=1e-3,
        distillation={"task_weight": 0.5},
        batch_norm=2,
        oscillation={"freeze_threshold": 0.04},
        activation_calibration_steps=2,
        init={"method": "gptq", "num_samples": 16},
    )
    ptq = PTQCallback(("rtn", "gptq"), bits=(4, 3), results=f"{folder}/ptq.jsonl")
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[qat, ptq, *extra],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        logger=pl.loggers.CSVLogger(folder),
        **options,
    )


def digest(task):
    parts = (value.numpy().tobytes() for value in task.state_dict().values() if isinstance(value, torch.Tensor))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main():
    data = DataLoader(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), 8)
    with tempfile.TemporaryDirectory() as folder:
        task, saver = Task(), pl.callbacks.ModelCheckpoint(folder, monitor="val/loss", save_last=True)
        trainer = make_trainer(folder, 3, [saver, pl.callbacks.EarlyStopping("val/loss", patience=9)])
        trainer.fit(task, data, data)
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        resumed = Task()
        make_trainer(folder, 4).fit(resumed, data, data, ckpt_path=f"{folder}/last.ckpt")
        loaded = load_qat(Task(), f"{folder}/last.ckpt")
        refusals = []
        for extra in (
            pl.callbacks.ModelPruning("l1_unstructured", amount=0.2),
            pl.callbacks.GradientAccumulationScheduler({1: 2}),
        ):
            try:
                make_trainer(folder, 3, [extra]).fit(Task(), data, data)
            except ValueError as error:
                refusals.append(str(error))
        print(json.dumps([digest(task), digest(resumed), digest(loaded), metrics, refusals]))


if __name__ == "__main__":
    main()
