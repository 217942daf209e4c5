"""Oscillating weights: measured, dampened, and frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.techniques.positions import find_step
from lightning_qat.callbacks.techniques.technique import Technique
from lightning_qat.callbacks.timeline import Timeline, check_position
from lightning_qat.core.checks import check_positive
from lightning_qat.nn import QATLayer, weight_fake_quants
from lightning_qat.nn.oscillation import (
    OscillationState,
    current_codes,
    dampening_gradient,
    hold_frozen,
    holds_values,
)

_MIB = 2**20


class Oscillation(Technique):
    """Measure how many weights jump to and fro between two levels, and dampen or freeze them if asked for.

    Measured after every optimizer step, in one pass over the weights: a code oscillates if it changes in the direction
    opposite to that of its last change, and a moving average gives the frequency of that. Logged are
    ``qat/oscillating_fraction``, the share of weights with a frequency above ``threshold`` that are not frozen, and
    ``qat/frozen_fraction``. A new rung of the schedule begins from nothing, with no weight frozen.

    A frozen weight gets no gradient, and after every optimizer step it is put back to the level that it was at the
    most. Where scales are learned or observed now and then, it keeps its integer code; where they follow the weights
    (the ``minmax`` observer without ``scale_lr``), it keeps its value.

    Args:
        dampening: Weight lambda of the loss ``||w_hat - clip(w)||²``, summed over all weights, whose gradient is added
            before each optimizer step; from 0 to it by half a cosine, or from the first to the second of two. Default:
            none.
        freeze_threshold: Frequency above which a weight is frozen, or two between which it goes by half a cosine, such
            as ``(0.04, 0.011)``. A single jump back adds ``momentum``: below that, one is enough. Default: no weight is
            frozen.
        start: When dampening and freezing begin, in optimizer steps or as a fraction of the run; a cosine ends with
            the run.
        momentum: Weight of a step in the moving averages.
        threshold: Frequency above which a weight counts as oscillating.
        measure: Whether to measure; dampening alone can do without.
        max_bits: Dampen and freeze weights of at most so many bits at the time; wider ones lose nothing worth the
            loss of freedom.

    Source: Nagel et al. 2022 (arXiv:2203.11086), sections 4.1 to 4.3. Theirs is one scale a layer, learned.
    """

    name: ClassVar[str] = "oscillation"
    needs_whole_model = True

    def __init__(
        self,
        dampening: float | Sequence[float] | None = None,
        freeze_threshold: float | Sequence[float] | None = None,
        start: float = 0.25,
        momentum: float = 0.01,
        threshold: float = 0.005,
        measure: bool = True,
        max_bits: float = 4,
    ) -> None:
        self.dampening = _read_span(dampening, "dampening", is_up_from_zero=True)
        self.freeze_threshold = _read_span(freeze_threshold, "freeze_threshold")
        self.writes_weights = not (self.dampening is None and self.freeze_threshold is None)
        check_position(start, "oscillation: start")
        for name, value in (("momentum", momentum), ("threshold", threshold)):
            check_positive(value, f"oscillation: {name}")
            if value >= 1:
                raise ValueError(f"oscillation: {name}={value} must be below 1.")
        if self.freeze_threshold is not None and not 0 < min(self.freeze_threshold) <= max(self.freeze_threshold) < 1:
            raise ValueError(f"oscillation: freeze_threshold={freeze_threshold!r} must be between 0 and 1.")
        if not measure and self.freeze_threshold is not None:
            raise ValueError("oscillation: freeze_threshold needs the frequencies. Leave measure=False out.")
        if not measure and self.dampening is None:
            raise ValueError("oscillation does nothing with measure=False and no dampening. Leave it out.")
        self.start, self.momentum, self.threshold, self.measure = start, momentum, threshold, measure
        check_positive(max_bits, "oscillation: max_bits")
        self.max_bits = max_bits
        self._forget()

    def _forget(self) -> None:
        self._states: dict[str, OscillationState] = {}
        self._bits: dict[str, float] = {}
        self._step = -1
        self._first_step, self._total_steps = 0, 0
        self._num_weights = 0

    # ------------------------------------------------------------------------------------------------- before

    @override
    def on_model_built(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier fit."""
        self._forget()

    @override
    def on_fit_checked(self, trainer: pl.Trainer, pl_module: pl.LightningModule, timeline: Timeline) -> None:
        """Find when dampening and freezing begin.

        Raises:
            QATConfigurationError: If they never do, or change over a run without a known end.
        """
        self._num_weights = sum(layer.weight.numel() for _, layer in weight_fake_quants(pl_module))
        spans = {"dampening": self.dampening, "freeze_threshold": self.freeze_threshold}
        if not any(spans.values()):
            return
        self._first_step = find_step(trainer, timeline, self.start, "oscillation: start")
        for name, span in spans.items():
            if span is not None and span[0] != span[1] and timeline.total_steps is None:
                raise QATConfigurationError(
                    f"oscillation: {name} goes from {span[0]:g} to {span[1]:g} over a run that has no known end. Set "
                    f"Trainer(max_steps=...), or keep it as it is: {name}=({span[1]:g}, {span[1]:g})."
                )
        self._total_steps = timeline.total_steps or 0

    @override
    def describe(self) -> str:
        """Describe what is done, when, and the memory it takes."""
        parts = []
        if self.measure:
            num_bytes = 6 if self.freeze_threshold is None else 11
            size = f"{num_bytes} bytes a weight, {num_bytes * self._num_weights / _MIB:.1f} MiB"
            parts.append(f"measured at every step ({size}, in checkpoints too)")
        if self.dampening is not None:
            parts.append(f"dampened with a weight {_describe(self.dampening)}")
        if self.freeze_threshold is not None:
            parts.append(f"frozen above a frequency {_describe(self.freeze_threshold)}")
        is_changing = self.dampening is not None or self.freeze_threshold is not None
        where = f", up to {self.max_bits:g} bits, from step {self._first_step}" if is_changing else ""
        return ", ".join(parts) + where

    # ------------------------------------------------------------------------------------------------- during

    @override
    def on_new_rung(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin from nothing where the width has changed: codes of another grid cannot be compared."""
        now = {name: layer.weight_fake_quant.num_bits for name, layer in weight_fake_quants(pl_module)}
        self._states = {name: state for name, state in self._states.items() if self._bits[name] == now[name]}

    @override
    def on_rung_restored(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin from nothing: all weights have changed."""
        self._states = {}

    @override
    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the first codes; put frozen weights onto a grid that has just been observed."""
        if not self.measure:
            return
        for name, layer in _quantized(pl_module).items():
            if name not in self._states:
                self._states[name] = OscillationState.begin(current_codes(layer), self.freeze_threshold is not None)
                self._bits[name] = layer.weight_fake_quant.num_bits
                continue
            self._states[name].to(layer.weight.device)
            if self._is_freezing(trainer.global_step) and _is_observed_now_and_then(layer):
                hold_frozen(layer, self._states[name])

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the gradient of dampening; take that of frozen weights away.

        Precision plugins have unscaled the gradients by now, and accumulation has summed them.
        """
        step = trainer.global_step
        if step < self._first_step or not (self.dampening or self.freeze_threshold):
            return
        own = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, layer in _quantized(pl_module).items():
            if layer.weight not in own or layer.weight.grad is None or not self._is_narrow(layer):
                continue
            if self.dampening is not None:
                _dampen(layer, self._value(self.dampening, step))
            if name in self._states and (frozen := self._states[name].frozen) is not None:
                layer.weight.grad.masked_fill_(layer.from_matrix(frozen, layer.weight), 0.0)

    @override
    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, freeze, and hold what is frozen, if there was an optimizer step."""
        step = trainer.global_step
        if step == self._step or not self.measure:
            return
        self._step = step
        layers = _quantized(pl_module)
        for name, state in self._states.items():
            layer = layers[name]
            state.update(current_codes(layer), self.momentum)
            if self.freeze_threshold is not None and self._is_freezing(step) and self._is_narrow(layer):
                quantizer, matrix = layer.weight_fake_quant, layer.matrix()
                params = quantizer.qparams(matrix) if holds_values(layer) else None
                state.freeze(self._value(self.freeze_threshold, step), params, quantizer.rung_scheme)
                hold_frozen(layer, state)

    def _is_narrow(self, layer: QATLayer) -> bool:
        return layer.weight_fake_quant.num_bits <= self.max_bits

    def _is_freezing(self, step: int) -> bool:
        return self.freeze_threshold is not None and step >= self._first_step

    def _value(self, span: tuple[float, float], step: int) -> float:
        """Return where a cosine between two values is at ``step``."""
        progress = (step - self._first_step) / max(self._total_steps - self._first_step, 1)
        return span[1] + (span[0] - span[1]) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    # ------------------------------------------------------------------------------------------------- results

    @override
    def figures(self) -> Mapping[str, float]:
        """Return the shares of oscillating and of frozen weights, over all layers together."""
        if not self._states:
            return {}
        return self._shares(self._counts().sum(0).tolist(), sum(self._sizes().values()))

    @override
    def layer_figures(self) -> Mapping[str, Mapping[str, float]]:
        """Return the same by layer."""
        if not self._states:
            return {}
        rows = zip(self._sizes().items(), self._counts().tolist(), strict=True)
        return {layer: self._shares(numbers, numel) for (layer, numel), numbers in rows}

    def _counts(self) -> Tensor:
        return torch.stack([state.counts(self.threshold) for state in self._states.values()])

    def _sizes(self) -> dict[str, int]:
        return {name: state.codes.numel() for name, state in self._states.items()}

    def _shares(self, numbers: Sequence[float], numel: int) -> dict[str, float]:
        names = ("oscillating_fraction", "frozen_fraction")[: 1 + (self.freeze_threshold is not None)]
        return {name: number / numel for name, number in zip(names, numbers, strict=False)}

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the state of every weight; the tensors are the ones in use, as in ``Module.state_dict``."""
        layers = {name: state.state_dict() for name, state in self._states.items()}
        return {"step": self._step, "bits": dict(self._bits), "layers": layers}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if not state_dict:  # of a run without this technique
            return
        self._step, self._bits = state_dict["step"], dict(state_dict["bits"])
        if self.measure:
            layers: Mapping[str, Mapping[str, Tensor]] = state_dict["layers"]
            can_freeze = self.freeze_threshold is not None
            self._states = {name: OscillationState.from_state_dict(each, can_freeze) for name, each in layers.items()}


def _quantized(root: nn.Module) -> dict[str, QATLayer]:
    """Return the distinct quantized weights that do not pass unchanged."""
    return {name: layer for name, layer in weight_fake_quants(root) if not layer.weight_fake_quant.pass_through}


def _is_observed_now_and_then(layer: QATLayer) -> bool:
    config = layer.weight_fake_quant.config
    return not (config.observer.every_forward or config.learn_scales)


def _dampen(layer: QATLayer, weight: float) -> None:
    matrix, quantizer = layer.matrix(), layer.weight_fake_quant
    gradient = dampening_gradient(matrix, quantizer.qparams(matrix), quantizer.rung_scheme)
    assert layer.weight.grad is not None
    layer.weight.grad.add_(layer.from_matrix(gradient, layer.weight), alpha=weight)


def _describe(span: tuple[float, float]) -> str:
    return f"of {span[1]:g}" if span[0] == span[1] else f"from {span[0]:g} to {span[1]:g}"


def _read_span(value: Any, name: str, is_up_from_zero: bool = False) -> tuple[float, float] | None:
    """Return the first and the last value of what may be one number, two, or None.

    Raises:
        TypeError: If it is none of these.
        ValueError: If a number is negative, infinite, or nothing but zero.
    """
    if value is None:
        return None
    ends = list(value) if isinstance(value, (list, tuple)) else [0.0 if is_up_from_zero else value, value]
    if len(ends) != 2 or not all(isinstance(end, Real) and not isinstance(end, bool) for end in ends):
        raise TypeError(f"oscillation: {name}={value!r} must be a number, or two: the first and the last value.")
    first, last = map(float, ends)
    if min(first, last) < 0 or not 0 < max(first, last) < math.inf:
        raise ValueError(f"oscillation: {name}={value!r} must be positive and finite; leave it out for none.")
    return first, last
