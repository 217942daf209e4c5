"""What a quantized number is. Needs torch only, never Lightning."""

from lightning_qat.core.grid import (
    QuantizedWeight,
    QuantParams,
    dequantize,
    fake_quantize,
    group_view,
    hard_round,
    nearest_codes,
    nearest_steps,
    qparams_from_range,
    quantize,
    round_scale,
    ungroup,
)
from lightning_qat.core.protocols import ActivationObserver, GradientEstimator, Observer, PTQMethod, Schedule
from lightning_qat.core.scheme import PASS_THROUGH_BITS, WIDTHS, Levels, QuantScheme, fitting_group_sizes
from lightning_qat.core.stats import LayerStats

__all__ = [
    "PASS_THROUGH_BITS",
    "WIDTHS",
    "ActivationObserver",
    "GradientEstimator",
    "LayerStats",
    "Levels",
    "Observer",
    "PTQMethod",
    "QuantParams",
    "QuantScheme",
    "QuantizedWeight",
    "Schedule",
    "dequantize",
    "fake_quantize",
    "fitting_group_sizes",
    "group_view",
    "hard_round",
    "nearest_codes",
    "nearest_steps",
    "qparams_from_range",
    "quantize",
    "round_scale",
    "ungroup",
]
