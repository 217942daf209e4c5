"""Quantization of a whole float model after training: every method at every width from one calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from lightning_qat.core import LayerStats, Observer, PTQMethod, QuantizedWeight
from lightning_qat.nn.calibrate import GIB, CalibrationPlan, Calibrator
from lightning_qat.nn.convert import load_quantized_weights
from lightning_qat.nn.plan import Plan, PlannedLayer
from lightning_qat.ptq.engine import LayerReport, quantize_layer

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
    """

    plan: Plan
    bits: tuple[float, ...]
    weights: dict[tuple[str, float], dict[str, QuantizedWeight]] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    calibration: CalibrationPlan | None = None

    def fallbacks(self, method: str | None = None) -> list[LayerReport]:
        """Return the reports of layers that kept round-to-nearest, of one method or of all."""
        return [report for report in self.reports if report.fallback and method in (None, report.method)]

    def num_reports(self, method: str) -> int:
        """Return the number of layers and widths that ``method`` was tried on."""
        return sum(report.method == method for report in self.reports)

    def seconds(self, method: str, num_bits: float) -> float:
        """Return the wall time of ``method`` at ``num_bits`` over all layers, calibration not counted."""
        return sum(r.seconds for r in self.reports if (r.method, r.rung) == (method, num_bits))

    def apply(self, root: ModuleT, method: str, num_bits: float) -> ModuleT:
        """Put what ``method`` found at ``num_bits`` into ``root``, in place, and return it.

        Weights become their dequantized values, inputs are fake-quantized if the scheme says so;
        :func:`~lightning_qat.nn.restore_float` then leaves a plain model with these weights.

        Args:
            root: The float model that was quantized, or a copy.
            method: Name of the method.
            num_bits: One of ``bits``.

        Raises:
            ValueError: If there is no such result, or ``root`` is another model.
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
    step: Callable[[Any], Any] | None = None,
    memory_budget: int = 4 * GIB,
    unseen: Literal["error", "rtn"] = "error",
    progress: Callable[[Sequence[Any], str], Iterator[Any]] | None = None,
    tell: Callable[[str], None] | None = None,
) -> PTQResults:
    """Quantize the layers of ``plan`` by every method at every width; ``root`` is not changed.

    If ``torch.distributed`` has several processes, all must call this, each with batches of its own; statistics
    are summed over them, so that all get the same results.

    Args:
        root: The float model.
        plan: Its layers and their schemes; a layer never goes below the width of its own.
        batches: Calibration batches.
        methods: Methods by name.
        bits: Widths.
        observer: Where ranges come from for methods without a search of their own.
        step: Called with each batch; runs the model.
        memory_budget: Bytes for Hessians.
        unseen: What to do with layers that no token reached: raise, or round them to nearest, which the
            reports then say.
        progress: Wraps the batches to show a bar.
        tell: Called with the calibration plan in words.

    Raises:
        ValueError: If layers saw no token, or saw NaN or infinite inputs; they are named.
    """
    results = PTQResults(plan, tuple(bits), {(method, width): {} for method in methods for width in bits})
    owners: dict[nn.Parameter, list[PlannedLayer]] = {}
    for layer in plan.layers:
        owners.setdefault(layer.weight, []).append(layer)
    with_inputs = {layer.name: layer.module for layer in plan.layers if not layer.takes_index}
    waiting: dict[str, LayerStats | None] = {layer.name: None for layer in plan.layers if layer.takes_index}
    if with_inputs and any(method.needs_stats for method in methods.values()):
        calibrator = Calibrator(root, with_inputs, batches, step, memory_budget, progress)
        results.calibration = calibrator.plan()
        if tell is not None:
            tell(str(results.calibration))
        for names, stats in calibrator.collect(results.calibration):
            _check_seen(names, stats, unseen)
            waiting.update({name: stats.get(name) for name in names})
            del stats
            _quantize_what_is_ready(owners, waiting, methods, bits, observer, results)
    else:
        waiting.update(dict.fromkeys(with_inputs))
    _quantize_what_is_ready(owners, waiting, methods, bits, observer, results)
    return results


def _check_seen(names: Sequence[str], stats: Mapping[str, LayerStats], unseen: str) -> None:
    missing = [name for name in names if name not in stats]
    if missing and unseen == "error":
        raise ValueError(
            f"No token reached {', '.join(missing)} during calibration. Give more batches, ignore these layers, or "
            "allow round-to-nearest for them with unseen='rtn'."
        )


def _quantize_what_is_ready(
    owners: dict[nn.Parameter, list[PlannedLayer]],
    waiting: dict[str, LayerStats | None],
    methods: Mapping[str, PTQMethod],
    bits: Sequence[float],
    observer: Observer,
    results: PTQResults,
) -> None:
    """Quantize the weights whose layers all have their statistics, and free those."""
    for weight, layers in list(owners.items()):
        if not all(layer.name in waiting for layer in layers):
            continue
        stats = _merge([waiting.pop(layer.name) for layer in layers])
        del owners[weight]
        first = layers[0]
        schemes = [replace(first.scheme.at(width), activation=None) for width in bits]
        matrix = first.qat_class.to_matrix(weight.detach())
        found, reports = quantize_layer(first.name, matrix, schemes, bits, methods, observer, stats)
        results.reports += reports
        for method, weights in found.items():
            for width, quantized in zip(bits, weights, strict=True):
                results.weights[method, width].update({layer.name: quantized for layer in layers})


def _merge(stats: Sequence[LayerStats | None]) -> LayerStats | None:
    """Return the statistics of a weight from those of the layers that share it."""
    known = [each for each in stats if each is not None]
    if not known:
        return None
    num_tokens = sum(each.num_tokens for each in known)
    return LayerStats(
        torch.stack([each.hessian for each in known]).sum(0) if len(known) > 1 else known[0].hessian,
        sum((each.abs_mean * (each.num_tokens / num_tokens) for each in known), torch.zeros(())),
        num_tokens,
        known[0].columns_per_channel,
    )
