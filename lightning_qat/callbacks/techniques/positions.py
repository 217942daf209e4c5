"""When a technique does something: a position in the run as an optimizer step."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.schedules.open_loop import is_fraction, position_to_step


def find_step(trainer: pl.Trainer, timeline: Timeline, position: float, argument: str) -> int:
    """Return the optimizer step of a position: a whole number of steps, or a fraction of the run.

    Under ``fast_dev_run`` it is 0: its few batches are to test everything.

    Args:
        trainer: The Trainer.
        timeline: What happens in the run otherwise.
        position: The position, as :func:`~lightning_qat.callbacks.timeline.check_position` allows.
        argument: The argument that it was given by, for messages.

    Raises:
        QATConfigurationError: If the run ends before it, or it is a fraction of a run without a known end.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return 0
    total_steps = timeline.total_steps
    if is_fraction(position) and total_steps is None:
        raise QATConfigurationError(
            f"{argument}={position} is a fraction of a run that has no known end. Set Trainer(max_steps=...), or give "
            f"{argument} in optimizer steps."
        )
    step = position_to_step(position, total_steps)
    if total_steps is not None and step >= total_steps:
        raise QATConfigurationError(
            f"{argument}={position} is not reached in a run of {total_steps} optimizer steps. Give an earlier step or "
            "a fraction of the run, or train longer."
        )
    return step
