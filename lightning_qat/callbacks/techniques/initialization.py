"""Initialisation of grids, and of weights if asked for, by a method of quantization after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_qat.callbacks.calibration import make_step, sample_training_batches, try_calibration
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.evaluation import Snapshot, copy_shell, copy_weights
from lightning_qat.callbacks.isolation import isolate_randomness
from lightning_qat.callbacks.ptq_arguments import check_calibration_data
from lightning_qat.callbacks.techniques.technique import Technique
from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.core import PTQMethod
from lightning_qat.core.checks import check_positive
from lightning_qat.core.registry import build
from lightning_qat.nn import Plan, restore_float, weight_fake_quants
from lightning_qat.nn.forward import evaluation_mode
from lightning_qat.nn.plan import plan_as_prepared
from lightning_qat.nn.sweep import PTQResults, sweep
from lightning_qat.observers import MSEObserver
from lightning_qat.ptq import PTQ_METHODS


class Initialization(Technique):
    """Begin each rung with what a method of quantization after training finds for the current float weights.

    Scales must not follow the weight, or they would be observed anew at once: they are learned (``scale_lr``), or
    frozen from the start of the rung (``freeze_at``).

    Args:
        method: ``"imatrix"`` (ranges by the error weighted with E[x²]), ``"gptq"``, ``"rtn"``, a mapping with ``name``
            and arguments, or a method; none that scales inputs, as AWQ does.
        weights: Whether the weights become the method's levels, too. By default training keeps the float weights.
        num_samples: Training samples for calibration, drawn from the dataset of the training loader.
        calibration_data: Batches to calibrate on instead.
        sequential: Calibrate later parts of the model on what the quantized earlier ones give.

    Source: EfficientQAT (arXiv:2407.11062) and others begin from weights that were quantized after training.
    """

    name: ClassVar[str] = "init"
    needs_whole_model = True
    shorthand: ClassVar[str] = "method"

    def __init__(
        self,
        method: str | Mapping[str, Any] | PTQMethod = "imatrix",
        weights: bool = False,
        num_samples: int = 128,
        calibration_data: Sequence[Any] | None = None,
        sequential: bool = False,
    ) -> None:
        known = {name: each for name, each in PTQ_METHODS.items() if name != "awq"}
        self.method: PTQMethod = build(method, known, "method of initialisation")
        self.weights, self.num_samples, self.sequential = weights, num_samples, sequential
        self.writes_weights = weights
        check_positive(num_samples, "num_samples", Integral)
        check_calibration_data(calibration_data)
        self.calibration_data = calibration_data
        self._batches: list[Any] = []

    @override
    def on_fit_checked(self, trainer: pl.Trainer, pl_module: pl.LightningModule, timeline: Timeline) -> None:
        """Refuse grids that would not stay."""
        quantizers = [layer.weight_fake_quant for _, layer in weight_fake_quants(pl_module)]
        is_kept = timeline.freeze_step is not None and timeline.freeze_step <= timeline.rungs[0][0]
        if any(quantizer.log_scale_ratio is None for quantizer in quantizers) and not is_kept:
            raise QATConfigurationError(
                "init finds scales, which the observer would replace. Learn them (scale_lr=...), freeze them from the "
                "start (freeze_at=0), or leave init out."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get the batches, and try whether the module can be calibrated on them."""
        self._batches = list(self.calibration_data or ())
        if self.method.needs_stats and not self._batches:
            self._batches = sample_training_batches(trainer, self.num_samples)
        if self.method.needs_stats:
            with torch.inference_mode(False), torch.no_grad(), isolate_randomness([]):
                try_calibration(trainer, _snapshot(pl_module), self._batches[0], "QATCallback's init")

    @override
    def on_new_rung(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find grids, and weights, of the layers whose width has changed."""
        quantizers = {name: layer.weight_fake_quant for name, layer in weight_fake_quants(pl_module)}
        names = [name for name, each in quantizers.items() if each.has_new_grid and not each.pass_through]
        if names:
            with torch.inference_mode(False), torch.no_grad(), isolate_randomness([]):
                self._adopt(pl_module, self._quantize(trainer, pl_module), names)

    @override
    def on_rung_restored(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the grids and weights as they were trained."""

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> PTQResults:
        twin = _snapshot(pl_module).copy()
        num_bits = min(layer.weight_fake_quant.num_bits for _, layer in weight_fake_quants(pl_module))
        plan = plan_as_prepared(twin, num_bits)
        # Inputs pass in float: what is asked for are grids of weights.
        plan = Plan(tuple(replace(each, scheme=replace(each.scheme, activation=None)) for each in plan.layers), {})
        restore_float(twin)
        with evaluation_mode(twin):
            return sweep(
                twin,
                plan,
                self._batches,
                {self.name: self.method},
                [num_bits],
                MSEObserver(),
                step=make_step(trainer, twin),
                unseen="rtn",
                sequential=self.sequential,
            )

    def _adopt(self, pl_module: pl.LightningModule, results: PTQResults, names: Sequence[str]) -> None:
        (found,) = results.weights.values()
        layers = dict(weight_fake_quants(pl_module))
        for name in names:
            quantized, layer, quantizer = found[name], layers[name], layers[name].weight_fake_quant
            if quantized.input_scale is not None:
                raise QATConfigurationError(f"init: {self.method} scales the inputs of {name}, which training cannot.")
            quantizer.adopt(quantized.params)
            if self.weights:
                layer.set_matrix(quantized.dequantize())
        if rounded := [report for report in results.fallbacks() if report.layer in names]:
            reasons = "; ".join(f"{report.layer}: {report.fallback}" for report in rounded)
            rank_zero_warn(f"init: {len(rounded)} of {len(names)} layers begin as rounded to nearest: {reasons}.")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Keep no batches in memory."""
        self._batches = []

    @override
    def describe(self) -> str:
        """Describe method and data."""
        what = "grids and weights" if self.weights else "grids"
        data = ""
        if self.method.needs_stats:
            data = f" on {self.num_samples} training samples" if self.calibration_data is None else " on given batches"
        return f"{what} by {type(self.method).__name__}{data}, at the start of every rung"


def _snapshot(pl_module: pl.LightningModule) -> Snapshot:
    return Snapshot(copy_shell(pl_module), copy_weights(pl_module))
