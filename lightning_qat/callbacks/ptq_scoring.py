"""Quantizing a copy of the module in training, and scoring every result by its own validation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_qat.callbacks.batch_memory import BatchMemory
from lightning_qat.callbacks.calibration import make_step
from lightning_qat.callbacks.control import current_bits
from lightning_qat.callbacks.evaluation import Snapshot, validate_copy
from lightning_qat.callbacks.ptq_report import FLOAT, OF_LATENT, QAT, Score
from lightning_qat.core import ActivationObserver, Observer, PTQMethod, QuantScheme
from lightning_qat.nn import Plan, check_finite, restore_float, static_inputs
from lightning_qat.nn.bits import BitReport, bit_report
from lightning_qat.nn.forward import evaluation_mode
from lightning_qat.nn.plan import plan_as_prepared
from lightning_qat.nn.sweep import PTQResults, sweep
from lightning_qat.nn.sweep_plan import progress_bar


@dataclass
class VariantScorer:
    """Quantizes a copy of a module by several methods, and validates each result; arguments as in ``PTQCallback``.

    Args:
        methods: Methods by name.
        observer: Where ranges come from for methods without a search of their own.
        activation_observer: Where those of static inputs come from, if the module has no quantizers that know it.
        memory_budget: Bytes for the statistics of inputs.
        unseen: What to do with layers that no token reached.
        sequential: Whether to calibrate part by part.
        limit_val_batches: Batches of each validation loader, or None for all that were validated.
        max_seconds: Score no further variant after so long.
        validation_cache: Bytes for validation batches.
    """

    methods: Mapping[str, PTQMethod]
    observer: Observer
    activation_observer: ActivationObserver
    memory_budget: int
    unseen: Literal["error", "rtn"]
    sequential: bool
    limit_val_batches: int | None
    max_seconds: float | None
    validation_cache: int

    def run(
        self,
        trainer: pl.Trainer,
        snapshot: Snapshot,
        make_plan: Callable[[pl.LightningModule], Plan],
        bits: Sequence[float],
        batches: Sequence[Any],
    ) -> tuple[Score, list[Score], PTQResults]:
        """Return the score of the live model, those of all variants, and the results.

        Args:
            trainer: The Trainer, at the end of a validation.
            snapshot: The module that was validated.
            make_plan: Returns the plan for a module.
            bits: Widths.
            batches: Calibration batches.
        """
        twin = snapshot.copy()
        plan = make_plan(twin)
        live_inputs = static_inputs(twin).values()
        inputs = next((each.config.observer for each in live_inputs), self.activation_observer)
        restore_float(twin)
        check_finite(plan.layers)
        results = self._quantize(trainer, twin, plan, bits, batches, inputs)
        memory = BatchMemory(self.validation_cache)
        # First, since the variants take over the parameters of the snapshot.
        live = self._validate_live(trainer, snapshot, memory)
        scores = self._score_variants(trainer, snapshot, results, memory)
        names = {name for score in scores for name in score.metrics}
        metrics = {name: value for name, value in live.items() if name in names}
        return self._live_score(snapshot, metrics), scores, results

    def _quantize(
        self,
        trainer: pl.Trainer,
        twin: pl.LightningModule,
        plan: Plan,
        bits: Sequence[float],
        batches: Sequence[Any],
        activation_observer: ActivationObserver,
    ) -> PTQResults:
        """Quantize the float module ``twin``, calibrated in evaluation mode and in the Trainer's precision."""
        with evaluation_mode(twin):
            return sweep(
                twin,
                plan,
                batches,
                self.methods,
                bits,
                self.observer,
                activation_observer=activation_observer,
                step=make_step(trainer, twin),
                memory_budget=self.memory_budget,
                unseen=self.unseen,
                sequential=self.sequential,
                progress=progress_bar if trainer.is_global_zero else None,
            )

    def _score_variants(
        self, trainer: pl.Trainer, snapshot: Snapshot, results: PTQResults, memory: BatchMemory
    ) -> list[Score]:
        """Validate every variant on a float module of its own; say which are left out after ``max_seconds``."""
        started = time.perf_counter()
        scores, left_out = [], []
        for method, num_bits in results.weights:
            # One rank decides, since validation has collective operations.
            is_over = self.max_seconds is not None and time.perf_counter() - started > self.max_seconds
            if self.max_seconds is not None and trainer.strategy.broadcast(is_over):
                left_out.append(f"{method} at {num_bits:g} bits")
                continue
            began = time.perf_counter()
            twin = snapshot.copy_float()
            results.apply(twin, method, num_bits)
            bits = bit_report(twin, num_bits)
            is_only = len(results.weights) == 1 and self.limit_val_batches is None
            metrics = validate_copy(trainer, twin, self.limit_val_batches, None if is_only else memory)
            seconds = time.perf_counter() - began + results.seconds(method, num_bits)
            name = f"{OF_LATENT}/{method}" if snapshot.is_qat else method
            schemes = _name_schemes(layer.scheme.at(num_bits) for layer in results.plan.layers)
            calibration = results.calibration_of(method)
            limit = self.limit_val_batches
            scores.append(Score(name, num_bits, schemes, bits, metrics, seconds, calibration, limit))
        if left_out:
            rank_zero_warn(f"PTQCallback ran out of max_seconds={self.max_seconds} before {', '.join(left_out)}.")
        return scores

    def _validate_live(self, trainer: pl.Trainer, snapshot: Snapshot, memory: BatchMemory) -> dict[str, float]:
        """Return the metrics of the model as it is, on as many batches as the variants."""
        if self.limit_val_batches is None:  # validation has just logged them
            return {name: float(value) for name, value in trainer.callback_metrics.items()}
        return validate_copy(trainer, snapshot.copy(), self.limit_val_batches, memory)

    def _live_score(self, snapshot: Snapshot, metrics: dict[str, float]) -> Score:
        limit = self.limit_val_batches
        if not snapshot.is_qat:
            return Score(FLOAT, 32, None, BitReport(32, 32), metrics, 0.0, limit_val_batches=limit)
        num_bits = current_bits(snapshot.shell)
        layers = plan_as_prepared(snapshot.shell, num_bits).layers
        schemes = _name_schemes(layer.scheme.at(num_bits) for layer in layers)
        return Score(QAT, num_bits, schemes, bit_report(snapshot.shell, num_bits), metrics, 0.0, None, limit)


def _name_schemes(schemes: Iterable[QuantScheme]) -> str:
    return ", ".join(sorted({str(scheme) for scheme in schemes}))
