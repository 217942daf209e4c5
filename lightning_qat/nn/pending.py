"""Weights that wait for the statistics of the layers that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from lightning_qat.core import LayerStats, Observer, PTQMethod, QuantizedWeight
from lightning_qat.nn.plan import Plan, PlannedLayer
from lightning_qat.ptq.engine import LayerReport, quantize_layer


class PendingWeights:
    """Quantizes each weight as soon as the statistics of all its layers are known, which are then freed.

    Args:
        plan: The layers.
        methods: Methods by name.
        bits: Widths.
        observer: Where ranges come from for methods without a search of their own.
        unseen: What to do with layers that no token reached: raise, or round them to nearest.

    Attributes:
        weights: What is quantized so far, by (method, width) and layer name.
        reports: One entry per weight, method and width.
    """

    def __init__(
        self,
        plan: Plan,
        methods: Mapping[str, PTQMethod],
        bits: Sequence[float],
        observer: Observer,
        unseen: Literal["error", "rtn"] = "error",
    ) -> None:
        self.methods, self.bits, self.observer, self.unseen = methods, bits, observer, unseen
        self.weights: dict[tuple[str, float], dict[str, QuantizedWeight]] = {
            (method, width): {} for method in methods for width in bits
        }
        self.reports: list[LayerReport] = []
        self._owners: dict[nn.Parameter, list[PlannedLayer]] = {}
        for layer in plan.layers:
            self._owners.setdefault(layer.weight, []).append(layer)
        self._known: dict[str, LayerStats | None] = {}

    def add(self, names: Sequence[str], stats: Mapping[str, LayerStats]) -> list[str]:
        """Take the statistics of the layers in ``names``, and return the layers that are quantized now.

        Raises:
            ValueError: If layers have none, and ``unseen`` is not ``"rtn"``; they are named.
        """
        missing = [name for name in names if name not in stats]
        if missing and self.unseen == "error":
            raise ValueError(
                f"No token reached {', '.join(missing)} during calibration (padding is none). Give more batches, "
                "ignore these layers, or allow round-to-nearest for them with unseen='rtn'. If step= is given, it must "
                "run the model that is quantized."
            )
        return self._add({name: stats.get(name) for name in names})

    def add_unknown(self, names: Sequence[str]) -> list[str]:
        """Do without statistics for the layers in ``names``, and return the layers that are quantized now."""
        return self._add(dict.fromkeys(names))

    def _add(self, stats: Mapping[str, LayerStats | None]) -> list[str]:
        self._known.update(stats)
        ready = [
            weight for weight, layers in self._owners.items() if all(layer.name in self._known for layer in layers)
        ]
        return [layer.name for weight in ready for layer in self._quantize(weight)]

    def _quantize(self, weight: nn.Parameter) -> list[PlannedLayer]:
        layers = self._owners.pop(weight)
        stats = _merge([self._known.pop(layer.name) for layer in layers])
        first = layers[0]
        schemes = [replace(first.scheme.at(width), activation=None) for width in self.bits]
        found, reports = quantize_layer(
            first.name, first.matrix(), schemes, self.bits, self.methods, self.observer, stats
        )
        self.reports += reports
        for method, weights in found.items():
            for width, quantized in zip(self.bits, weights, strict=True):
                self.weights[method, width].update({layer.name: quantized for layer in layers})
        return layers


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
