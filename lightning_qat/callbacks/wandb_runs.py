"""The W&B runs of a Trainer, and how to talk to them: what fails there costs a warning, and never the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_qat.callbacks.twins import either

_STEP = "trainer/global_step"
_warned: WeakSet[Logger] = WeakSet()


def is_wandb(logger: Logger) -> bool:
    """Return whether a logger is W&B's; W&B itself is not imported for the answer."""
    return isinstance(logger, either(WandbLogger))


def has_wandb(trainer: pl.Trainer) -> bool:
    """Return whether a Trainer has a W&B logger; all processes get the same answer."""
    return any(is_wandb(logger) for logger in trainer.loggers)


@contextmanager
def harmless(logger: Logger) -> Iterator[None]:
    """Let no exception of W&B out: warn of the first one of a logger, and say nothing of those that follow."""
    try:
        yield
    except Exception as error:
        if not is_wandb(logger):
            raise
        if logger not in _warned:
            _warned.add(logger)
            rank_zero_warn(
                f"W&B failed, and lacks something of this run; training goes on, and no more is said of it. "
                f"{type(error).__name__}: {error}"
            )


@rank_zero_only
def for_each_run(trainer: pl.Trainer, do: Callable[[Any, Any], object]) -> None:
    """Call ``do`` with every W&B logger of a Trainer and its run, on the first process alone."""
    loggers: list[Any] = [logger for logger in trainer.loggers if is_wandb(logger)]
    for logger in loggers:
        with harmless(logger):
            do(logger, logger.experiment)


def define_steps(logger: Any, run: Any, patterns: Iterable[str]) -> None:
    """Let charts of metrics open with optimizer steps on their horizontal axis.

    ``WandbLogger`` asks for that only in runs that it has started itself, not in one that was already active. With
    ``sync_tensorboard`` it logs no step, and its own axis stays.
    """
    if logger._wandb_init.get("sync_tensorboard"):
        return
    prefix = f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""
    run.define_metric(_STEP)
    for pattern in patterns:
        run.define_metric(f"{prefix}{pattern}", step_metric=_STEP)
