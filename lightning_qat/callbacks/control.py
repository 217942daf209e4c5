"""What a callback does to all quantizers of a model at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.nn import WeightFakeQuantize, set_num_bits, weight_fake_quants


def advance(root: nn.Module, timeline: Timeline, step: int, optimizers: Sequence[Any]) -> None:
    """Bring all quantizers to where ``timeline`` is at optimizer step ``step``."""
    is_frozen, steps_on_rung = timeline.is_frozen(step), step - timeline.rung_start(step)
    set_num_bits(root, timeline.num_bits(step))
    for _, layer in weight_fake_quants(root):
        quantizer, weight = layer.weight_fake_quant, layer.to_matrix(layer.weight)
        if not is_frozen:
            quantizer.unfreeze()
        _find_new_grid(quantizer, weight, optimizers)
        if is_frozen:
            quantizer.freeze(weight)
        elif _is_due(quantizer, steps_on_rung):
            quantizer.observe(weight)


def go_to_rung(root: nn.Module, num_bits: float, optimizers: Sequence[Any]) -> None:
    """Set the widths; scales that do not follow the weight are found anew where the grid has changed."""
    set_num_bits(root, num_bits)
    for _, layer in weight_fake_quants(root):
        _find_new_grid(layer.weight_fake_quant, layer.to_matrix(layer.weight), optimizers)


def _find_new_grid(quantizer: WeightFakeQuantize, weight: Tensor, optimizers: Sequence[Any]) -> None:
    """Observe ``weight`` if the grid is stale; what ``optimizers`` remember of its scales belonged to the old one."""
    if quantizer.is_stale and not quantizer.follows_weight:
        quantizer.observe(weight)
        for optimizer in optimizers:
            optimizer.state.pop(quantizer.log_scale_ratio, None)


def _is_due(quantizer: WeightFakeQuantize, steps_on_rung: int) -> bool:
    """Return whether a costly observer is to look again; it has found the first grid of a rung already."""
    is_observed = not (quantizer.pass_through or quantizer.follows_weight) and quantizer.log_scale_ratio is None
    return is_observed and steps_on_rung > 0 and steps_on_rung % quantizer.config.observer.refresh_every_n_steps == 0


def learned_scales(root: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of learned scales by name."""
    ratios = {name: layer.weight_fake_quant.log_scale_ratio for name, layer in weight_fake_quants(root)}
    return {f"{name}.weight_fake_quant.log_scale_ratio": r for name, r in ratios.items() if r is not None}


def mean_bits(root: nn.Module) -> float:
    """Return the width of the quantized weights on the current rung, averaged over weights."""
    sizes = [(layer.weight_fake_quant.num_bits, layer.weight.numel()) for _, layer in weight_fake_quants(root)]
    return sum(bits * numel for bits, numel in sizes) / sum(numel for _, numel in sizes)


def current_bits(root: nn.Module) -> float:
    """Return the smallest width of the quantized weights on the current rung."""
    return min(layer.weight_fake_quant.num_bits for _, layer in weight_fake_quants(root))
