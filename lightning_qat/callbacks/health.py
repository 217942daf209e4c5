"""A few figures that tell how well the weights sit on their grids, and a table of all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_qat.core import QuantParams
from lightning_qat.nn import QATLayer, weight_fake_quants
from lightning_qat.nn.health import (
    LayerHealth,
    decibels,
    gradient_to_scale_ratio,
    layer_health,
    sample_rows,
    weight_sums,
)


class HealthMonitor:
    """Measures all quantized weights at once; never one figure per layer.

    - ``sqnr_db``: power of the weights over power of their quantization error, in decibels.
    - ``clipped_fraction``: share of the weights that lie over half a step beyond the outermost level.
    - ``dead_levels``: share of the levels of a layer that none of its weights uses, of those that they could use; mean
      over layers.
    - ``scale_drift``: mean absolute change of the logarithm of the scales since the last measurement on the
      same rung: 0.01 is one percent.
    - ``gradient_to_scale_ratio``: how fast learned scales move relative to their weights, LSQ's ``R``; geometric mean
      over layers. See :func:`~lightning_qat.nn.health.gradient_to_scale_ratio`.

    Args:
        most: Weights of a layer to look at. Of a larger one evenly spaced output channels are, so that the cost does
            not grow with the model; scales are looked at in full.
    """

    def __init__(self, most: int = 2**18) -> None:
        self.most = most
        self._last_scales: dict[str, Tensor] = {}
        self._last_bits: dict[str, float] = {}
        self._ratios: Tensor | None = None

    @torch.no_grad()
    def measure(self, root: nn.Module) -> dict[str, float]:
        """Return the figures for ``root``; none while nothing is quantized yet."""
        layers = {name: layer for name, layer in weight_fake_quants(root) if not layer.weight_fake_quant.pass_through}
        if not layers:
            return {}
        grids = {name: _grid(layer) for name, layer in layers.items()}
        figures = self._figures_of_weights(layers, grids)
        if (drift := self._drift(layers, grids)) is not None:
            figures["scale_drift"] = drift
        if self._ratios is not None and math.isfinite(ratio := _geometric_mean(self._ratios)):
            figures["gradient_to_scale_ratio"] = ratio
        self._ratios = None
        return figures

    @torch.no_grad()
    def see_gradients(self, root: nn.Module) -> None:
        """Look at the gradients before an optimizer step, for the next measurement."""
        ratios = [gradient_to_scale_ratio(layer) for _, layer in weight_fake_quants(root)]
        known = [ratio for ratio in ratios if ratio is not None]
        if known:
            self._ratios = torch.stack(known)

    def _figures_of_weights(self, layers: Mapping[str, QATLayer], grids: Mapping[str, QuantParams]) -> dict[str, float]:
        found = []
        for name, layer in layers.items():
            rows, params = sample_rows(layer.whole_matrix(), grids[name], self.most)
            found.append(weight_sums(rows, params, layer.weight_fake_quant.rung_scheme))
        # Here an accelerator is waited for, and only here: the figures of all layers come at once.
        powers = torch.stack([each.powers for each in found]).tolist()
        counts = torch.stack([each.counts for each in found]).tolist()
        signal, noise = (sum(row[column] for row in powers) for column in range(2))
        clipped = sum(count for count, _ in counts)
        dead = [each.dead_levels(used) for (_, used), each in zip(counts, found, strict=True)]
        figures = {
            "clipped_fraction": clipped / sum(each.numel for each in found),
            "dead_levels": sum(dead) / len(dead),
            "sqnr_db": decibels(signal, noise),
        }
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _drift(self, layers: Mapping[str, QATLayer], grids: Mapping[str, QuantParams]) -> float | None:
        changes = []
        for name, layer in layers.items():
            quantizer = layer.weight_fake_quant
            scale = grids[name].scale.abs().log()
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


def _geometric_mean(ratios: Tensor) -> float:
    """Return the mean of those that are finite, in float64, which not every accelerator has."""
    return ratios.cpu().double().log().nan_to_num(math.nan, math.nan, math.nan).nanmean().exp().item()


def _grid(layer: QATLayer) -> QuantParams:
    return layer.weight_fake_quant.qparams(layer.whole_matrix())


def print_layer_table(root: nn.Module, further: Mapping[str, Mapping[str, float]] | None = None) -> None:
    """Print the state of every quantized weight of ``root`` as one table.

    Args:
        root: The prepared model, in training or after it.
        further: More columns: shares of the weights, by layer and name.
    """
    further = further or {}
    if not layer_health(root):
        raise ValueError(f"{type(root).__name__} has no fake-quantized layer. Fit it with QATCallback, or prepare it.")
    names = list(dict.fromkeys(name for figures in further.values() for name in figures))
    table = Table(title="Quantized layers", title_justify="left", title_style="bold")
    table.add_column("layer", no_wrap=True)
    for title in (*_COLUMNS, *names):
        table.add_column(title.removesuffix("_fraction"), justify="right")
    for row in layer_health(root):
        shares = [further.get(row.name, {}).get(name, math.nan) for name in names]
        table.add_row(*_cells(row), *("" if math.isnan(share) else f"{share:.1%}" for share in shares))
    console = Console()
    if not console.is_terminal:  # a file has no width
        console = Console(width=console.measure(table, options=console.options.update(width=_NO_LIMIT)).maximum)
    console.print(table)


_COLUMNS = ("scheme", "weights", "SQNR (dB)", "clipped", "dead levels", "scale", "smallest", "largest")
_NO_LIMIT = 1000


def _cells(row: LayerHealth) -> tuple[str, ...]:
    low, median, high = row.scales
    return (
        row.name or "the model itself",
        row.scheme,
        f"{row.num_weights:,}",
        f"{row.sqnr_db:.1f}",
        f"{row.clipped_fraction:.1%}",
        f"{row.dead_levels:.1%}",
        *(f"{scale:.2g}" for scale in (median, low, high)),
    )
