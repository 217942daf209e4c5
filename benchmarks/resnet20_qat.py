"""Quantization-aware training of a pretrained ResNet-20 on CIFAR-10, weights and inputs, from a float fine-tuning.

The network is first fine-tuned in float. From that control every arm trains for the same epochs, float continued among
them; first and last layers have 8 bits. The score is that of the last weights on all test images. ``tune`` tries
learning rates for one epoch on 45,000 images, and scores on the other 5,000. The model and its data are not part of
the project: set LIGHTNING_QAT_DATA to the folder that holds ``cifar10-jpeg/``.

Usage: python benchmarks/resnet20_qat.py [--suite main|ablation|tune|report] [--epochs 10] [--jobs 2] [--out FOLDER]

Runs are appended to ``runs.jsonl`` in the folder; those that are there are not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from resnet20_ptq import accuracy, read_images
from safetensors.torch import load_file, save_file
from shared import carry_out, data_folder, publish, read_runs
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback
from lightning_qat.tasks.augmentation import shift_images
from lightning_qat.tasks.cifar_resnet import CifarResNet

BATCH, CONTROL_EPOCHS, NUM_IMAGES, NUM_HELD, FLOAT = 128, 4, 50_000, 5_000, "float continued"
WIDTHS = (4, 3, 2)
SCALE_LEARNING_RATE = 0.001
RATES = (0.01, 0.03, 0.1)

BEST: dict[str, Any] = {
    "observer": "mse",
    "activation_observer": "mse",
    "scale_lr": SCALE_LEARNING_RATE,
    "distillation": True,
    "batch_norm": 50,
}
CHANGES: dict[str, dict[str, Any]] = {
    "everything": {},
    "weights by min-max": {"observer": "minmax"},
    "inputs by min-max": {"activation_observer": "minmax"},
    "inputs by EMA": {"activation_observer": "ema"},
    "inputs by percentile": {"activation_observer": "percentile"},
    "inputs not learned": {"learn_activations": False},
    "no scale learned": {"scale_lr": None},
    "no distillation": {"distillation": None},
    "no BatchNorm re-estimation": {"batch_norm": None},
    "BatchNorm frozen at 70 %": {"batch_norm": {"reestimate": 50, "freeze_at": 0.7}},
    "oscillation freezing": {"oscillation": {"freeze_threshold": (0.04, 0.011), "momentum": 0.02}},
    "dampening": {"oscillation": {"dampening": 0.1}},
}


def make_callback(bits: int, change: str) -> QATCallback:
    """Return the callback of an arm with as many bits for weights as for inputs."""
    rules = [
        {"target": "*", "scheme": f"w{bits}a{bits}-static"},
        {"target": "model.conv1", "scheme": "w8a8-static"},
        {"target": "linear", "scheme": "w8a8-static"},
    ]
    return QATCallback(rules, **BEST | CHANGES[change])


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
        return shift_images(images, 4), labels

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
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(ImageTask(model, lr), DataLoader(data, BATCH, shuffle=True, drop_last=True))
    return time.perf_counter() - started


def load_control(out: Path) -> CifarResNet:
    """Return the network fine-tuned in float, trained now if it is not there yet."""
    folder, path, model = data_folder("cifar10-jpeg"), out / "control.safetensors", CifarResNet()
    if not path.is_file():
        model.load_state_dict(load_file(folder / "resnet20.safetensors"))
        fit(model, TensorDataset(*read_images(folder / "train.parquet", NUM_IMAGES)), CONTROL_EPOCHS, 0.05, 0)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model


def train(run: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return the record of a run: on the test images, or, when tuning, on the training images that are kept aside."""
    folder, model = data_folder("cifar10-jpeg"), load_control(out)
    images, labels = read_images(folder / "train.parquet", NUM_IMAGES)
    num_train = NUM_IMAGES - NUM_HELD * run["is_tuning"]
    callbacks = [] if run["arm"] == FLOAT else [make_callback(run["bits"], run["arm"])]
    data = TensorDataset(images[:num_train], labels[:num_train])
    seconds = fit(model, data, run["epochs"], run["lr"], run["seed"], *callbacks)
    if run["is_tuning"]:
        images, labels = images[num_train:], labels[num_train:]
    else:
        images, labels = read_images(folder / "test.parquet", 10_000)
    return {**run, "accuracy": round(accuracy(model.eval(), images, labels), 2), "seconds": round(seconds)}


