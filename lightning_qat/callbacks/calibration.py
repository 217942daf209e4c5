"""Running a copy of the module in training on calibration batches, and batches for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.evaluation import Snapshot
from lightning_qat.callbacks.isolation import isolate_randomness
from lightning_qat.nn.calibrate import make_runner
from lightning_qat.nn.forward import call_forward, evaluation_mode


def make_step(trainer: pl.Trainer, twin: pl.LightningModule) -> Callable[[Any], Any]:
    """Return what runs ``twin`` on a batch, on its device and in the Trainer's precision.

    That is its ``calibration_step(batch)`` if it has one, else its ``forward`` on what that takes from the batch.
    """
    calibration_step = getattr(twin, "calibration_step", None)

    def step(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(move_data_to_device(batch, twin.device))
        with trainer.precision_plugin.forward_context():
            return call_forward(twin, batch) if calibration_step is None else calibration_step(batch)

    return step


def try_calibration(trainer: pl.Trainer, snapshot: Snapshot, batch: Any, who: str = "PTQCallback") -> None:
    """Run a copy of the module on a batch as calibration will.

    Raises:
        QATConfigurationError: If that fails.
    """
    twin = snapshot.copy_float()
    try_step(trainer, twin, [batch], f"{who} cannot calibrate {type(twin).__name__}", "calibration batch")


def try_step(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    batches: Sequence[Any],
    what_fails: str,
    kind: str,
    remedy: str = "",
) -> None:
    """Run the module in evaluation mode on the first batch as :func:`make_step` does.

    Args:
        trainer: The Trainer.
        module: The module, or a copy of it.
        batches: The batches.
        what_fails: What cannot be done then, for the message.
        kind: What the batch is called in it.
        remedy: Another remedy than a ``calibration_step``.

    Raises:
        QATConfigurationError: If that fails.
    """
    try:
        with evaluation_mode(module):
            make_runner(module, batches[:1], make_step(trainer, module))(0)
    except Exception as error:
        step = "calibration_step(batch)" if hasattr(module, "calibration_step") else "forward"
        raise QATConfigurationError(
            f"{what_fails}: {step} fails on a {kind} with {type(error).__name__}: {error}. Give the module "
            f"a method calibration_step(self, batch) that runs it on a batch of training{remedy}."
        ) from error


def sample_training_batches(trainer: pl.Trainer, num_samples: int, seed: int = 0) -> list[Any]:
    """Return batches of random training samples, the same in every call; each process has others.

    The loader itself is not iterated, since that would change what training sees: its dataset is read through a
    loader of its own, and random numbers that reading draws leave no trace.

    Args:
        trainer: The Trainer, its training data set up.
        num_samples: Samples in all processes together, rounded up to whole batches.
        seed: Seed of the choice.

    Raises:
        QATConfigurationError: If there is not one loader over a dataset with a length.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or _has_own_batches(loader):
        raise QATConfigurationError(
            "Calibration batches can be drawn from one DataLoader over a dataset with a length and a batch_size alone. "
            "Give calibration_data=[...], batches of the training data as training_step gets them."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(loader.dataset), generator=generator)  # type: ignore[arg-type]
    own = order[trainer.global_rank :: trainer.world_size]
    most = -(-num_samples // trainer.world_size)
    subset = Subset(loader.dataset, own[:most].tolist())
    with isolate_randomness([loader]):
        torch.manual_seed(seed)
        batches = DataLoader(subset, loader.batch_size, collate_fn=loader.collate_fn)
        return [trainer.strategy.batch_to_device(batch, dataloader_idx=0) for batch in batches]


def _has_own_batches(loader: DataLoader[Any]) -> bool:
    """Return whether the loader has a batch sampler of its own, whose batches only that knows."""
    return loader.batch_size is None and loader.batch_sampler is not None
