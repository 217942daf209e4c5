"""Calibration of later parts of a model on what earlier, already quantized ones give."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from lightning_qat.core import PASS_THROUGH_BITS, LayerStats, QuantizedWeight
from lightning_qat.nn.calibrate import CalibrationPlan, Calibrator
from lightning_qat.nn.convert import load_quantized_weight, prepare_passing, quantized_layers, restore_float
from lightning_qat.nn.pending import PendingWeights
from lightning_qat.nn.plan import Plan
from lightning_qat.nn.staged import StagedForward
from lightning_qat.nn.units import find_units


class WorkingModel:
    """A float model whose layers take quantized weights and give them back.

    A context manager: inside, the model computes as it did, until :meth:`load`; afterwards it is what it was.

    Args:
        root: The model, which is changed in place.
        plan: Its layers.
    """

    def __init__(self, root: nn.Module, plan: Plan) -> None:
        self.root, self.plan = root, plan
        self._weights = {each: each.detach().clone() for layer in plan.layers for each in layer.parameters}

    def __enter__(self) -> WorkingModel:
        """Put quantizers in, which let everything pass."""
        prepare_passing(self.root, self.plan)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Take them out, and put the weights back."""
        self.reset()
        restore_float(self.root)

    @torch.no_grad()
    def reset(self) -> None:
        """Put the float weights back, and let inputs pass."""
        for weight, value in self._weights.items():
            weight.copy_(value)
        for layer in quantized_layers(self.root).values():
            if layer.input_fake_quant is not None:
                layer.input_fake_quant.set_num_bits(PASS_THROUGH_BITS)

    def load(self, weights: Mapping[str, QuantizedWeight], num_bits: float) -> None:
        """Quantize the layers that ``weights`` names, and their inputs as their schemes say."""
        layers = quantized_layers(self.root)
        for name, quantized in weights.items():
            load_quantized_weight(layers[name], quantized, num_bits)


class SequentialCalibration:
    """Calibrates the units of a model in the order in which they run, each on what the quantized ones before give.

    The layers of one unit are calibrated together, on one another's float outputs, as llm-compressor does it.

    Args:
        model: The model, entered.
        calibrator: Knows the layers, the batches and the budget.
        rounded: All weights rounded to nearest, to try whether units that are done need not be computed again.
        num_bits: The width of these.

    Attributes:
        plan: How one method at one width is calibrated.
        idle: Layers that no batch reaches.
    """

    def __init__(
        self, model: WorkingModel, calibrator: Calibrator, rounded: Mapping[str, QuantizedWeight], num_bits: float
    ) -> None:
        self.model, self.calibrator = model, calibrator
        names = {module: name for name, module in model.root.named_modules()}
        units = {names[unit]: unit for unit in find_units(model.root, set(calibrator.layers.values()))}
        groups = [group for some in calibrator.plan().passes for group in some]
        model.load(rounded, num_bits)
        self.forward = StagedForward(units, calibrator.layers, calibrator.run, len(calibrator.batches))
        self._plans = [self._plan_stage(groups, set(stage)) for stage in self.forward.stages]
        reached = {name for stage in self.forward.stages for name in stage}
        self.idle = [name for name in calibrator.layers if name not in reached]
        if self._shares_weights():
            self.forward.obstacle = "its parts share weights"
        else:
            self.forward.try_replay(calibrator.memory_budget)
        model.reset()
        self.plan = self._describe()

    def _plan_stage(self, groups: Sequence[tuple[str, ...]], names: set[str]) -> CalibrationPlan:
        own = [tuple(name for name in group if name in names) for group in groups]
        return self.calibrator.plan_passes([group for group in own if group])

    def _shares_weights(self) -> bool:
        """Return whether a change of one stage's weights changes another's."""
        stage_of = {name: stage for stage, names in enumerate(self.forward.stages) for name in names}
        stages: dict[nn.Parameter, set[int | None]] = {}
        for layer in self.model.plan.layers:
            stages.setdefault(layer.weight, set()).add(stage_of.get(layer.name))
        return any(len(each) > 1 for each in stages.values())

    def _describe(self) -> CalibrationPlan:
        obstacle = self.forward.obstacle
        how = "by block replay" if obstacle is None else f"by whole forward passes, since {obstacle}"
        return CalibrationPlan(
            tuple(some for plan in self._plans for some in plan.passes),
            max((plan.num_bytes for plan in self._plans), default=0),
            "sequential",
            how,
            len(self.calibrator.batches),
        )

    def quantize(
        self,
        pending: PendingWeights,
        num_bits: float,
        without_inputs: Sequence[str],
        progress: Callable[[Sequence[Any], str], Iterator[Any]],
        label: str,
    ) -> None:
        """Quantize all layers at one width.

        Args:
            pending: The layers, one method and the width.
            num_bits: The width.
            without_inputs: Layers that are not calibrated.
            progress: Wraps the stages, to show a bar.
            label: What the bar says.
        """
        ((_, weights),) = pending.weights.items()
        self.forward.reset()
        self.model.reset()

        def load(names: Sequence[str]) -> None:
            self.model.load({name: weights[name] for name in names}, num_bits)

        load([*pending.add_unknown(without_inputs), *pending.add(self.idle, {})])
        for stage in progress(range(len(self._plans)), label):
            ready = []
            for names, stats in self._collect(stage):
                ready += pending.add(names, stats)
            load(ready)
            self.forward.finish(stage)

    def _collect(self, stage: int) -> Iterator[tuple[list[str], dict[str, LayerStats]]]:
        calibrator = copy.copy(self.calibrator)
        calibrator.run = functools.partial(self.forward.run_to, stage)
        calibrator.progress = lambda batches, _: iter(batches)
        return calibrator.collect(self._plans[stage])
