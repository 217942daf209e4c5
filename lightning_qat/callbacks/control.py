"""What a callback does to all quantizers of a model at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.nn import WeightFakeQuantize, quantized_layers, set_num_bits, static_inputs, weight_fake_quants
from lightning_qat.nn.annealed_grid import named_grids


def advance(root: nn.Module, timeline: Timeline, step: int) -> None:
    """Bring all quantizers to where ``timeline`` is at optimizer step ``step``."""
    is_frozen, steps_on_rung = timeline.is_frozen(step), step - timeline.rung_start(step)
    set_num_bits(root, *timeline.widths(step))
    for _, layer in weight_fake_quants(root):
        quantizer, weight = layer.weight_fake_quant, layer.whole_matrix()
        quantizer.set_blend(timeline.blend(step))
        if not is_frozen:
            quantizer.unfreeze()
        _find_new_grid(quantizer, weight)
        if is_frozen:
            quantizer.freeze(weight)
        elif _is_due(quantizer, steps_on_rung):
            quantizer.observe(weight)


def go_to_rung(root: nn.Module, timeline: Timeline, step: int) -> None:
    """Set the widths; scales that do not follow the weight are found anew where the grid has changed."""
    set_num_bits(root, *timeline.widths(step))
    for _, layer in weight_fake_quants(root):
        layer.weight_fake_quant.set_blend(timeline.blend(step))
        _find_new_grid(layer.weight_fake_quant, layer.whole_matrix())


def _find_new_grid(quantizer: WeightFakeQuantize, weight: Tensor) -> None:
    if quantizer.is_stale and not quantizer.follows_weight:
        quantizer.observe(weight)


def forget_old_grids(root: nn.Module, optimizers: Sequence[Any]) -> None:
    """Let ``optimizers`` forget what they remember of learned grids that were found anew since the last time."""
    of_weights = [layer.weight_fake_quant for _, layer in weight_fake_quants(root)]
    for quantizer in [*of_weights, *static_inputs(root).values()]:
        if quantizer.has_new_grid:
            quantizer.has_new_grid = False
            for optimizer in optimizers:
                for parameter in quantizer.parameters():
                    optimizer.state.pop(parameter, None)


def _is_due(quantizer: WeightFakeQuantize, steps_on_rung: int) -> bool:
    """Return whether a costly observer is to look again; it has found the first grid of a rung already."""
    is_observed = not (quantizer.pass_through or quantizer.follows_weight) and quantizer.log_scale_ratio is None
    return is_observed and steps_on_rung > 0 and steps_on_rung % quantizer.config.observer.refresh_every_n_steps == 0


def learned_scales(root: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all learned grids by name: scales of weights, scales and zero-points of inputs."""
    grids = named_grids(root).items()
    return {f"{name}.{key}": parameter for name, grid in grids for key, parameter in grid.named_parameters()}


def mean_bits(root: nn.Module) -> float:
    """Return the width of the quantized weights on the current rung, averaged over weights."""
    sizes = [(layer.weight_fake_quant.num_bits, layer.weight.numel()) for _, layer in weight_fake_quants(root)]
    return sum(bits * numel for bits, numel in sizes) / sum(numel for _, numel in sizes)


def all_bits(root: nn.Module) -> list[float]:
    """Return the widths of all quantizers, of weights and of inputs, on the current rung."""
    layers = quantized_layers(root).values()
    quantizers = [each for layer in layers for each in (layer.weight_fake_quant, layer.input_fake_quant)]
    return [quantizer.num_bits for quantizer in quantizers if quantizer is not None]


def current_bits(root: nn.Module) -> float:
    """Return the smallest width of the quantized weights on the current rung."""
    return min(layer.weight_fake_quant.num_bits for _, layer in weight_fake_quants(root))
