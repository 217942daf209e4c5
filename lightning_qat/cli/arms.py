"""Training one arm of a comparison, and scoring what it left behind."""

from __future__ import annotations

import itertools
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig
from rich.console import Console

from lightning_qat.api import load_qat
from lightning_qat.callbacks import QATCallback
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from lightning_qat.cli.explain import UsageError
from lightning_qat.cli.trust import build
from lightning_qat.nn import weight_fake_quants
from lightning_qat.nn.bits import BitReport, bit_report
from lightning_qat.records import EvalRecord

ARM_FILE = "arm.json"


@dataclass(frozen=True)
class TrainedArm:
    """What training an arm left behind, and under which settings.

    Attributes:
        checkpoints: Name of the checkpoint, in the folder of the arm, by optimizer step.
        seconds: Wall time of the fit.
        settings: What the weights depend on.
    """

    checkpoints: dict[int, str]
    seconds: float
    settings: dict[str, Any]

    @property
    def last(self) -> str:
        """The checkpoint of the last step."""
        return self.checkpoints[max(self.checkpoints)]

    def write(self, folder: Path) -> None:
        """Leave it in ``folder``, at once: the arm is finished when the file is there."""
        temporary = folder / f".{ARM_FILE}"
        temporary.write_text(json.dumps(asdict(self), indent=1, sort_keys=True), encoding="utf-8")
        os.replace(temporary, folder / ARM_FILE)

    @classmethod
    def read(cls, folder: Path) -> TrainedArm | None:
        """Return what is in ``folder``, or None if the arm is not finished."""
        path = folder / ARM_FILE
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        content["checkpoints"] = {int(step): name for step, name in content["checkpoints"].items()}
        return cls(**content)


