"""The rows of the matrix: what a Trainer and a module can be like, and which of it cannot go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import callbacks as pl_callbacks

from lightning_qat import PTQCallback, QATCallback
from lightning_qat.nn import QATLinear
from tests.matrix.covering import Combination
from tests.matrix.models import BUILDERS, MyLinear


class QATMyLinear(QATLinear, MyLinear):
    """The quantized form of the user's own class."""

    float_class = MyLinear


@dataclass
class Setup:
    """What a combination comes to.

    Attributes:
        trainer: Arguments of the Trainer.
        callbacks: Callbacks after QATCallback and PTQCallback.
        task: Arguments of the module.
    """

    folder: Path
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: list[pl.Callback] = field(default_factory=list)
    task: dict[str, Any] = field(default_factory=dict)


class Unfreeze(pl_callbacks.BaseFinetuning):
    """Trains the first layer from the second epoch on."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(first_layer(pl_module), train_bn=False)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(first_layer(pl_module), optimizer)


def first_layer(module: pl.LightningModule) -> torch.nn.Module:
    return next(m for m in module.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))


def set_trainer(**arguments: Any) -> Callable[[Setup], None]:
    return lambda setup: setup.trainer.update(arguments)


def set_task(**arguments: Any) -> Callable[[Setup], None]:
    return lambda setup: setup.task.update(arguments)


def add(make: Callable[[Path], pl.Callback]) -> Callable[[Setup], None]:
    return lambda setup: setup.callbacks.append(make(setup.folder))


def nothing(setup: Setup) -> None:
    """Leave all as it is."""


def checkpoints(monitor: str) -> Callable[[Path], pl.Callback]:
    return lambda folder: pl_callbacks.ModelCheckpoint(folder, monitor=monitor, save_top_k=2, save_last=True)


AXES: dict[str, dict[str, Callable[[Setup], None]]] = {
    "model": {name: set_task(model=name) for name in BUILDERS},
    "precision": {
        "32-true": nothing,
        "bf16-mixed": set_trainer(precision="bf16-mixed"),
        "bf16-true": set_trainer(precision="bf16-true"),
    },
    "optimization": {
        "automatic": nothing,
        "manual": set_task(optimization="manual"),
        "two optimizers": set_task(optimization="two optimizers"),
        "accumulation": set_trainer(accumulate_grad_batches=3),
        "clipping by norm": set_trainer(gradient_clip_val=0.5),
        "clipping by value": set_trainer(gradient_clip_val=0.1, gradient_clip_algorithm="value"),
    },
    "optimizer": {"adamw": nothing, "sgd": set_task(optimizer="sgd")},
    "scheduler": {
        "none": nothing,
        **{
            name: set_task(scheduler=name)
            for name in ("LambdaLR", "SequentialLR", "OneCycleLR", "CosineAnnealingLR", "ReduceLROnPlateau")
        },
    },
    "callback": {
        "none": nothing,
        "ModelCheckpoint": add(checkpoints("val/loss")),
        "EarlyStopping": add(lambda folder: pl_callbacks.EarlyStopping("val/loss", patience=50)),
        "EMA": add(lambda folder: pl_callbacks.EMAWeightAveraging(decay=0.9)),
        "SWA": add(lambda folder: pl_callbacks.StochasticWeightAveraging(5e-3, swa_epoch_start=1)),
        "BaseFinetuning": add(lambda folder: Unfreeze()),
        "ModelPruning": add(
            lambda folder: pl_callbacks.ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False)
        ),
        "RichProgressBar": add(lambda folder: pl_callbacks.RichProgressBar()),
        "TQDMProgressBar": add(lambda folder: pl_callbacks.TQDMProgressBar()),
        "GradientAccumulationScheduler": add(
            lambda folder: pl_callbacks.GradientAccumulationScheduler(scheduling={1: 2})
        ),
    },
    "trainer": {
        "plain": nothing,
        "fast_dev_run": set_trainer(fast_dev_run=True),
        "overfit_batches": set_trainer(overfit_batches=2),
        "limited": set_trainer(limit_train_batches=3, limit_val_batches=1),
        "within the epoch": set_trainer(val_check_interval=4),
        "sanity check": set_trainer(num_sanity_val_steps=2),
        "detect_anomaly": set_trainer(detect_anomaly=True),
        "barebones": set_trainer(barebones=True),
    },
    "ptq": {"off": nothing, "on": nothing},
    "qat": {"plain": nothing, "learned": nothing, "static inputs": nothing, "distilled": nothing, "watched": nothing},
}


def make_qat(combination: Combination) -> QATCallback:
    """Return the callback of a combination; under manual optimization it counts in steps."""
    in_steps = combination["optimization"] in BY_HAND
    arguments: dict[str, Any] = {
        "plain": {"scheme": "w4"},
        "learned": {
            "scheme": "w2",
            "schedule": {0: 8, 2: 4, 3: 2} if in_steps else [8, 4, 2],
            "scale_lr": 1e-3,
            "observer": "mse",
            "freeze_at": 4 if in_steps else 0.8,
        },
        "static inputs": {"scheme": "w4a8-static", "scale_lr": 1e-3, "activation_calibration_steps": 1},
        "distilled": {"scheme": "w3", "distillation": {"task_weight": 0.5}, "scale_lr": 1e-3},
        "watched": {
            "scheme": "w3",
            "oscillation": {"freeze_threshold": 0.04, "start": 2 if in_steps else 0.25},
            "blend_until": 3 if in_steps else 0.3,
        },
    }[combination["qat"]]
    if combination["model"] == "subclassed":
        arguments["mapping"] = {MyLinear: QATMyLinear}
    return QATCallback(**arguments)


BY_HAND = ("manual", "two optimizers")


def make_ptq(combination: Combination, folder: Path) -> PTQCallback:
    """Return the companion."""
    mapping = {MyLinear: QATMyLinear} if combination["model"] == "subclassed" else None
    return PTQCallback(("rtn", "gptq"), bits=(8, 4), results=folder / "ptq.jsonl", mapping=mapping)


def make_setup(combination: Combination, folder: Path) -> Setup:
    """Return what all values of a combination come to."""
    setup = Setup(folder)
    for axis, value in combination.items():
        AXES[axis][value](setup)
    return setup


def allowed(combination: Combination) -> bool:
    """Return whether Lightning and torch themselves allow all of a combination, of which axes may be left out."""
    has = combination.get
    by_hand = has("optimization") in BY_HAND
    if by_hand and (has("callback") in ("GradientAccumulationScheduler",) or has("scheduler") not in (None, "none")):
        return False  # Lightning leaves both to the module then
    if has("callback") == "SWA" and (by_hand or has("scheduler") not in (None, "none", "LambdaLR")):
        return False
    if has("callback") == "BaseFinetuning" and has("scheduler") not in (None, "none"):
        return False  # torch's schedulers count the groups
    if has("model") == "built late" and has("callback") in ("BaseFinetuning", "ModelPruning"):
        return False  # both look for layers before there are any
    if has("model") == "lora" and has("callback") in ("BaseFinetuning", "ModelPruning"):
        return False  # PEFT says what trains, and replaces the layers that would be pruned
    if has("optimization") == "accumulation" and has("callback") == "GradientAccumulationScheduler":
        return False
    if has("trainer") == "barebones":
        return has("callback") in (None, "none") and has("scheduler") != "ReduceLROnPlateau"
    return True


def refusal(combination: Combination) -> str | None:
    """Return what the callback must say in place of training, or None."""
    if combination["qat"] == "distilled" and combination["optimization"] in BY_HAND:
        return "automatic optimization"
    if combination["qat"] == "watched" and combination["callback"] == "ModelPruning":
        return "ModelPruning computes weights"
    if combination["qat"] == "watched" and combination["model"] == "lora":
        return "trains by adapters"
    if combination["callback"] == "GradientAccumulationScheduler" and combination["qat"] in ("learned", "watched"):
        return "cannot be turned into optimizer steps beside GradientAccumulationScheduler"
    return None
