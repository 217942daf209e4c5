"""Quantizing a copy of the module in training, and scoring every result by its own validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn

from lightning_qat.callbacks.control import current_bits
from lightning_qat.callbacks.evaluation import validate_copy
from lightning_qat.callbacks.ptq_report import OF_LATENT, QAT, Score
from lightning_qat.core import Observer, PTQMethod, QuantScheme
from lightning_qat.nn import Plan, quantized_layers
from lightning_qat.nn.bits import bit_report
from lightning_qat.nn.forward import call_forward, evaluation_mode
from lightning_qat.nn.sweep import PTQResults, sweep
from lightning_qat.nn.sweep_plan import progress_bar


def quantize_copy(
    trainer: pl.Trainer,
    twin: pl.LightningModule,
    plan: Plan,
    batches: Sequence[Any],
    methods: Mapping[str, PTQMethod],
    bits: Sequence[float],
    observer: Observer,
    **options: Any,
) -> PTQResults:
    """Quantize the float module ``twin``, calibrated in evaluation mode and in the Trainer's precision.

    See :func:`lightning_qat.nn.sweep.sweep` for the other arguments.
    """
    calibration_step = getattr(twin, "calibration_step", None)

    def step(batch: Any) -> Any:
        batch = trainer.precision_plugin.convert_input(move_data_to_device(batch, twin.device))
        with trainer.precision_plugin.forward_context():
            return call_forward(twin, batch) if calibration_step is None else calibration_step(batch)

    with evaluation_mode(twin):
        return sweep(
            twin,
            plan,
            batches,
            methods,
            bits,
            observer,
            step=step,
            progress=progress_bar if trainer.is_global_zero else None,
            **options,
        )


def score_results(
    trainer: pl.Trainer,
    make_twin: Callable[[], pl.LightningModule],
    results: PTQResults,
    is_of_qat: bool,
    limit_batches: int | None,
    max_seconds: float | None,
) -> list[Score]:
    """Validate every variant on a float module of its own; say which are left out after ``max_seconds``."""
    started = time.perf_counter()
    scores, left_out = [], []
    for method, num_bits in results.weights:
        # One rank decides, since validation has collective operations.
        if max_seconds is not None and trainer.strategy.broadcast(time.perf_counter() - started > max_seconds):
            left_out.append(f"{method} at {num_bits:g} bits")
            continue
        began = time.perf_counter()
        twin = make_twin()
        results.apply(twin, method, num_bits)
        bits = bit_report(twin, num_bits)
        metrics = validate_copy(trainer, twin, limit_batches)
        seconds = time.perf_counter() - began + results.seconds(method, num_bits)
        name = f"{OF_LATENT}/{method}" if is_of_qat else method
        schemes = _name_schemes(layer.scheme.at(num_bits) for layer in results.plan.layers)
        calibration = results.calibration_of(method)
        scores.append(Score(name, num_bits, schemes, bits, metrics, seconds, calibration))
    if left_out:
        rank_zero_warn(f"PTQCallback ran out of max_seconds={max_seconds} before {', '.join(left_out)}.")
    return scores


def live_score(trainer: pl.Trainer, pl_module: pl.LightningModule, names: set[str]) -> Score:
    """Return the score of the fake-quantized model that was just validated, with the metrics in ``names``."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name in names}
    num_bits = current_bits(pl_module)
    schemes = _name_schemes(layer.weight_fake_quant.rung_scheme for layer in quantized_layers(pl_module).values())
    return Score(QAT, num_bits, schemes, bit_report(pl_module, num_bits), metrics, 0.0)


def _name_schemes(schemes: Iterable[QuantScheme]) -> str:
    return ", ".join(sorted({str(scheme) for scheme in schemes}))
