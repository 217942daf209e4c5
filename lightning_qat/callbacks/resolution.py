"""Positions in time become optimizer steps of the run at hand, and what does not fit is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_qat.callbacks.errors import QATConfigurationError, as_configuration_error
from lightning_qat.callbacks.isolation import isolate_randomness
from lightning_qat.callbacks.scale_drift import DriftBound
from lightning_qat.callbacks.timeline import Timeline, check_position, first_quantized
from lightning_qat.callbacks.twins import either
from lightning_qat.core import Schedule
from lightning_qat.schedules.open_loop import is_fraction, position_to_step

_IN_STEPS = (
    "Give schedule (as in {0: 8, 500: 4}, or its end), fake_quant_after_n_steps, blend_until and freeze_at as whole "
    "numbers of optimizer steps"
)


def read_freeze_at(freeze_at: float | Mapping[str, Any] | DriftBound | None) -> float | DriftBound | None:
    """Return the position, or the bound, at which scales freeze.

    Raises:
        TypeError: If a field of the mapping does not exist or is of a wrong type.
        ValueError: If it is not valid.
    """
    if isinstance(freeze_at, Mapping):
        try:
            return DriftBound(**{str(key): freeze_at[key] for key in freeze_at})
        except TypeError as error:
            raise TypeError(
                f"freeze_at={dict(freeze_at)}: {error}. It takes drift_below, every_n_steps and not_before."
            ) from error
    if freeze_at is not None and not isinstance(freeze_at, DriftBound):
        check_position(freeze_at, "freeze_at")
    return freeze_at


def make_timeline(
    trainer: pl.Trainer,
    schedule: Schedule,
    start: float,
    freeze_at: float | DriftBound | None,
    blend_until: float | None = None,
) -> Timeline:
    """Resolve the positions for the run that ``trainer``, its strategy set up, is about to do.

    Raises:
        QATConfigurationError: If a fraction is given for a run without a known end or under manual
            optimization, or :func:`resolve` refuses.
    """
    freeze_position = freeze_at.not_before if isinstance(freeze_at, DriftBound) else freeze_at
    is_fractional = schedule.is_fractional or any(map(is_fraction, (start, freeze_position, blend_until)))
    total_steps = _total_steps(trainer, is_fractional)
    if trainer.fast_dev_run and total_steps != 0:  # type: ignore[attr-defined]  # its few batches test the final grid
        freeze_step = None if freeze_at is None else 0
        return Timeline(((0, schedule.final_bits),), freeze_step, total_steps)
    return resolve(schedule, start, freeze_at, total_steps, blend_until)


def resolve(
    schedule: Schedule,
    start: float,
    freeze_at: float | DriftBound | None,
    total_steps: int | None,
    blend_until: float | None = None,
) -> Timeline:
    """Resolve the positions for a run of ``total_steps`` optimizer steps.

    Args:
        schedule: The schedule of bits.
        start: When fake quantization starts, in optimizer steps or as a fraction of the run.
        freeze_at: When scales freeze, likewise; or at which drift; or None.
        total_steps: Length of the run, or None if it is unknown.
        blend_until: When weights are fake-quantized in full, or None for as soon as fake quantization starts.

    Raises:
        QATConfigurationError: If the run ends before a rung, the freezing of scales or the end of the blend is
            reached; if scales would freeze before the last rung or the end of the blend; or if that comes before fake
            quantization starts.
    """
    if total_steps == 0:
        raise QATConfigurationError("The Trainer is set to do no optimizer step. Raise max_steps or max_epochs.")
    bound, freeze_at = (freeze_at, None) if isinstance(freeze_at, DriftBound) else (None, freeze_at)
    with as_configuration_error():
        first = position_to_step(start, total_steps)
        rungs = schedule.rungs(first, total_steps)
        activation_rungs = schedule.activation_rungs(first, total_steps)
        freeze_step, blend_step = (
            None if position is None else position_to_step(position, total_steps)
            for position in (freeze_at, blend_until)
        )
        timeline = Timeline(
            rungs=tuple(rungs),
            freeze_step=freeze_step,
            total_steps=total_steps,
            activation_rungs=None if activation_rungs is None else tuple(activation_rungs),
            blend_step=blend_step,
            drift_bound=bound,
            drift_step=0 if bound is None else position_to_step(bound.not_before, total_steps),
            monitor=schedule.monitor,
            final_bits=schedule.final_bits if schedule.monitor is not None else 0,
        )
    if total_steps is not None and total_steps <= first:
        raise QATConfigurationError(
            f"Fake quantization would start after {first} steps, but the run has only {total_steps} optimizer steps. "
            "Lower fake_quant_after_n_steps or train longer."
        )
    _check_blend(timeline, blend_until)
    _check_freezing(timeline, freeze_at)
    _check_drift(timeline)
    return timeline


def _check_blend(timeline: Timeline, blend_until: float | None) -> None:
    if timeline.blend_step is None:
        return
    first = first_quantized(timeline.rungs)
    if timeline.blend_step < first:
        raise QATConfigurationError(
            f"blend_until={blend_until} ends at step {timeline.blend_step}, but fake quantization starts only at step "
            f"{first}. Let the blend end later, or start earlier."
        )
    if timeline.total_steps is not None and timeline.blend_step >= timeline.total_steps:
        raise QATConfigurationError(
            f"blend_until={blend_until} leaves none of {timeline.total_steps} optimizer steps at full fake "
            "quantization. Let the blend end earlier (or at a fraction of the run)."
        )


def _check_freezing(timeline: Timeline, freeze_at: float | None) -> None:
    if (freeze_step := timeline.freeze_step) is None:
        return
    if timeline.total_steps is not None and freeze_step >= timeline.total_steps:
        raise QATConfigurationError(
            f"freeze_at={freeze_at} would freeze the scales after the last of {timeline.total_steps} optimizer steps. "
            "Freeze earlier (or at a fraction of the run), or leave freeze_at out."
        )
    last_rung = timeline.last_rung
    if timeline.monitor is None and freeze_step < last_rung:
        num_bits, input_bits = timeline.widths(last_rung)
        is_of_inputs = timeline.rungs[-1][0] < last_rung
        what = f"inputs at {input_bits:g} bits" if is_of_inputs else f"{num_bits:g} bits"
        raise QATConfigurationError(
            f"freeze_at={freeze_at} freezes the scales at step {freeze_step}, before the last rung ({what}) begins at "
            f"step {last_rung}. Freeze at step {last_rung} or later."
        )
    if timeline.blend_step is not None and freeze_step < timeline.blend_step:
        raise QATConfigurationError(
            f"freeze_at={freeze_at} freezes the scales at step {freeze_step}, before the weights are fake-quantized in "
            f"full at step {timeline.blend_step}. Freeze at that step or later, or let blend_until end earlier."
        )


def _check_drift(timeline: Timeline) -> None:
    bound, total_steps = timeline.drift_bound, timeline.total_steps
    if bound is None or total_steps is None:
        return
    last_rung = timeline.last_rung if timeline.monitor is None else 0
    earliest = max(last_rung, timeline.drift_step, timeline.blend_step or 0)
    if earliest + bound.every_n_steps >= total_steps:
        raise QATConfigurationError(
            f"freeze_at: the drift would be measured from step {earliest} to step {earliest + bound.every_n_steps} for "
            f"the first time, but the run has only {total_steps} optimizer steps. Lower every_n_steps or not_before, "
            "or train longer."
        )


def _total_steps(trainer: pl.Trainer, is_required: bool) -> int | None:
    """Return the optimizer steps of the run; None if they are unknown and not required."""
    if trainer.max_steps == 0 or trainer.max_epochs == 0:
        return 0
    if not trainer.lightning_module.automatic_optimization:
        if is_required:
            raise QATConfigurationError(
                "Fractions of the run, and rungs that share it equally, cannot be turned into optimizer steps under "
                f"manual optimization. {_IN_STEPS}; Trainer.global_step counts those of every optimizer."
            )
        return trainer.max_steps if trainer.max_steps > 0 else None
    accumulates = either(GradientAccumulationScheduler)
    if trainer.max_epochs != -1 and any(isinstance(each, accumulates) for each in trainer.callbacks):  # type: ignore[attr-defined]
        if is_required:
            raise QATConfigurationError(
                "Fractions of the run, and rungs that share it equally, cannot be turned into optimizer steps beside "
                f"GradientAccumulationScheduler. Set Trainer(max_steps=..., max_epochs=-1). {_IN_STEPS}."
            )
        return None
    total = _estimate_steps(trainer)
    if total > 0 and not math.isinf(total):
        return int(total)
    if is_required:
        raise QATConfigurationError(
            "The schedule uses fractions of the run, but this run has no known end (max_time, max_epochs=-1, or a "
            f"loader without a length). Set Trainer(max_steps=...). {_IN_STEPS}."
        )
    return None


def _estimate_steps(trainer: pl.Trainer) -> float:
    """Return the optimizer steps of the run as Lightning estimates them, loaders of a resumed run left as they were.

    Lightning sets the loaders up for it, and would not give them the state of the checkpoint later, since it does so
    when it sets them up.
    """
    if trainer.ckpt_path is None or trainer.train_dataloader is not None:
        return trainer.estimated_stepping_batches
    with isolate_randomness([]):
        total = trainer.estimated_stepping_batches
    trainer.fit_loop._combined_loader = None
    return total
