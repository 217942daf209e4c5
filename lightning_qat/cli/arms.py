"""Training one arm of a comparison, and scoring what it left behind."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig
from rich.console import Console

from lightning_qat.api import load_qat
from lightning_qat.callbacks import QATCallback
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint


@dataclass(frozen=True)
class TrainedArm:
    """What training an arm left behind.

    Attributes:
        checkpoints: Path of the checkpoint by optimizer step.
        seconds: Wall time of the fit.
    """

    checkpoints: dict[int, Path]
    seconds: float

    @property
    def last(self) -> Path:
        """The checkpoint of the last step."""
        return self.checkpoints[max(self.checkpoints)]


class ArmRunner:
    """Trains and scores arms that share task, data, Trainer and logger of one configuration.

    Args:
        cfg: The composed configuration.
        seed: Seed of data order and initial weights.
        output_dir: Where checkpoints go.
    """

    def __init__(self, cfg: DictConfig, seed: int, output_dir: Path) -> None:
        self.cfg, self.seed, self.output_dir = cfg, seed, output_dir
        # Lightning tells at the start of every fit and every evaluation which accelerators there are not.
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        self.data: pl.LightningDataModule = instantiate(cfg.data, seed=seed)

    def make_task(self, phase: DictConfig | None = None) -> pl.LightningModule:
        """Return a new task with the settings of a phase."""
        pl.seed_everything(self.seed, verbose=False)
        task: pl.LightningModule = instantiate(self.cfg.task, **(phase.task if phase is not None else {}))
        return task

    def make_callbacks(self) -> dict[str, pl.Callback]:
        """Return the callbacks of the configuration, those of QAT tried on a new task and the length of the run."""
        callbacks: dict[str, pl.Callback] = {name: instantiate(node) for name, node in self.cfg.callbacks.items()}
        for callback in callbacks.values():
            if isinstance(callback, QATCallback):
                callback.prepare(self.make_task())
                callback.resolve(self.cfg.finetune.trainer.max_steps)
        return callbacks

    def train(
        self,
        arm: str,
        phase: DictConfig,
        init_from: Path | None = None,
        callbacks: Sequence[pl.Callback] = (),
        checkpoint_steps: Iterable[int] = (),
    ) -> TrainedArm:
        """Train one arm and keep checkpoints at the given steps and at the end.

        Args:
            arm: Its name, the prefix of what it logs.
            phase: Overrides of ``task`` and ``trainer``, ``trainer.max_steps`` among them.
            init_from: Checkpoint whose weights it starts from.
            callbacks: Callbacks besides the one that saves.
            checkpoint_steps: Optimizer steps after which to save.
        """
        Console().rule(f"seed {self.seed}: {arm}, {phase.trainer.max_steps} optimizer steps")
        task = self.make_task(phase)
        if init_from is not None:
            task.load_state_dict(load_weights(init_from))
        saver = StepCheckpoint(self.output_dir / "checkpoints" / f"seed{self.seed}" / arm, checkpoint_steps)
        saver.steps.add(phase.trainer.max_steps)
        trainer = self._trainer(callbacks=[*callbacks, saver], logger=self._logger(arm), **phase.trainer)
        started = time.perf_counter()
        trainer.fit(task, datamodule=self.data)
        return TrainedArm({step: saver.path(step) for step in sorted(saver.steps)}, time.perf_counter() - started)

    def score(self, task: pl.LightningModule) -> float:
        """Return the metric of ``task`` on the validation data."""
        trainer = self._trainer(logger=False, enable_progress_bar=False)
        results = trainer.validate(task, datamodule=self.data, verbose=False)
        return float(results[0][self.cfg.metric.key])

    def calibration_batches(self, num_batches: int) -> list[Any]:
        """Return the first training batches of an epoch."""
        pl.seed_everything(self.seed, verbose=False)
        return list(itertools.islice(self.data.train_dataloader(), num_batches))

    def _trainer(self, **overrides: Any) -> pl.Trainer:
        trainer: pl.Trainer = instantiate(self.cfg.trainer, **overrides, enable_checkpointing=False)
        return trainer

    def _logger(self, arm: str) -> Any:
        """Return the logger for an arm; all arms of all seeds share one W&B run."""
        if not self.cfg.logger:
            return False
        logger = instantiate(self.cfg.logger, prefix=f"seed{self.seed}/{arm}")
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update({"name": self.cfg.name, "seeds": read_seeds(self.cfg)})
        return logger


def read_seeds(cfg: DictConfig) -> list[int]:
    """Return the seeds of a configuration, which may be one number.

    Raises:
        ValueError: If there are none, or one is listed twice.
    """
    seeds = [cfg.seeds] if isinstance(cfg.seeds, int) else list(cfg.seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds} must be one or more different whole numbers.")
    return seeds


def load_trained(task: pl.LightningModule, checkpoint: Path, callbacks: Iterable[pl.Callback]) -> pl.LightningModule:
    """Load what an arm left into ``task``, quantizers included if it had any."""
    for callback in callbacks:
        if isinstance(callback, QATCallback):
            return load_qat(
                task,
                checkpoint,
                observer=callback.observer,
                estimator=callback.estimator,
                mapping=callback.mapping,
            )
    task.load_state_dict(load_weights(checkpoint))
    return task


def load_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the state dict in a checkpoint."""
    state_dict: dict[str, torch.Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    return state_dict
