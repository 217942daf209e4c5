"""What happens at which optimizer step of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_qat.callbacks.scale_drift import DriftBound
from lightning_qat.core import PASS_THROUGH_BITS
from lightning_qat.schedules.open_loop import position_to_step


@dataclass
class Timeline:
    """The schedule of a run in optimizer steps.

    Attributes:
        rungs: (First step, bits) of each rung, in order. Under a schedule that looks at a metric, those to come are
            what will be at the latest, and the field changes with its decisions.
        freeze_step: First step at which the scales no longer move, if it is at the final width; or None.
        total_steps: Length of the run, or None if unknown.
        activation_rungs: Rungs of the inputs, or None if they are those of the weights.
        blend_step: First step at which weights are fake-quantized in full, or None if they are from the start.
        drift_bound: What sets ``freeze_step`` during the run, or None.
        drift_step: First step at which it may look.
        monitor: The metric that the schedule looks at, or None.
        final_bits: Width at which the weights end. Default: that of the last rung.
    """

    rungs: tuple[tuple[int, float], ...]
    freeze_step: int | None
    total_steps: int | None
    activation_rungs: tuple[tuple[int, float], ...] | None = None
    blend_step: int | None = None
    drift_bound: DriftBound | None = None
    drift_step: int = 0
    monitor: str | None = None
    final_bits: float = 0

    def __post_init__(self) -> None:
        """Fill in the final width."""
        if not self.final_bits:
            self.final_bits = self.rungs[-1][1]

    @property
    def start(self) -> int:
        """Step at which fake quantization starts."""
        return self.rungs[0][0]

    @property
    def num_rungs(self) -> int:
        """How many rungs weights or inputs have, whichever have more; or at least have if a metric decides."""
        return max(len(self.rungs) + (self.rungs[-1][1] != self.final_bits), len(self.activation_rungs or ()))

    @property
    def last_rung(self) -> int:
        """First step from which weights and inputs are both at their last width, as far as it is planned."""
        return max(rungs[-1][0] for rungs in (self.rungs, self.activation_rungs) if rungs)

    def num_bits(self, step: int) -> float:
        """Return the width at an optimizer step; before the first rung, that of the pass-through."""
        return _bits_at(self.rungs, step)

    def activation_bits(self, step: int) -> float:
        """Return the width of inputs at an optimizer step."""
        return _bits_at(self.activation_rungs or self.rungs, step)

    def widths(self, step: int) -> tuple[float, float]:
        """Return the widths of weights and of inputs at an optimizer step."""
        return self.num_bits(step), self.activation_bits(step)

    def rung_start(self, step: int) -> int:
        """Return the first step of the rung that ``step`` is on."""
        return max((first for first, _ in self.rungs if first <= step), default=0)

    def is_frozen(self, step: int) -> bool:
        """Return whether scales are frozen at ``step``."""
        return self.freeze_step is not None and step >= self.freeze_step and self._is_at_last_widths(step)

    def may_measure_drift(self, step: int) -> bool:
        """Return whether ``step`` is on the last rung, with weights that are fake-quantized in full."""
        return step >= max(self.drift_step, self.blend_step or 0) and self._is_at_last_widths(step)

    def _is_at_last_widths(self, step: int) -> bool:
        is_last_of_inputs = self.activation_rungs is None or step >= self.activation_rungs[-1][0]
        return self.num_bits(step) == self.final_bits and is_last_of_inputs

    def blend(self, step: int) -> float:
        """Return how much of the weight is fake-quantized at ``step``: 0 when it starts, 1 from ``blend_step`` on."""
        if self.blend_step is None or step >= self.blend_step:
            return 1.0
        first = first_quantized(self.rungs)
        return max(0.0, (step - first) / (self.blend_step - first))

    def figures(self, step: int) -> dict[str, float]:
        """Return what is worth logging of ``step`` besides the width of the weights, if it ever changes."""
        figures = {}
        if self.activation_rungs is not None:
            figures["activation_bits"] = self.activation_bits(step)
        if self.blend_step is not None:
            figures["blend"] = self.blend(step)
        return figures

    def describe_shortfall(self, last_step: int, steps_done: int) -> str | None:
        """Return a warning if a run whose last batch began at ``last_step`` did not reach the scheme."""
        bits, first_step, final_bits = self.num_bits(last_step), self.rungs[-1][0], self.final_bits
        if bits == final_bits and self.activation_rungs is not None:
            bits, (first_step, final_bits) = self.activation_bits(last_step), self.activation_rungs[-1]
        if bits != final_bits:
            position = f" from step {first_step}" if first_step > last_step else ""
            where = f"on the rung of {bits:g} bits, before the last rung ({final_bits:g} bits{position})"
        elif self.blend(last_step) < 1:
            where = f"before its weights were fake-quantized in full (from step {self.blend_step})"
        else:
            return None
        return (
            f"Training stopped at optimizer step {steps_done}, {where}. The model is not trained at its scheme. "
            "Train on from the last checkpoint, or shorten the schedule."
        )

    def __str__(self) -> str:
        """Describe the schedule in one line."""
        length = "" if self.total_steps is None else f" of {self.total_steps}"
        text = f"{_describe(self.rungs)}{length}"
        if self.activation_rungs is not None:
            text = f"weights: {text}; inputs: {_describe(self.activation_rungs)}"
        if self.monitor is not None and self.num_rungs > 1:
            is_planned = self.rungs[-1][1] == self.final_bits
            what = "at the latest, earlier where" if is_planned else f"down to {self.final_bits:g} bits as"
            text = f"{text}, {what} {self.monitor} stops improving"
        if self.blend_step is not None:
            text = f"{text}; blended in until step {self.blend_step}"
        return f"{text}; scales {self._describe_freezing()}"

    def _describe_freezing(self) -> str:
        if self.drift_bound is not None:
            return f"frozen {self.drift_bound}"
        if self.freeze_step is None:
            return "never frozen"
        later = ", or from the last rung on if that begins later" if self.monitor is not None else ""
        return f"frozen from step {self.freeze_step}{later}"


def _bits_at(rungs: Sequence[tuple[int, float]], step: int) -> float:
    reached = [bits for first, bits in rungs if first <= step]
    return reached[-1] if reached else PASS_THROUGH_BITS


def first_quantized(rungs: Sequence[tuple[int, float]]) -> int:
    """Return the first step of a rung that is not the pass-through."""
    return next((first for first, bits in rungs if bits != PASS_THROUGH_BITS), rungs[-1][0])


def _describe(rungs: Sequence[tuple[int, float]]) -> str:
    return ", ".join(f"{bits:g} bit{'' if bits == 1 else 's'} from step {first}" for first, bits in rungs)


def check_position(position: Any, name: str) -> None:
    """Check that a position is a number of optimizer steps or a fraction of the run.

    Raises:
        ValueError: If it is neither.
    """
    try:
        position_to_step(position, total_steps=1)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
