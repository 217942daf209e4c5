"""What happens at which optimizer step: the schedule of one run, with all fractions resolved."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_qat.callbacks.errors import QATConfigurationError, as_configuration_error
from lightning_qat.core import PASS_THROUGH_BITS, Schedule
from lightning_qat.schedules.open_loop import is_fraction, position_to_step


@dataclass(frozen=True)
class Timeline:
    """The schedule of a run in optimizer steps.

    Attributes:
        rungs: (First step, bits) of each rung, in order.
        freeze_step: First step at which the scales no longer move, or None.
        total_steps: Length of the run, or None if unknown.
    """

    rungs: tuple[tuple[int, float], ...]
    freeze_step: int | None
    total_steps: int | None

    def num_bits(self, step: int) -> float:
        """Return the width at an optimizer step; before the first rung, that of the pass-through."""
        reached = [bits for first, bits in self.rungs if first <= step]
        return reached[-1] if reached else PASS_THROUGH_BITS

    def rung_start(self, step: int) -> int:
        """Return the first step of the rung that ``step`` is on."""
        return max((first for first, _ in self.rungs if first <= step), default=0)

    def is_frozen(self, step: int) -> bool:
        """Return whether scales are frozen at ``step``."""
        return self.freeze_step is not None and step >= self.freeze_step

    def describe_shortfall(self, last_step: int, steps_done: int) -> str | None:
        """Return a warning if a run whose last batch began at ``last_step`` did not reach the last rung."""
        first_step, num_bits = self.rungs[-1]
        if last_step >= first_step:
            return None
        return (
            f"Training stopped at optimizer step {steps_done}, on the rung of {self.num_bits(last_step):g} bits, "
            f"before the last rung ({num_bits:g} bits from step {first_step}). The model is not trained at its scheme. "
            "Train on from the last checkpoint, or shorten the schedule."
        )

    def __str__(self) -> str:
        """Describe the schedule in one line."""
        rungs = ", ".join(f"{bits:g} bits from step {first}" for first, bits in self.rungs)
        length = "" if self.total_steps is None else f" of {self.total_steps}"
        frozen = "never frozen" if self.freeze_step is None else f"frozen from step {self.freeze_step}"
        return f"{rungs}{length}; scales {frozen}"


def check_position(position: Any, name: str) -> None:
    """Check that a position is a number of optimizer steps or a fraction of the run.

    Raises:
        ValueError: If it is neither.
    """
    try:
        position_to_step(position, total_steps=1)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def make_timeline(trainer: pl.Trainer, schedule: Schedule, start: float, freeze_at: float | None) -> Timeline:
    """Resolve the positions for the run that ``trainer``, its strategy set up, is about to do.

    Raises:
        QATConfigurationError: If a fraction is given for a run without a known end or under manual
            optimization, or :func:`resolve` refuses.
    """
    is_fractional = schedule.is_fractional or is_fraction(start) or is_fraction(freeze_at)
    total_steps = _total_steps(trainer, is_fractional)
    if trainer.fast_dev_run and total_steps != 0:  # type: ignore[attr-defined]  # its few batches test the final grid
        freeze_step = None if freeze_at is None else 0
        return Timeline(((0, schedule.final_bits),), freeze_step, total_steps)
    return resolve(schedule, start, freeze_at, total_steps)


def resolve(schedule: Schedule, start: float, freeze_at: float | None, total_steps: int | None) -> Timeline:
    """Resolve the positions for a run of ``total_steps`` optimizer steps.

    Args:
        schedule: The schedule of bits.
        start: When fake quantization starts, in optimizer steps or as a fraction of the run.
        freeze_at: When scales freeze, likewise, or None.
        total_steps: Length of the run, or None if it is unknown.

    Raises:
        QATConfigurationError: If the run ends before a rung or the freezing of scales is reached, or scales
            would freeze before the last rung.
    """
    if total_steps == 0:
        raise QATConfigurationError("The Trainer is set to do no optimizer step. Raise max_steps or max_epochs.")
    with as_configuration_error():
        first = position_to_step(start, total_steps)
        rungs = schedule.rungs(first, total_steps)
        freeze_step = None if freeze_at is None else position_to_step(freeze_at, total_steps)
    if total_steps is not None and total_steps <= first:
        raise QATConfigurationError(
            f"Fake quantization would start after {first} steps, but the run has only {total_steps} optimizer steps. "
            "Lower fake_quant_after_n_steps or train longer."
        )
    if total_steps is not None and freeze_step is not None and freeze_step >= total_steps:
        raise QATConfigurationError(
            f"freeze_at={freeze_at} would freeze the scales after the last of {total_steps} optimizer steps. Freeze "
            "earlier (or at a fraction of the run), or leave freeze_at out."
        )
    last_rung = rungs[-1][0]
    if freeze_step is not None and freeze_step < last_rung:
        raise QATConfigurationError(
            f"freeze_at={freeze_at} freezes the scales at step {freeze_step}, before the last rung ({rungs[-1][1]:g} "
            f"bits) begins at step {last_rung}. Freeze at step {last_rung} or later."
        )
    return Timeline(tuple(rungs), freeze_step, total_steps)


def _total_steps(trainer: pl.Trainer, is_required: bool) -> int | None:
    """Return the optimizer steps of the run; None if they are unknown and not required."""
    if trainer.max_steps == 0 or trainer.max_epochs == 0:
        return 0
    if not trainer.lightning_module.automatic_optimization:
        if is_required:
            raise QATConfigurationError(
                "Fractions of the run, and rungs that share it equally, cannot be turned into optimizer steps under "
                "manual optimization. Give schedule (as in {0: 8, 500: 4}), fake_quant_after_n_steps and freeze_at as "
                "whole numbers of optimizer steps; Trainer.global_step counts those of every optimizer."
            )
        return trainer.max_steps if trainer.max_steps > 0 else None
    if trainer.max_epochs != -1 and any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks):  # type: ignore[attr-defined]
        if is_required:
            raise QATConfigurationError(
                "Fractions of the run, and rungs that share it equally, cannot be turned into optimizer steps beside "
                "GradientAccumulationScheduler. Set Trainer(max_steps=..., max_epochs=-1), or give schedule, "
                "fake_quant_after_n_steps and freeze_at as whole numbers of optimizer steps."
            )
        return None
    total = trainer.estimated_stepping_batches
    if total > 0 and not math.isinf(total):
        return int(total)
    if is_required:
        raise QATConfigurationError(
            "The schedule uses fractions of the run, but this run has no known end (max_time, max_epochs=-1, or a "
            "loader without a length). Set Trainer(max_steps=...), or give the schedule in optimizer steps."
        )
    return None
