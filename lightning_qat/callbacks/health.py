"""A few figures that tell how well the weights sit on their grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_qat.core import group_view
from lightning_qat.nn import QATLayer, weight_fake_quants


class HealthMonitor:
    """Measures all quantized weights at once; never one figure per layer.

    - ``sqnr_db``: power of the weights over power of their quantization error, in decibels.
    - ``clipped_fraction``: share of the weights that lie over half a step beyond the outermost level.
    - ``scale_drift``: mean absolute change of the logarithm of the scales since the last measurement on the
      same rung: 0.01 is one percent.
    """

    def __init__(self) -> None:
        self._last_scales: dict[str, Tensor] = {}
        self._last_bits: dict[str, float] = {}

    @torch.no_grad()
    def measure(self, root: nn.Module) -> dict[str, float]:
        """Return the figures for ``root``; none while nothing is quantized yet."""
        layers = {name: layer for name, layer in weight_fake_quants(root) if not layer.weight_fake_quant.pass_through}
        if not layers:
            return {}
        totals = torch.stack([_layer_totals(layer) for layer in layers.values()]).sum(0)
        signal, noise, clipped, numel = totals.tolist()
        figures = {"clipped_fraction": clipped / numel}
        if noise > 0 and signal > 0:
            figures["sqnr_db"] = 10 * math.log10(signal / noise)
        if (drift := self._drift(layers)) is not None:
            figures["scale_drift"] = drift
        return figures

    def _drift(self, layers: dict[str, QATLayer]) -> float | None:
        changes = []
        for name, layer in layers.items():
            quantizer = layer.weight_fake_quant
            scale = quantizer.qparams(layer.to_matrix(layer.weight)).scale.abs().log()
            if self._last_bits.get(name) == quantizer.num_bits:
                changes.append((scale - self._last_scales[name].to(scale)).abs().mean())
            self._last_scales[name], self._last_bits[name] = scale.clone(), quantizer.num_bits
        return torch.stack(changes).mean().item() if changes else None

    def state_dict(self) -> dict[str, dict[str, Tensor] | dict[str, float]]:
        """Return what the next drift is measured from."""
        return {"last_scales": dict(self._last_scales), "last_bits": dict(self._last_bits)}

    def load_state_dict(self, state: dict[str, dict[str, Tensor] | dict[str, float]]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._last_scales = dict(state["last_scales"])  # type: ignore[arg-type]
        self._last_bits = dict(state["last_bits"])  # type: ignore[arg-type]


def _layer_totals(layer: QATLayer) -> Tensor:
    """Return signal power, noise power, clipped weights and all weights of a layer, float64 ``[4]``."""
    quantizer = layer.weight_fake_quant
    weight = layer.to_matrix(layer.weight).float()
    noise = quantizer(weight) - weight
    half_step = 0.5 * quantizer.qparams(weight).scale.abs().unsqueeze(-1)
    clipped = group_view(noise.abs(), quantizer.rung_scheme) > half_step * 1.001  # above rounding in float32
    numel = torch.tensor(weight.numel(), device=weight.device)
    totals = (weight.square().sum(), noise.square().sum(), clipped.sum(), numel)
    return torch.stack([total.double() for total in totals])
