"""Static inputs: their grids are found in the first steps of training, then frozen or learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qat.callbacks.errors import QATConfigurationError, as_configuration_error
from lightning_qat.callbacks.techniques.technique import Technique
from lightning_qat.callbacks.timeline import Timeline, first_quantized
from lightning_qat.core.checks import check_positive
from lightning_qat.nn import InputFakeQuantize, Rule, StaticInputFakeQuantize, quantized_layers, static_inputs
from lightning_qat.nn.forward import find_mask
from lightning_qat.nn.input_calibration import take_batch

DEFAULT_STEPS = 32


class Inputs(Technique):
    """Calibrate static inputs on the training batches of the first steps in which they are quantized.

    The first batch passes unchanged. From the second on, inputs are quantized on the grid of all batches so far, so
    that each layer sees what the quantized layers before it give, as it will when it is deployed. After the last step
    of the calibration the grid is frozen, or begins to be learned. A layer that no batch has reached by then is
    calibrated, within as many steps, by the first that does.

    Only what training batches feed a layer between ``on_train_batch_start`` and the end of the backward pass counts
    (under manual optimization, until ``on_train_batch_end``): whether a module is in training mode says neither that it
    is trained on nor that it is not. Tokens that the batch's ``attention_mask`` leaves out do not count.

    Args:
        steps: Optimizer steps of the calibration. Default: 32, or a tenth of a shorter run.
    """

    name: ClassVar[str] = "inputs"

    def __init__(self, steps: int | None = None) -> None:
        check_positive(steps, "activation_calibration_steps", Integral)
        self.steps = steps
        self._num_steps = steps or DEFAULT_STEPS
        self._first_step = 0
        self._description = ""
        self._quantizers: dict[str, StaticInputFakeQuantize] = {}
        self._waiting: dict[str, StaticInputFakeQuantize] = {}
        self._last_step: int | None = None
        self._has_warned = False

    # ------------------------------------------------------------------------------------------------- before

    @override
    def on_fit_checked(self, trainer: pl.Trainer, pl_module: pl.LightningModule, timeline: Timeline) -> None:
        """Decide when the calibration ends."""
        self._quantizers = static_inputs(pl_module)
        self._find_waiting()
        self._last_step, self._has_warned = None, False
        self._first_step = first_quantized(timeline.activation_rungs or timeline.rungs)
        left = None if timeline.total_steps is None else timeline.total_steps - self._first_step
        self._num_steps = self.steps or min(DEFAULT_STEPS, DEFAULT_STEPS if left is None else max(1, left // 10))
        if self._waiting and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._check_end(timeline, left)
        self._description = self._describe(pl_module)

    def _check_end(self, timeline: Timeline, left: int | None) -> None:
        end = self._first_step + self._num_steps
        if left is not None and self._num_steps >= left > 1:
            raise QATConfigurationError(
                f"activation_calibration_steps={self._num_steps}, but inputs are quantized in only {left} optimizer "
                "steps of the run. Give fewer, so that training goes on with the grids that are found, or train longer."
            )
        if timeline.freeze_step is not None and timeline.freeze_step < end:
            raise QATConfigurationError(
                f"The grids of static inputs are calibrated until step {end}, but scales freeze at step "
                f"{timeline.freeze_step}. Freeze later, or give fewer activation_calibration_steps."
            )

    @override
    def describe(self) -> str:
        """Describe which inputs are quantized how."""
        return self._description

    def _describe(self, root: nn.Module) -> str:
        quantizers = [layer.input_fake_quant for layer in quantized_layers(root).values()]
        counts = Counter(self._describe_one(each) for each in quantizers)
        return "\n".join(f"{count} layer{'' if count == 1 else 's'}: {text}" for text, count in counts.items())

    def _describe_one(self, quantizer: InputFakeQuantize | None) -> str:
        if quantizer is None:
            return "in float"
        text = quantizer.scheme.describe_as_input()
        if not isinstance(quantizer, StaticInputFakeQuantize):
            return f"{text}, dynamic"
        then = "learned" if quantizer.config.learn else "frozen"
        observer = type(quantizer.config.observer).__name__
        if quantizer.is_settled:
            return f"{text}, calibrated before ({observer}), {then}"
        end = self._first_step + self._num_steps
        return f"{text}, calibrated in the steps before {end} ({observer}), then {then}"

    # ------------------------------------------------------------------------------------------------- during

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the quantizers that are still in calibration observe this batch."""
        self._find_waiting()  # again: a schedule that goes back a rung brings back quantizers as they were on it
        if not self._waiting:
            return
        if self._last_step is None:
            self._take(
                trainer.global_step
            )  # what a checkpoint holds that was saved before this callback's on_train_batch_end
        if trainer.global_step != self._last_step:  # not another batch of the same accumulation
            self._last_step = trainer.global_step
            self._begin_step()
        for quantizer in self._waiting.values():
            quantizer.observe(find_mask(batch))

    def _find_waiting(self) -> None:
        self._waiting = {name: each for name, each in self._quantizers.items() if not each.is_settled}

    def _begin_step(self) -> None:
        """Count the step for the quantizers that quantize, and end the calibration of those that have had theirs."""
        active = {name: each for name, each in self._waiting.items() if not each.pass_through}
        over = {name: each for name, each in active.items() if each.num_steps >= self._num_steps}
        for name, quantizer in over.items():
            if quantizer.is_calibrated:
                quantizer.settle()
                del self._waiting[name]
        for name in active.keys() - over.keys():
            active[name].num_steps += 1
        idle = [name for name, each in over.items() if not each.is_calibrated]
        if idle and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"No input but zeros has reached {', '.join(idle)} in {self._num_steps} steps of calibration. They are "
                "calibrated once a batch reaches them, and pass their inputs in float until then; ignore these layers, "
                "or give them a scheme with dynamic inputs (without '-static')."
            )

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop observing; recomputed activations have been seen by now."""
        if pl_module.automatic_optimization:
            self._stop()

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Learn no grid that is still found anew: without a gradient, no optimizer touches it."""
        for quantizer in self._waiting.values():
            for parameter in quantizer.parameters():
                parameter.grad = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Find the grids of all batches so far."""
        self._stop()
        self._take(trainer.global_step)

    def _stop(self) -> None:
        for quantizer in self._waiting.values():
            quantizer.stop_observing()

    def _take(self, step: int) -> None:
        """Find grids anew; those of layers that no batch has reached in time only now and then, since it has a cost."""
        is_rare = step % self._num_steps != 0
        due = {
            name: each
            for name, each in self._waiting.items()
            if not each.pass_through and not (is_rare and each.num_steps >= self._num_steps and not each.is_calibrated)
        }
        if due:
            with as_configuration_error():
                take_batch(due)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Observe nothing after the fit."""
        self._stop()
        self._quantizers, self._waiting = {}, {}

    # --------------------------------------------------------------------------------------------- evaluation

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to evaluate a model whose inputs would silently stay in float."""
        if trainer.state.fn != TrainerFn.FITTING:
            _check_calibrated(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse likewise."""
        _check_calibrated(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse likewise."""
        _check_calibrated(pl_module)


def _check_calibrated(root: nn.Module) -> None:
    quantizers = static_inputs(root).items()
    waiting = [name for name, each in quantizers if not (each.is_calibrated or each.pass_through)]
    if waiting:
        raise QATConfigurationError(
            f"The static inputs of {', '.join(waiting)} are not calibrated: they would pass in float. Give the "
            "checkpoint of a run with QATCallback (ckpt_path=), or fit first."
        )


def make_inputs(rules: Sequence[Rule], steps: int | None) -> Inputs | None:
    """Return the technique for rules that quantize inputs.

    Raises:
        TypeError: If ``steps`` is no whole number.
        ValueError: If it is not positive.
    """
    schemes = [rule.scheme for rule in rules if rule.scheme is not None]
    return Inputs(steps) if any(scheme.activation is not None for scheme in schemes) else None


def check_static_inputs(rules: Sequence[Rule], arguments: Mapping[str, Any]) -> None:
    """Check that arguments about static inputs, of which None is not given, have inputs to be about.

    Raises:
        ValueError: If one is given and no rule has static inputs.
    """
    if any(rule.scheme is not None and rule.scheme.has_static_activation for rule in rules):
        return
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"{name}={value!r} has no effect: no scheme has static inputs. Leave it out, or give a scheme such as "
                "'w8a8-static'."
            )
