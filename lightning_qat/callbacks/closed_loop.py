"""A schedule that looks at a metric, and the run that it steers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.rung_memory import RungMemory
from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.core import Schedule


class ClosedLoop:
    """Hands metrics to a schedule, its decisions to the timeline, and takes the model back where it decides so.

    Of a schedule that looks at the step alone it keeps nothing.

    Args:
        schedule: The schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._initial = schedule.state_dict()
        self._memory = RungMemory()
        self._num_bits: float | None = None
        self._step: int | None = None
        self._has_seen_metric = False

    def start(self, trainer: pl.Trainer, is_continued: bool) -> None:
        """Forget an earlier fit, unless this one goes on from it, and check that there will be metrics.

        Raises:
            QATConfigurationError: If the schedule looks at a metric, and there is no validation.
        """
        if not is_continued:
            self.load_state_dict({"schedule": self._initial})
        if self.schedule.monitor is not None and not trainer.enable_validation:
            raise QATConfigurationError(
                f"The schedule looks at {self.schedule.monitor!r} after each validation, and this run has none. Give "
                "the Trainer validation data, the module a validation_step, and no limit_val_batches=0; or give a "
                "schedule that looks at the step alone, such as [8, 4, 3]."
            )

    def refresh(self, timeline: Timeline) -> None:
        """Bring ``timeline`` up to date with what the schedule has decided."""
        if self.schedule.monitor is not None and timeline.monitor is not None:
            timeline.rungs = tuple(self.schedule.rungs(timeline.start, timeline.total_steps))

    def before_step(self, trainer: pl.Trainer, root: pl.LightningModule, timeline: Timeline) -> bool:
        """Keep or bring back the end of a rung, before the quantizers go to the next; return whether it came back."""
        if timeline.monitor is None:
            return False
        step, last_step, before = trainer.global_step, self._step, self._num_bits
        may_go_back = self.schedule.may_go_back(step, timeline.start, timeline.total_steps)
        self._step, self._num_bits = step, timeline.num_bits(step)
        # A plan that was made anew, for a longer run, has a wider rung in the past, too: nothing was tried and left.
        was_there = last_step is not None and timeline.num_bits(last_step) == before
        is_back = was_there and before is not None and self._num_bits > before
        if is_back:
            self._memory.bring_back(root, trainer.optimizers)
        elif before is not None and self._num_bits < before and may_go_back:
            self._memory.keep(root, trainer.optimizers)
        if not may_go_back:
            self._memory.drop()
        return is_back

    def after_validation(self, trainer: pl.Trainer, timeline: Timeline, last_step: int | None) -> None:
        """Let the schedule decide.

        Args:
            trainer: The Trainer, at the end of a validation.
            timeline: What the decisions are entered in.
            last_step: The optimizer step of the last training batch. If it is not complete, because gradients are
                accumulated, the next step is the first that can have another width.

        Raises:
            QATConfigurationError: If the metric does not exist.
        """
        if self.schedule.monitor is None or trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = {self.schedule.monitor: self._read_metric(trainer, self.schedule.monitor)}
        if trainer.sanity_checking:  # which tells before training whether the metric is there
            return
        self._has_seen_metric = True
        step = max(trainer.global_step, -1 if last_step is None else last_step + 1)
        is_over = timeline.total_steps is not None and step >= timeline.total_steps
        if timeline.monitor is None or is_over or timeline.blend(step - 1) < 1:
            return
        message = self.schedule.update(metrics, step, timeline.start, timeline.total_steps)
        self.refresh(timeline)
        if message is not None:
            rank_zero_info(f"{message}.")

    def describe_shortfall(self) -> str | None:
        """Return a warning if the run had no validation after all."""
        if self.schedule.monitor is None or self._has_seen_metric:
            return None
        return (
            f"The schedule looks at {self.schedule.monitor!r} after each validation, and there was none in this run. "
            "Validate more often: lower val_check_interval or check_val_every_n_epoch, or train longer."
        )

    @staticmethod
    def _read_metric(trainer: pl.Trainer, name: str) -> float:
        """Return the metric of rank 0, so that all ranks decide alike."""
        value = trainer.callback_metrics.get(name)
        found: float | None = trainer.strategy.broadcast(None if value is None else float(value))
        if found is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise QATConfigurationError(
                f"The schedule looks at {name!r}, which was not logged. Logged metrics: {known}. Set monitor to one of "
                "them, or log it in validation_step."
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {
            "schedule": self.schedule.state_dict(),
            "num_bits": self._num_bits,
            "step": self._step,
            "memory": self._memory.state_dict(),
            "has_seen_metric": self._has_seen_metric,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.schedule.load_state_dict(state.get("schedule", {}))
        self._num_bits, self._step = state.get("num_bits"), state.get("step")
        self._memory.load_state_dict(state.get("memory", {}))
        self._has_seen_metric = state.get("has_seen_metric", False)
