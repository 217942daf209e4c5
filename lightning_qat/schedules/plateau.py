"""Bits that go down when validation no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any

from lightning_qat.core.checks import check_choice, check_positive
from lightning_qat.schedules.open_loop import is_fraction, position_to_step
from lightning_qat.schedules.staircase import Staircase

_LEAST_DIVERGENCE = 1e-4


@dataclass
class _Progress:
    """What a resumed run needs.

    Attributes:
        visits: (First step, index of the width) of each rung until the last validation; none before the first.
        first: First step of the rung that was validated last, or None.
        validations: Validations on it.
        best: Their best metric, or None.
        waited: Validations since the best one.
        best_before: Best metric of the rung before, or None.
        returns: How often each rung was left for the one before it.
    """

    visits: list[tuple[int, int]] = field(default_factory=list)
    first: int | None = None
    validations: int = 0
    best: float | None = None
    waited: int = 0
    best_before: float | None = None
    returns: list[int] = field(default_factory=list)


@dataclass
class Plateau:
    """Go down a rung when a metric has stopped improving; go back up if it diverges after that.

    It decides at the end of a validation, for the next optimizer step. The metric of a rung is compared with the best
    of the same rung; it may be worse than that of the rung before. Validations before fake quantization starts, and
    while it is blended in, do not count. One that does not log the metric counts with the value logged last.

    Until ``end`` the rungs that are left share the steps that are left equally: that is how long each may take at
    most, so that the final width has the rest of the run for itself.

    Going back restores weights, buffers, scales and the state of optimizers as they were when the rung was left;
    learning rates and the count of steps go on. For that, a copy is kept in CPU memory during the trial of a rung, and
    in checkpoints of that time: the size of the model and of its optimizers' state. Weight averages are not restored.

    Args:
        bits: Widths from first to last.
        monitor: The metric, as it is logged; under DDP that of rank 0 decides.
        mode: ``"min"`` or ``"max"``: what is better.
        patience: Validations without improvement after which the rung is left.
        min_delta: By how much a metric must be better to count as improved, in its own unit.
        end: By when the final width is reached at the latest, as an optimizer step or as a fraction of the run, or
            None: however long it takes.
        roll_back: Whether to go back.
        divergence: The factor by which the metric must be worse than the best of the rung before to count as diverged,
            2 for twice the loss or half the accuracy; NaN and infinity always do. It must be worse by more than 0.0001,
            too, so that a best of 0 is no bound; if the metric is noisy there, give ``min_delta``.
        trial: Validations after going down that may lead back.
        max_rollbacks: How often a rung is left so; after that it is kept, come what may, as it is after ``end``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a width does not exist or they do not go down, or a number is out of range.

    Example::

        >>> schedule = Plateau([8, 4, 2], patience=1)
        >>> schedule.rungs(start=0, total_steps=1000)  # if the metric improves all the time
        [(0, 8), (250, 4), (500, 2)]
        >>> for step, loss in ((50, 3.0), (100, 3.0)):
        ...     message = schedule.update({"val/loss": loss}, step, start=0, total_steps=1000)
        >>> message
        'val/loss has not improved for 1 validation: 4 bits from step 100'
        >>> schedule.rungs(start=0, total_steps=1000)
        [(0, 8), (100, 4), (500, 2)]
    """

    bits: Sequence[float] = (8, 4, 3, 2)
    monitor: str = "val/loss"
    mode: str = "min"
    patience: int = 3
    min_delta: float = 0.0
    end: float | None = 0.5
    roll_back: bool = True
    divergence: float = 2.0
    trial: int = 2
    max_rollbacks: int = 1
    _progress: _Progress = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Validate the fields."""
        bits: Any = self.bits
        if isinstance(bits, (Mapping, str)) or not isinstance(bits, Sequence):
            raise TypeError(f"bits={bits!r} must be a list of widths: the metric decides when each begins.")
        self.bits = Staircase([*bits]).widths
        monitor: Any = self.monitor
        if not isinstance(monitor, str) or not monitor:
            raise TypeError(f"monitor={monitor!r} must be the name of a metric that validation logs.")
        check_choice(self.mode, "mode", ("min", "max"))
        kinds = {"patience": int, "trial": int, "max_rollbacks": int, "divergence": Real}
        for name, kind in kinds.items():
            if getattr(self, name) is None:
                raise TypeError(f"{name}=None must be a number; leave it out for the default.")
            check_positive(getattr(self, name), name, kind)
        if self.divergence <= 1:
            raise ValueError(f"divergence={self.divergence} must be above 1, the factor by which a metric is worse.")
        if self.min_delta != 0:
            check_positive(self.min_delta, "min_delta")
        if self.end is not None:
            position_to_step(self.end, total_steps=1)
        self._progress = _Progress(returns=[0] * len(self.bits))

    @property
    def final_bits(self) -> float:
        """Width of the last rung."""
        return self.bits[-1]

    @property
    def is_fractional(self) -> bool:
        """Whether the length of the run must be known."""
        return self.end is not None and is_fraction(self.end) and len(self.bits) > 1

    def rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]]:
        """Return (first step, bits) of the rungs that there were, and of those to come at the latest.

        Raises:
            ValueError: If the run ends before ``end``, fake quantization starts after it, or the length of the run is
                needed and not known.
        """
        return [(first, self.bits[index]) for first, index in self._visits(start, total_steps)]

    def activation_rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]] | None:
        """Return None: inputs are on the rungs of the weights."""
        return None

    def _visits(self, start: int, total_steps: int | None) -> list[tuple[int, int]]:
        visits, end = dict(self._progress.visits or [(start, 0)]), self._end(start, total_steps)
        first, index = max(visits.items())
        while end is not None and index + 1 < len(self.bits):
            # One after the other, so that the rest of a plan is the plan for the rest.
            first += max(end - first, 0) // (len(self.bits) - 1 - index)
            index += 1
            visits[first] = index
        return sorted(visits.items())

    def _end(self, start: int, total_steps: int | None) -> int | None:
        if self.end is None or len(self.bits) == 1:
            return None
        end = position_to_step(self.end, total_steps)
        if total_steps is not None and end >= total_steps:
            raise ValueError(
                f"The final width ({self.final_bits:g} bits) may be reached as late as step {end}, but the run has "
                f"only {total_steps} optimizer steps. Train longer, or lower end={self.end} (or make it a fraction)."
            )
        if end < start:
            raise ValueError(
                f"The schedule is at {self.final_bits:g} bits by step {end}, but fake quantization starts only after "
                f"step {start}. Start earlier, or raise end={self.end}."
            )
        return end

    def update(self, metrics: Mapping[str, float], step: int, start: int, total_steps: int | None) -> str | None:
        """Count a validation before optimizer step ``step``, and decide; see the protocol."""
        if self._progress.visits and self._progress.visits[-1][0] >= step:
            return None  # an earlier validation before the same step has decided where that goes
        passed = [visit for visit in self._visits(start, total_steps) if visit[0] < step]
        if not passed:
            return None
        value, (first, index) = metrics[self.monitor], passed[-1]
        self._enter(first)
        progress = self._progress
        progress.visits = passed
        has_diverged = self.roll_back and index > 0 and progress.validations < self.trial and self._diverged(value)
        if has_diverged and self._may_leave(first, index, step, self._end(start, total_steps)):
            return self._go_back(value, step, passed)
        progress.validations += 1
        if self._is_better(value, progress.best):
            progress.best, progress.waited = value, 0
        else:
            progress.waited += 1
        if index + 1 < len(self.bits) and progress.waited >= self.patience:
            return self._go_down(step, passed)
        if has_diverged:
            return f"{self.monitor} is {value:g} after going to {self.bits[index]:g} bits, and training goes on there"
        return None

    def _enter(self, first: int) -> None:
        """Start counting anew on the rung that began at ``first``, unless that was validated before."""
        progress = self._progress
        if first != progress.first:
            before = progress.best_before if progress.best is None else progress.best
            self._progress = replace(progress, first=first, validations=0, best=None, waited=0, best_before=before)

    def _go_down(self, step: int, passed: list[tuple[int, int]]) -> str:
        index = passed[-1][1] + 1
        self._progress.visits = [*passed, (step, index)]
        unit = "validation" if self.patience == 1 else "validations"
        return f"{self.monitor} has not improved for {self.patience} {unit}: {self.bits[index]:g} bits from step {step}"

    def _go_back(self, value: float, step: int, passed: list[tuple[int, int]]) -> str:
        index, best = passed[-1][1], self._progress.best_before
        returns = [count + (position == index) for position, count in enumerate(self._progress.returns)]
        visits = [*passed, (step, index - 1)]
        self._progress = _Progress(visits, step, self.trial, best, 0, None, returns)
        was = "" if best is None else f" (before: {best:g})"
        return (
            f"{self.monitor} is {value:g}{was} after going to {self.bits[index]:g} bits: back to "
            f"{self.bits[index - 1]:g} bits from step {step}, as the model was when it left them"
        )

    def _is_better(self, value: float, best: float | None) -> bool:
        if not math.isfinite(value):
            return False
        if best is None:
            return True
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta

    def _diverged(self, value: float) -> bool:
        best = self._progress.best_before
        if not math.isfinite(value) or best is None:
            return not math.isfinite(value)
        is_away_from_zero = (best >= 0) == (self.mode == "min")
        bound = best * self.divergence if is_away_from_zero else best / self.divergence
        if self.mode == "min":
            return value > max(bound, best + _LEAST_DIVERGENCE) + self.min_delta
        return value < min(bound, best - _LEAST_DIVERGENCE) - self.min_delta

    def may_go_back(self, step: int, start: int, total_steps: int | None) -> bool:
        """Return whether the rung of ``step`` may yet be left for the one before it."""
        visits = [visit for visit in self._visits(start, total_steps) if visit[0] <= step]
        return bool(visits) and self._may_leave(*visits[-1], step, self._end(start, total_steps))

    def _may_leave(self, first: int, index: int, step: int, end: int | None) -> bool:
        progress = self._progress
        is_on_trial = first != progress.first or progress.validations < self.trial
        is_allowed = self.roll_back and index > 0 and progress.returns[index] < self.max_rollbacks
        return is_allowed and is_on_trial and (end is None or step < end)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen and decided, as primitives."""
        return {"bits": list(self.bits), **asdict(self._progress)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the state of another kind of schedule starts this one anew.

        Raises:
            ValueError: If it comes from other widths.
        """
        fields = {name: value for name, value in state.items() if name != "bits"}
        if not fields:
            self._progress = _Progress(returns=[0] * len(self.bits))
            return
        if list(state["bits"]) != list(self.bits):
            raise ValueError(
                f"The checkpoint was trained with the widths {list(state['bits'])}, and the schedule now has "
                f"{list(self.bits)}. Give those of the checkpoint; or load only its weights."
            )
        visits = [(first, index) for first, index in fields["visits"]]
        self._progress = _Progress(**{**fields, "visits": visits, "returns": list(fields["returns"])})
