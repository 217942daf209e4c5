"""Effective bits per weight, scales and zero-points included."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_qat.nn.convert import weight_fake_quants
from lightning_qat.nn.state import quantizer_prefixes


@dataclass(frozen=True)
class BitReport:
    """Bits per weight of a prepared model.

    Attributes:
        quantized: Of the quantized weights.
        model: Of all parameters, the others counted at the size of their dtype; shared ones count once, and
            those of lazy layers not at all until their shape is known.
    """

    quantized: float
    model: float


def bit_report(root: nn.Module, num_bits: float | None = None) -> BitReport:
    """Return effective bits per weight of a prepared ``root``.

    Args:
        root: The model, with fake quantization.
        num_bits: A rung of the schedule. Default: the final widths.
    """
    quantized_bits, quantized_numel = 0.0, 0
    quantized: set[nn.Parameter] = set()  # adapters that are merged into a weight have no size of their own
    for _, layer in weight_fake_quants(root):
        scheme = layer.weight_fake_quant.scheme
        scheme = scheme if num_bits is None else scheme.at(num_bits)
        shape = layer.to_matrix(layer.weight.detach()).shape
        quantized_bits += scheme.effective_bits(*shape) * shape.numel()
        quantized_numel += shape.numel()
        quantized.update(layer.parameters_of(layer))
    prefixes = quantizer_prefixes(root)
    floats = ((name, p) for name, p in root.named_parameters() if p not in quantized and not is_lazy(p))
    others = [p for name, p in floats if not name.startswith(prefixes)]
    other_numel = sum(parameter.numel() for parameter in others)
    other_bits = sum(8 * parameter.element_size() * parameter.numel() for parameter in others)
    return BitReport(
        quantized=quantized_bits / quantized_numel,
        model=(quantized_bits + other_bits) / (quantized_numel + other_numel),
    )
