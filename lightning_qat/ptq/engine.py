"""Every method at every width on one weight, judged by one objective."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.core import LayerStats, Observer, PTQMethod, QuantizedWeight, QuantScheme
from lightning_qat.core.precision import full_float32
from lightning_qat.ptq.cholesky import LinAlgError
from lightning_qat.ptq.rtn import RTN


@dataclass(frozen=True)
class LayerReport:
    """How one method did on one layer at one width.

    Attributes:
        layer: Name of the layer.
        method: Name of the method.
        rung: Width that was asked for.
        num_bits: Width in bits: that, or the layer's own if it is wider.
        output_error: Mean squared error of the layer's output with what is kept, summed over outputs; None
            without statistics.
        raw_error: The same with what the method itself found.
        rtn_error: The same with round-to-nearest.
        fallback: Why round-to-nearest is kept in place of the method's result, or None.
        seconds: Wall time of the method, its share of a call for several widths.
    """

    layer: str
    method: str
    rung: float
    num_bits: float
    output_error: float | None
    raw_error: float | None
    rtn_error: float | None
    fallback: str | None
    seconds: float


@torch.no_grad()
@full_float32()
def quantize_layer(
    name: str,
    weight: Tensor,
    schemes: Sequence[QuantScheme],
    rungs: Sequence[float],
    methods: Mapping[str, PTQMethod],
    observer: Observer,
    stats: LayerStats | None,
) -> tuple[dict[str, list[QuantizedWeight]], list[LayerReport]]:
    """Quantize one weight by every method for every scheme.

    A result whose output is worse than that of round-to-nearest is replaced by it, and reported.

    Args:
        name: Name of the layer.
        weight: The weight, ``[O, I]``.
        schemes: Schemes that differ in width alone.
        rungs: The widths that were asked for.
        methods: Methods by name.
        observer: The layer's observer.
        stats: Statistics of the layer's inputs; None leaves round-to-nearest to methods that need them.

    Returns:
        The results by method, in the order of ``schemes``, and a report for each.
    """
    with torch.autocast(weight.device.type, enabled=False):
        baseline = RTN()(weight, schemes, observer)
        results, reports = {}, []
        for method_name, method in methods.items():
            started = time.perf_counter()
            raw, failure = _run(method, weight, schemes, observer, stats)
            seconds = (time.perf_counter() - started) / len(schemes)
            results[method_name] = raw or list(baseline)
            for index, scheme in enumerate(schemes):
                rtn_error = _output_error(weight, baseline[index], stats)
                raw_error = None if raw is None else _output_error(weight, raw[index], stats)
                fallback = failure
                if raw_error is not None and rtn_error is not None and not raw_error <= rtn_error:  # NaN, too
                    fallback = "its output was worse than that of round-to-nearest"
                    results[method_name][index] = baseline[index]
                kept = rtn_error if fallback else raw_error
                reports.append(
                    LayerReport(
                        name, method_name, rungs[index], scheme.num_bits, kept, raw_error, rtn_error, fallback, seconds
                    )
                )
        return results, reports


def _run(
    method: PTQMethod, weight: Tensor, schemes: Sequence[QuantScheme], observer: Observer, stats: LayerStats | None
) -> tuple[list[QuantizedWeight] | None, str | None]:
    """Return the results, or None and why there are none."""
    if method.needs_stats and stats is None:
        return None, "its inputs are not known"
    try:
        return method(weight, schemes, observer, stats), None
    except LinAlgError as error:
        return None, str(error)


def _output_error(weight: Tensor, quantized: QuantizedWeight, stats: LayerStats | None) -> float | None:
    return None if stats is None else stats.output_error(quantized.dequantize() - weight.float())