class ArmRunner:
    """Trains and scores arms that share task, data, Trainer and logger of one configuration.

    Args:
        cfg: The composed configuration.
        seed: Seed of data order and initial weights.
    """

    def __init__(self, cfg: DictConfig, seed: int) -> None:
        self.cfg, self.seed = cfg, seed
        # Lightning tells at the start of every fit and every evaluation which accelerators there are not.
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        self.data: pl.LightningDataModule = build(cfg.data, **({"seed": seed} if "seed" in cfg.data else {}))

    def make_task(self, phase: DictConfig | None = None) -> pl.LightningModule:
        """Return a new task with the settings of a phase."""
        pl.seed_everything(self.seed, verbose=False)
        task: pl.LightningModule = build(self.cfg.task, **(phase.task if phase is not None else {}))
        return task

    def make_callbacks(self, nodes: Mapping[str, Any]) -> dict[str, pl.Callback]:
        """Return callbacks in the order of ``nodes``, those of QAT tried on a new task and the length of the run.

        Raises:
            UsageError: If one has arguments and no class: values of a callback that was not chosen.
        """
        for name, node in nodes.items():
            if "_target_" not in node:
                raise UsageError(
                    f"callbacks.{name} has arguments and no _target_. Choose it (callbacks=[..., {name}]), or leave it "
                    f"out (~callbacks.{name})."
                )
        callbacks: dict[str, pl.Callback] = {name: build(node) for name, node in nodes.items()}
        for callback in callbacks.values():
            if isinstance(callback, QATCallback):
                callback.prepare(self.make_task())
                callback.resolve(self.cfg.finetune.trainer.max_steps)
        return callbacks

    def train(
        self,
        arm: str,
        phase: DictConfig,
        folder: Path,
        init_from: Path | None = None,
        callbacks: Sequence[pl.Callback] = (),
        checkpoint_steps: Iterable[int] = (),
        settings: Mapping[str, Any] | None = None,
        logs: bool = True,
    ) -> TrainedArm:
        """Train one arm, keep checkpoints at the given steps and at the end, and leave a note of it.

        Args:
            arm: Its name, the prefix of what it logs.
            phase: Overrides of ``task`` and ``trainer``, ``trainer.max_steps`` among them; with 0 the arm is the
                initial weights.
            folder: Where it goes.
            init_from: Checkpoint whose weights it starts from.
            callbacks: Callbacks besides the one that saves.
            checkpoint_steps: Optimizer steps after which to save.
            settings: What the note tells.
            logs: Whether the logger of the configuration gets it.

        Raises:
            RuntimeError: If it ended before ``max_steps``, so that arms cannot be compared.
        """
        max_steps: int = phase.trainer.max_steps
        Console().rule(f"seed {self.seed}: {arm}, {max_steps} optimizer steps")
        task = self.make_task(phase)
        if init_from is not None:
            task.load_state_dict(load_weights(init_from))
        saver = StepCheckpoint(folder, checkpoint_steps)
        saver.steps.add(max_steps)
        started = time.perf_counter()
        if max_steps == 0:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"state_dict": task.state_dict()}, saver.path(0))
        else:
            logger = self._logger(arm) if logs else False
            trainer = self._trainer(callbacks=[*callbacks, saver], logger=logger, **phase.trainer)
            try:
                trainer.fit(task, datamodule=self.data)
            finally:
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish()  # the next arm has a run of its own
            if trainer.global_step < max_steps:
                raise RuntimeError(
                    f"{arm} ended after {trainer.global_step} of {max_steps} steps: no equal comparison."
                )
        names = {step: saver.path(step).name for step in sorted(saver.steps)}
        trained = TrainedArm(names, time.perf_counter() - started, dict(settings or {}))
        trained.write(folder)
        return trained

    def score(self, task: pl.LightningModule) -> float:
        """Return the metric of ``task`` on the validation data.

        Raises:
            UsageError: If the task does not log it.
        """
        trainer = self._trainer(logger=False, enable_progress_bar=False)
        results = trainer.validate(task, datamodule=self.data, verbose=False)
        found = {name: value for each in results for name, value in each.items()}
        if self.cfg.metric.key not in found:
            raise UsageError(f"metric.key={self.cfg.metric.key} is not among what validation logs: {sorted(found)}.")
        return float(found[self.cfg.metric.key])

    def make_record(
        self, task: pl.LightningModule, method: str, step: int, seconds: float, num_bits: float | None = None
    ) -> EvalRecord:
        """Return the score of ``task``, on the rung of ``num_bits`` or its own width if it is quantized."""
        schemes = [layer.weight_fake_quant.scheme for _, layer in weight_fake_quants(task)]
        num_bits = num_bits or min((scheme.num_bits for scheme in schemes), default=None)
        bits = BitReport(32, 32) if num_bits is None else bit_report(task, num_bits)
        at = [] if num_bits is None else [scheme.at(max(num_bits, scheme.num_bits)) for scheme in schemes]
        return EvalRecord(
            method=method,
            scheme=", ".join(sorted(set(map(str, at)))) or None,
            num_bits=num_bits or 32,
            effective_bits=bits.quantized,
            model_bits=bits.model,
            metric=self.cfg.metric.name,
            value=self.score(task),
            higher_is_better=self.cfg.metric.higher_is_better,
            step=step,
            trained_with="qat" if method.startswith("qat") else "float",
            seed=self.seed,
            cost_seconds=seconds,
            data_hash=getattr(self.data, "data_hash", None),
        )

    def calibration_batches(self, num_batches: int) -> list[Any]:
        """Return the first training batches of an epoch."""
        pl.seed_everything(self.seed, verbose=False)
        self.data.prepare_data()
        self.data.setup("fit")
        return list(itertools.islice(self.data.train_dataloader(), num_batches))

    def _trainer(self, **overrides: Any) -> pl.Trainer:
        trainer: pl.Trainer = build(self.cfg.trainer, **overrides, enable_checkpointing=False)
        return trainer

    def _logger(self, arm: str) -> Any:
        """Return the logger of an arm; in W&B a run of its own, in one group with the others."""
        if not self.cfg.logger:
            return False
        logger = open_wandb(self.cfg, f"seed {self.seed}, {arm}", job_type=arm, seed=self.seed, arm=arm)
        return logger or build(self.cfg.logger, prefix=f"seed{self.seed}/{arm}")


def open_wandb(cfg: DictConfig, name: str, job_type: str, **facts: Any) -> WandbLogger | None:
    """Return the logger of a W&B run of its own, in the group of the recipe; None if the configuration has another."""
    if not cfg.logger or "WandbLogger" not in cfg.logger._target_:
        return None
    logger: WandbLogger = build(cfg.logger, name=f"{cfg.name}, {name}", group=cfg.name, job_type=job_type)
    logger.experiment.config.update({"recipe": cfg.name, **facts})
    return logger


def read_seeds(cfg: DictConfig) -> list[int]:
    """Return the seeds of a configuration, which may be one number.

    Raises:
        UsageError: If there are none, or one is listed twice.
    """
    seeds = [cfg.seeds] if isinstance(cfg.seeds, int) else list(cfg.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not all(isinstance(seed, int) for seed in seeds):
        raise UsageError(f"seeds={seeds} must be one or more different whole numbers.")
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
