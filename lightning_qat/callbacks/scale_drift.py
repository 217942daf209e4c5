"""Scales that freeze when they have come to rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_qat.core import Observer
from lightning_qat.core.checks import check_positive
from lightning_qat.nn import weight_fake_quants
from lightning_qat.schedules.open_loop import position_to_step

if TYPE_CHECKING:
    from lightning_qat.callbacks.timeline import Timeline


@dataclass(frozen=True)
class DriftBound:
    """Freeze the scales once they drift by less than a bound on the last rung.

    The drift is the mean absolute change of the logarithm of a scale over a window of optimizer steps, averaged over
    the scales of a weight and then over weights: 0.001 is a tenth of a percent.

    Args:
        drift_below: The bound.
        every_n_steps: Length of the window in optimizer steps. Observers that look at the weight now and then need
            one that is at least as long as the time between two looks.
        not_before: Position before which nothing is measured, as an optimizer step or as a fraction of the run.

    Raises:
        TypeError: If a number is of a wrong type.
        ValueError: If it is out of range.
    """

    drift_below: float
    every_n_steps: int = 50
    not_before: float = 0

    def __post_init__(self) -> None:
        """Validate the fields."""
        check_positive(self.drift_below, "freeze_at: drift_below")
        check_positive(self.every_n_steps, "freeze_at: every_n_steps", Integral)
        position_to_step(self.not_before, total_steps=1)

    def check(self, observer: Observer, learn_scales: bool) -> None:
        """Check that scales which are observed now and then move within a window.

        Raises:
            ValueError: If they need not.
        """
        interval = observer.refresh_every_n_steps
        if not learn_scales and not observer.every_forward and interval > self.every_n_steps:
            raise ValueError(
                f"freeze_at: the observer looks at the weights every {interval} steps, so that no scale would drift "
                f"within every_n_steps={self.every_n_steps}. Give every_n_steps={interval} or more, or an observer "
                "with a smaller refresh_every_n_steps."
            )

    def __str__(self) -> str:
        """Describe the bound."""
        return f"once they drift by less than {self.drift_below:g} in {self.every_n_steps} steps"


class ScaleDrift:
    """Measures the drift of all scales of a model, and freezes them on its timeline.

    It is the same on all ranks of a distributed run, since weights and scales are.

    Attributes:
        frozen_at: The step at which scales were frozen, or None.
        last: The drift that was measured last, or None.
    """

    def __init__(self) -> None:
        self.frozen_at: int | None = None
        self.last: float | None = None
        self._rung_start: int | None = None
        self._step: int | None = None
        self._log_scales: dict[str, Tensor] = {}

    def start(self, timeline: Timeline, is_continued: bool) -> None:
        """Forget an earlier fit, or enter in ``timeline`` what was decided before."""
        if not is_continued or timeline.drift_bound is None:
            self.load_state_dict({})
        else:
            timeline.freeze_step = self.frozen_at

    def follow(self, root: nn.Module, timeline: Timeline, step: int) -> bool:
        """Measure if it is time to, before optimizer step ``step``; return whether scales are frozen from it on."""
        bound = timeline.drift_bound
        if bound is None:
            return False
        rung_start = timeline.rung_start(step)
        if rung_start != self._rung_start:
            self.load_state_dict({"rung_start": rung_start})
            timeline.freeze_step = None
        is_due = self._step is None or step - self._step >= bound.every_n_steps
        if self.frozen_at is not None or not timeline.may_measure_drift(step) or not is_due:
            return False
        self._measure(root, step)
        if self.last is None or self.last >= bound.drift_below:
            return False
        self.frozen_at = timeline.freeze_step = step
        self._log_scales = {}
        rank_zero_info(
            f"Scales are frozen from step {step} on: they drifted by {self.last:.3g} in {bound.every_n_steps} steps."
        )
        return True

    @torch.no_grad()
    def _measure(self, root: nn.Module, step: int) -> None:
        before, self._step = self._log_scales, step
        self._log_scales = {
            name: layer.weight_fake_quant.qparams(layer.matrix()).scale.abs().log()
            for name, layer in weight_fake_quants(root)
        }
        if before:
            changes = [(now - before[name].to(now)).abs().mean() for name, now in self._log_scales.items()]
            self.last = torch.stack(changes).mean().item()

    def describe_shortfall(self, timeline: Timeline) -> str | None:
        """Return a warning if a run that has ended measured drift and froze nothing."""
        if timeline.drift_bound is None or self.frozen_at is not None or self._step is None:
            return None
        last = "it was not measured over a whole window" if self.last is None else f"the last was {self.last:.3g}"
        return (
            f"The scales were not frozen: their drift in {timeline.drift_bound.every_n_steps} steps of the last rung "
            f"was never below {timeline.drift_bound.drift_below:g} ({last}). Raise drift_below in freeze_at, or give a "
            "step or a fraction."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the next drift is measured from, and what was decided."""
        return {
            "frozen_at": self.frozen_at,
            "last": self.last,
            "rung_start": self._rung_start,
            "step": self._step,
            "log_scales": dict(self._log_scales),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; nothing starts anew."""
        self.frozen_at, self.last = state.get("frozen_at"), state.get("last")
        self._rung_start, self._step = state.get("rung_start"), state.get("step")
        self._log_scales = dict(state.get("log_scales", {}))
