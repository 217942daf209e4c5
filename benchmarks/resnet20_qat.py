"""Quantization-aware training of a pretrained ResNet-20 on CIFAR-10, weights and activations, from a float fine-tuning.

The network is first fine-tuned in float. From that control every arm trains for the same epochs, float continued among
them; first and last layers have 8 bits. The score is that of the last weights on all test images. The model and its
data are not part of the project: set LIGHTNING_QAT_DATA to the folder that holds ``cifar10-jpeg/``.

Usage: python benchmarks/resnet20_qat.py [--epochs 10] [--seeds 1] [--arms W4A4;W2A2] [--out FOLDER]

Runs are appended to ``runs.jsonl`` in the folder; those that are there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from resnet20_ptq import accuracy, read_images
from safetensors.torch import load_file, save_file
from shared import data_folder, publish
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback
from lightning_qat.tasks.cifar_resnet import CifarResNet

BATCH, CONTROL_EPOCHS, FLOAT = 128, 4, "float continued"


def arm(bits: int, lr: float) -> QATCallback:
    """Return the callback of an arm with as many bits for weights as for inputs."""
    return QATCallback(
        [
            {"target": "*", "scheme": f"w{bits}a{bits}-static"},
            {"target": "model.conv1", "scheme": "w8a8-static"},
            {"target": "linear", "scheme": "w8a8-static"},
        ],
        observer="mse",
        activation_observer="mse",
        scale_lr=lr,
        distillation=True,
        batch_norm=50,
    )


ARMS = {"W4A4": 4, "W3A3": 3, "W2A2": 2}


class ImageTask(pl.LightningModule):
    """Classify images; flips and shifts of up to four pixels in training."""

    def __init__(self, model: CifarResNet, lr: float, weight_decay: float = 1e-4) -> None:
        super().__init__()
        self.model, self.lr, self.weight_decay = model, lr, weight_decay

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[B, 10]``."""
        logits: Tensor = self.model(images)
        return logits

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Flip and shift images of the training set."""
        images, labels = batch
        if not self.trainer.training:
            return batch
        images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, images.flip(3))
        padded = F.pad(images, (4, 4, 4, 4))
        rows, columns = (torch.randint(9, (len(images), 1)) + torch.arange(32) for _ in range(2))
        index = torch.arange(len(images))[:, None, None]
        return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous(), labels

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> Any:
        """Return SGD with one cycle."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, 0.9, weight_decay=self.weight_decay, nesterov=True)
        peaks = [group["lr"] for group in optimizer.param_groups]
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(model: CifarResNet, data: TensorDataset, epochs: int, lr: float, seed: int, *callbacks: pl.Callback) -> float:
    """Train ``model`` in place and return the seconds that it took."""
    pl.seed_everything(seed, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False
    )
    started = time.perf_counter()
    trainer.fit(ImageTask(model, lr), DataLoader(data, BATCH, shuffle=True, drop_last=True))
    return time.perf_counter() - started


def load_control(folder: Path, out: Path, data: TensorDataset) -> CifarResNet:
    """Return the network fine-tuned in float, trained now if it is not there yet."""
    model, path = CifarResNet(), out / "control.safetensors"
    if not path.is_file():
        model.load_state_dict(load_file(folder / "resnet20.safetensors"))
        fit(model, data, CONTROL_EPOCHS, 0.05, 0)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model


def main() -> None:
    """Train what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10, help="epochs of every arm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--scale-lr", type=float, default=0.001)
    parser.add_argument("--arms", default=";".join([FLOAT, *ARMS]))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "resnet20_qat")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = data_folder("cifar10-jpeg")
    data = TensorDataset(*read_images(folder / "train.parquet", 50_000))
    images, labels = read_images(folder / "test.parquet", 10_000)
    control = load_control(folder, arguments.out, data)
    reference = accuracy(control.eval(), images, labels)
    print(f"control: {reference:.2f}", flush=True)
    results = arguments.out / "runs.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    for seed in range(arguments.seeds):
        for name in arguments.arms.split(";"):
            key = {"arm": name, "seed": seed, "epochs": arguments.epochs, "lr": arguments.lr}
            if any(key.items() <= run.items() for run in done):
                continue
            model = load_control(folder, arguments.out, data)
            callbacks = [] if name == FLOAT else [arm(ARMS[name], arguments.scale_lr)]
            seconds = fit(model, data, arguments.epochs, arguments.lr, seed, *callbacks)
            run = {**key, "accuracy": accuracy(model.eval(), images, labels), "seconds": round(seconds)}
            print(run, flush=True)
            done.append(run)
            with results.open("a") as file:
                file.write(json.dumps(run) + "\n")
    report(arguments.out, reference, [run for run in done if run["epochs"] == arguments.epochs], arguments)


def report(out: Path, reference: float, runs: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the table and write it, with the conditions, beside the command."""
    floats = [run["accuracy"] for run in runs if run["arm"] == FLOAT]
    lines = [
        "# Quantization-aware training of ResNet-20",
        "",
        f"`python benchmarks/resnet20_qat.py --epochs {arguments.epochs} --seeds {arguments.seeds}`. Top-1 accuracy",
        "in percent on the 10,000 test images, last weights; weights per output channel, inputs static per tensor,",
        f"first and last layer at 8 bits. Fine-tuned in float for {CONTROL_EPOCHS} epochs first: {reference:.2f}.",
        "",
        "| arm | accuracy | drop from float continued | minutes |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["arm"] for run in runs):
        scores = [run["accuracy"] for run in runs if run["arm"] == name]
        minutes = sum(run["seconds"] for run in runs if run["arm"] == name) / 60 / len(scores)
        drop = sum(floats) / len(floats) - sum(scores) / len(scores) if floats else float("nan")
        lines.append(f"| {name} | {', '.join(f'{score:.2f}' for score in scores)} | {drop:.2f} | {minutes:.0f} |")
    publish(out, lines)


if __name__ == "__main__":
    main()
