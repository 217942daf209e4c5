"""Quantization of a whole float model after training: every method at every width from one calibration."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import nn

from lightning_qat.core import ActivationObserver, Observer, PTQMethod, QuantizedWeight
from lightning_qat.nn.calibrate import GIB, CalibrationPlan, Calibrator, make_runner
from lightning_qat.nn.convert import load_quantized_weights
from lightning_qat.nn.input_calibration import observe_inputs
from lightning_qat.nn.pending import PendingWeights
from lightning_qat.nn.plan import Plan
from lightning_qat.nn.sequential import SequentialCalibration, WorkingModel
from lightning_qat.nn.static_input import StaticInputConfig
from lightning_qat.ptq import RTN
from lightning_qat.ptq.engine import LayerReport

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass
class PTQResults:
    """What a sweep found.

    Attributes:
        plan: The layers, with schemes at the final width.
        bits: The widths, as asked for.
        weights: Quantized weights by (method, width) and layer name.
        reports: One entry per layer, method and width.
        calibration: How the inputs were gathered, or None if no method needed them.
        calibrated: Names of the methods that needed them.
    """

    plan: Plan
    bits: tuple[float, ...]
    weights: dict[tuple[str, float], dict[str, QuantizedWeight]] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    calibration: CalibrationPlan | None = None
    calibrated: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        """Describe the results in one line."""
        methods = ", ".join(dict.fromkeys(method for method, _ in self.weights))
        bits = ", ".join(f"{width:g}" for width in self.bits)
        return (
            f"PTQResults({methods} at {bits} bits, {len(self.plan.layers)} layers, {len(self.fallbacks())} fallbacks)"
        )

    def _check_method(self, method: str | None) -> None:
        known = list(dict.fromkeys(method for method, _ in self.weights))
        if method is not None and method not in known:
            raise ValueError(f"There is no result of {method!r}; there are {', '.join(known)}.")

    def fallbacks(self, method: str | None = None) -> list[LayerReport]:
        """Return the reports of layers that kept round-to-nearest, of one method or of all; each says why."""
        self._check_method(method)
        return [report for report in self.reports if report.fallback and method in (None, report.method)]

    def num_reports(self, method: str) -> int:
        """Return the number of layers and widths that ``method`` was tried on."""
        self._check_method(method)
        return sum(report.method == method for report in self.reports)

    def calibration_of(self, method: str) -> str | None:
        """Return ``one-shot`` or ``sequential``; None if ``method`` needs no inputs."""
        self._check_method(method)
        return self.calibration.kind if self.calibration is not None and method in self.calibrated else None

    def seconds(self, method: str, num_bits: float) -> float:
        """Return the wall time of ``method`` at ``num_bits`` over all layers, calibration not counted."""
        self._check_method(method)
        return sum(r.seconds for r in self.reports if (r.method, r.rung) == (method, num_bits))

    def apply(self, root: ModuleT, method: str, num_bits: float) -> ModuleT:
        """Put what ``method`` found at ``num_bits`` into ``root``, in place, and return it.

        Weights become their dequantized values, which pass unchanged (layers say that they are at 16 bits); inputs
        are fake-quantized if the scheme says so. :func:`~lightning_qat.nn.restore_float` then leaves a plain model
        with the *quantized* weights, whose ``state_dict`` is that of the float model: keep a copy of that.

        Args:
            root: The float model that was quantized, or a copy.
            method: Name of the method.
            num_bits: One of ``bits``.

        Raises:
            ValueError: If there is no such result, or ``root`` has not the layers that were quantized.
        """
        if (method, num_bits) not in self.weights:
            known = ", ".join(f"({name!r}, {width:g})" for name, width in self.weights)
            raise ValueError(f"There is no result of {method!r} at {num_bits!r} bits; there are {known}.")
        missing = {layer.name for layer in self.plan.layers} - {name for name, _ in root.named_modules()}
        if missing:
            raise ValueError(
                f"The model is not the one that was quantized: it has no {', '.join(sorted(missing)[:3])}."
            )
        load_quantized_weights(root, self.plan, self.weights[method, num_bits], num_bits)
        return root


def sweep(
    root: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    methods: Mapping[str, PTQMethod],
    bits: Sequence[float],
    observer: Observer,
    *,
    activation_observer: ActivationObserver | None = None,
    step: Callable[[Any], Any] | None = None,
    memory_budget: int = 4 * GIB,
    unseen: Literal["error", "rtn"] = "error",
    sequential: bool = False,
    progress: Callable[[Sequence[Any], str], Iterator[Any]] | None = None,
    tell: Callable[[str], None] | None = None,
) -> PTQResults:
    """Quantize the layers of ``plan`` by every method at every width; ``root`` is not changed.

    If ``torch.distributed`` has several processes, all must call this, each with batches of its own; statistics
    are summed over them, so that all get the same results.

    Args:
        root: The float model. If ``sequential``, it takes quantized weights meanwhile.
        plan: Its layers and their schemes; a layer never goes below the width of its own.
        batches: Calibration batches.
        methods: Methods by name.
        bits: Widths.
        observer: Where ranges come from for methods without a search of their own.
        activation_observer: Where those of static inputs come from: calibrated once, on the float model, for all
            methods and widths, also if ``sequential``. Default: the range with the least squared error.
        step: Called with each batch; runs the model.
        memory_budget: Bytes for Hessians.
        unseen: What to do with layers that no token reached: raise, or round them to nearest, which the
            reports then say.
        sequential: Calibrate later parts of the model on inputs that the quantized earlier ones give, once for every
            method and width, instead of all on those of the float model.
        progress: Wraps the batches to show a bar.
        tell: Called with the calibration plan in words.

    Raises:
        ValueError: If layers saw no token, or saw NaN or infinite inputs; they are named.
    """
    run = make_runner(root, batches, step)
    plan = observe_inputs(plan, activation_observer or StaticInputConfig().observer, run, batches, unseen)
    without_inputs = [layer.name for layer in plan.layers if layer.takes_index]
    with_inputs = {layer.name: layer.module for layer in plan.layers if not layer.takes_index}
    if not with_inputs or not _calibrated(methods):
        pending = PendingWeights(plan, methods, bits, observer)
        pending.add_unknown([layer.name for layer in plan.layers])
        return PTQResults(plan, tuple(bits), pending.weights, pending.reports)
    calibrator = Calibrator(with_inputs, batches, run, memory_budget, progress)
    if sequential:
        return _sweep_sequentially(root, plan, calibrator, without_inputs, methods, bits, observer, unseen, tell)
    calibration = calibrator.plan()
    if tell is not None:
        tell(str(calibration))
    pending = PendingWeights(plan, methods, bits, observer, unseen)
    pending.add_unknown(without_inputs)
    for names, stats in calibrator.collect(calibration):
        pending.add(names, stats)
        del stats
    return PTQResults(plan, tuple(bits), pending.weights, pending.reports, calibration, _calibrated(methods))


def _sweep_sequentially(
    root: nn.Module,
    plan: Plan,
    calibrator: Calibrator,
    without_inputs: Sequence[str],
    methods: Mapping[str, PTQMethod],
    bits: Sequence[float],
    observer: Observer,
    unseen: Literal["error", "rtn"],
    tell: Callable[[str], None] | None,
) -> PTQResults:
    rounded = PendingWeights(plan, {"rtn": RTN()}, [min(bits)], observer)
    rounded.add_unknown([layer.name for layer in plan.layers])
    results = PTQResults(plan, tuple(bits), calibrated=_calibrated(methods))
    with WorkingModel(root, plan) as model:
        calibration = SequentialCalibration(model, calibrator, rounded.weights["rtn", min(bits)], min(bits))
        results.calibration = calibration.plan
        if tell is not None:
            tell(f"{calibration.plan}, for every method and width")
        for method, width in itertools.product(methods, bits):
            pending = PendingWeights(plan, {method: methods[method]}, [width], observer, unseen)
            if methods[method].needs_stats:
                label = f"{method} at {width:g} bits, part by part"
                calibration.quantize(pending, width, without_inputs, calibrator.progress, label)
            else:
                pending.add_unknown([layer.name for layer in plan.layers])
            results.weights.update(pending.weights)
            results.reports += pending.reports
    return results


def _calibrated(methods: Mapping[str, PTQMethod]) -> frozenset[str]:
    return frozenset(name for name, method in methods.items() if method.needs_stats)
