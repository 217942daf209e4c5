"""What a callback does to all quantizers of a model at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.nn import set_num_bits, weight_fake_quants


def advance(root: nn.Module, timeline: Timeline, step: int, optimizers: Sequence[Any]) -> None:
    """Bring all quantizers to where ``timeline`` is at optimizer step ``step``."""
    is_frozen = timeline.is_frozen(step)
    if not is_frozen:
        _set_frozen(root, False)
    go_to_rung(root, timeline.num_bits(step), optimizers)
    if is_frozen:
        _set_frozen(root, True)
    else:
        _refresh(root, step - timeline.rung_start(step))


def go_to_rung(root: nn.Module, num_bits: float, optimizers: Sequence[Any]) -> None:
    """Set the widths; scales that do not follow the weight are found anew where the grid has changed.

    What ``optimizers`` remember of such a scale is dropped: it belonged to another grid.
    """
    set_num_bits(root, num_bits)
    for _, layer in weight_fake_quants(root):
        quantizer = layer.weight_fake_quant
        if quantizer.is_stale and not quantizer.follows_weight:
            quantizer.observe(layer.to_matrix(layer.weight))
            for optimizer in optimizers:
                optimizer.state.pop(quantizer.log_scale_ratio, None)


def _refresh(root: nn.Module, steps_on_rung: int) -> None:
    """Let the costly observers that are due look again; the first grid of a rung was found by :func:`go_to_rung`."""
    for _, layer in weight_fake_quants(root):
        quantizer = layer.weight_fake_quant
        is_due = (
            not quantizer.pass_through
            and steps_on_rung > 0
            and steps_on_rung % quantizer.config.observer.refresh_every_n_steps == 0
        )
        if is_due and not quantizer.follows_weight and quantizer.log_scale_ratio is None:
            quantizer.observe(layer.to_matrix(layer.weight))


def _set_frozen(root: nn.Module, frozen: bool) -> None:
    """Freeze all scales where they are, or let them move again."""
    for _, layer in weight_fake_quants(root):
        if frozen:
            layer.weight_fake_quant.freeze(layer.to_matrix(layer.weight))
        else:
            layer.weight_fake_quant.unfreeze()


def learned_scales(root: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of learned scales by name."""
    ratios = {name: layer.weight_fake_quant.log_scale_ratio for name, layer in weight_fake_quants(root)}
    return {f"{name}.weight_fake_quant.log_scale_ratio": r for name, r in ratios.items() if r is not None}


def mean_bits(root: nn.Module) -> float:
    """Return the width of the quantized weights on the current rung, averaged over weights."""
    sizes = [(layer.weight_fake_quant.num_bits, layer.weight.numel()) for _, layer in weight_fake_quants(root)]
    return sum(bits * numel for bits, numel in sizes) / sum(numel for _, numel in sizes)