def best_rate(tuned: list[dict[str, Any]], bits: int) -> float:
    """Return the learning rate that was best on the images kept aside; 3 bits, which are not tuned, get the middle."""
    found = {run["lr"]: run["accuracy"] for run in tuned if run["is_tuning"] and run["bits"] == bits}
    return max(found, key=found.__getitem__) if found else RATES[1]


def plan(suite: str, epochs: int, seeds: int, tuned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of a suite, at the learning rates of those that were tuned."""

    def run(arm: str, bits: int, lr: float | None = None, seed: int = 0) -> dict[str, Any]:
        rate = best_rate(tuned, bits) if lr is None else lr
        return {"arm": arm, "bits": bits, "epochs": epochs, "lr": rate, "seed": seed, "is_tuning": suite == "tune"}

    if suite == "main":
        arms = [(FLOAT, 32), *(("everything", bits) for bits in reversed(WIDTHS))]
        return [run(*arm, seed=seed) for seed in range(seeds) for arm in arms]
    if suite == "ablation":
        return [run(change, 2) for change in CHANGES]
    if suite == "tune":
        arms = [(FLOAT, 32), ("everything", 2), ("everything", 4)]
        return [run(*arm, lr) for arm in arms for lr in RATES]
    return []


def main() -> None:
    """Train what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("main", "ablation", "tune", "report"), default="main")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of every arm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each with one thread")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "resnet20_qat")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.run:
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        print(json.dumps(train(json.loads(arguments.run), arguments.out)))
        return
    load_control(arguments.out)
    done = read_runs(arguments.out)
    runs = plan(arguments.suite, arguments.epochs, arguments.seeds, done)
    missing = [run for run in runs if not any(run.items() <= each.items() for each in done)]
    carry_out(__file__, missing, arguments.out, arguments.jobs)
    report(arguments.out)


def report(out: Path) -> None:
    """Print the tables and write them, with the conditions, beside the command."""
    images, labels = read_images(data_folder("cifar10-jpeg") / "test.parquet", 10_000)
    reference = accuracy(load_control(out).eval(), images, labels)
    done = read_runs(out)
    runs, tuned = ([run for run in done if run["is_tuning"] == flag] for flag in (False, True))
    lines = [
        "# Quantization-aware training of ResNet-20",
        "",
        "`python benchmarks/resnet20_qat.py --suite tune --epochs 1`, then without `--suite` and `--epochs N`, then",
        "`--suite ablation`. Top-1 in percent on the 10,000 test images with the last weights, and the drop from the",
        "float arm continued for as many epochs. Weights per output channel, inputs static per tensor, first and last",
        f"layer at 8 bits; SGD, one cycle. Everything: {', '.join(map(describe, BEST.items()))}.",
        f"All start from a float fine-tuning of {CONTROL_EPOCHS} epochs, which has {reference:.2f}.",
    ]
    for epochs in sorted({run["epochs"] for run in runs}, reverse=True):
        heading = ["| arm | bits | learning rate | accuracy | drop | minutes |", "|---|---|---|---|---|---|"]
        lines += ["", f"## {epochs} epoch{'s' * (epochs > 1)}", "", *heading]
        lines += [row_of(run, runs) for run in runs if run["epochs"] == epochs]
    if tuned:
        lines += [
            "",
            "## Learning rates",
            "",
            f"After one epoch, on {NUM_HELD:,} training images that this epoch does not see. The float fine-tuning",
            "before it has seen them, so that small rates, which forget less, look better than they are. Three bits,",
            "which are not tuned, get the middle one.",
            "",
            "| arm | bits | learning rate | accuracy |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {run['arm']} | {run['bits']} | {run['lr']:g} | {run['accuracy']:.2f} |"
            for run in sorted(tuned, key=order)
        ]
    publish(out, lines)


def order(run: dict[str, Any]) -> tuple[float, float]:
    """Return what runs are sorted by."""
    return -run["bits"], run["lr"]


def describe(argument: tuple[str, Any]) -> str:
    """Return an argument as it is written."""
    return f"`{argument[0]}={argument[1]!r}`"


def row_of(run: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Return the line of a run; the drop is from the float arm of the same seed and epochs."""
    same = [each for each in runs if all(each[key] == run[key] for key in ("epochs", "seed")) and each["arm"] == FLOAT]
    drop = f"{max(each['accuracy'] for each in same) - run['accuracy']:.2f}" if same else ""
    bits = "32" if run["arm"] == FLOAT else f"W{run['bits']}A{run['bits']}"
    return f"| {run['arm']} | {bits} | {run['lr']:g} | {run['accuracy']:.2f} | {drop} | {run['seconds'] / 60:.0f} |"


if __name__ == "__main__":
    main()
