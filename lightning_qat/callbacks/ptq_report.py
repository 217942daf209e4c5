"""What PTQCallback tells after a validation: metrics, records and one table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.table import Table

from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.twins import either
from lightning_qat.core import WIDTHS
from lightning_qat.nn.bits import BitReport
from lightning_qat.nn.sweep import PTQResults
from lightning_qat.records import FLOAT_CONTROL, EvalRecord

QAT, FLOAT = "qat", FLOAT_CONTROL
OF_FLOAT, OF_LATENT = "ptq", "ptq_of_latent"
GAP_PREFIX = "gap_to_best_ptq/"


@dataclass(frozen=True)
class Score:
    """The metrics of one variant.

    Attributes:
        method: Name of the method; of latent QAT weights with the prefix ``ptq_of_latent/``, ``qat`` for the live
            model.
        num_bits: Width in bits.
        scheme: Shorthand of its scheme, or None in float.
        bits: Effective bits.
        metrics: What validation logged.
        seconds: Wall time of quantization and validation.
        calibration: ``one-shot`` or ``sequential``; None if inputs were not needed.
        limit_val_batches: Number of validation batches of each loader, if not all were scored.
    """

    method: str
    num_bits: float
    scheme: str | None
    bits: BitReport
    metrics: dict[str, float]
    seconds: float
    calibration: str | None = None
    limit_val_batches: int | None = None

    @property
    def is_of_qat(self) -> bool:
        """Whether the weights are those under fake quantization."""
        return self.method == QAT or self.method.startswith(OF_LATENT)

    def to_record(self, metric: str, higher_is_better: bool, step: int, seed: int) -> EvalRecord:
        """Return the record of one of the metrics."""
        return EvalRecord(
            method=self.method,
            scheme=self.scheme,
            num_bits=self.num_bits,
            effective_bits=self.bits.quantized,
            model_bits=self.bits.model,
            metric=metric,
            value=self.metrics[metric],
            higher_is_better=higher_is_better,
            step=step,
            trained_with="qat" if self.is_of_qat else "float",
            seed=seed,
            cost_seconds=None if self.method in (QAT, FLOAT) else self.seconds,
            calibration=self.calibration,
            limit_val_batches=self.limit_val_batches,
        )


def name_figures(scores: Sequence[Score], current_bits: float | None) -> dict[str, float]:
    """Return all metrics of quantization after training by the names under which they are logged.

    Args:
        scores: All variants.
        current_bits: The width whose metrics also get a name without it, so that callbacks can monitor one name
            while widths change.
    """
    figures = {}
    for score in scores:
        if score.method in (QAT, FLOAT):
            continue
        prefix = OF_LATENT if score.is_of_qat else OF_FLOAT
        method = score.method.removeprefix(f"{OF_LATENT}/")
        for name, value in score.metrics.items():
            figures[f"{prefix}/{method}_w{score.num_bits:g}/{name}"] = value
            if score.num_bits == current_bits:
                figures[f"{prefix}/current/{method}/{name}"] = value
    return figures


def our_monitors(trainer: Any) -> dict[str, str]:
    """Return the metrics of ours that callbacks or learning rate schedulers monitor, with their mode."""
    watching = [(getattr(each, "monitor", None), getattr(each, "mode", "min")) for each in trainer.callbacks]
    configs = trainer.lr_scheduler_configs
    watching += [(config.monitor, getattr(config.scheduler, "mode", "min")) for config in configs]
    ours = (f"{OF_FLOAT}/", f"{OF_LATENT}/", GAP_PREFIX)
    return {name: mode for name, mode in watching if isinstance(name, str) and name.startswith(ours)}


def has_one_width(monitor: str) -> bool:
    """Return whether a monitored metric is one of ours, and of one width throughout."""
    return monitor.startswith((f"{OF_FLOAT}/", f"{OF_LATENT}/")) and "/current/" not in monitor


def check_monitors(trainer: Any, is_qat: bool, methods: Iterable[str], bits: Iterable[float] | None) -> None:
    """Check that what is monitored can exist; whether validation logs the metric, only it can tell.

    Args:
        trainer: The Trainer.
        is_qat: Whether QATCallback is there.
        methods: Names of the methods.
        bits: The widths that will be scored, or None if they are those of QAT.

    Raises:
        QATConfigurationError: If it cannot.
    """
    prefix = OF_LATENT if is_qat else OF_FLOAT
    widths = WIDTHS[:-1] if bits is None else sorted(set(bits))
    names = [f"{prefix}/current/{method}/" for method in methods]
    names += [f"{prefix}/{method}_w{width:g}/" for method in methods for width in widths]
    for monitor in our_monitors(trainer):
        if not monitor.startswith((GAP_PREFIX, *names)):
            raise QATConfigurationError(
                f"{monitor!r} is monitored, but PTQCallback logs no such metric. "
                f"{'Beside' if is_qat else 'Without'} QATCallback its metrics begin with one of {', '.join(names)}."
            )


def check_pace(trainer: Any, every_n_validations: int, max_seconds: float | None) -> None:
    """Check that callbacks can live with metrics that are not measured at every validation.

    Raises:
        QATConfigurationError: If EarlyStopping would stop before anything is measured, or between two measurements.
    """
    if every_n_validations == 1 and max_seconds is None:
        return
    for callback in trainer.callbacks:
        name, monitor = type(callback).__name__, getattr(callback, "monitor", None)
        if monitor not in our_monitors(trainer):
            continue
        if isinstance(callback, either(EarlyStopping)) and callback.patience < every_n_validations:
            raise QATConfigurationError(
                f"EarlyStopping counts validations, and {monitor!r} is measured at every {every_n_validations}th: give "
                f"it a patience of at least {every_n_validations}, or measure at every validation."
            )
        rank_zero_warn(
            f"{name} monitors {monitor!r}, which is not measured at every validation (every_n_validations="
            f"{every_n_validations}, max_seconds={max_seconds}). In between it keeps its last value, which "
            "EarlyStopping counts as no improvement, and ModelCheckpoint takes for that of the weights it saves."
        )


def publish_missing(trainer: Any, metrics: Iterable[str]) -> None:
    """Give monitored metrics that do not exist yet the worst value there is: without one, Lightning ends the fit.

    Args:
        trainer: The Trainer.
        metrics: The metrics that validation has logged, if any variant was scored.

    Raises:
        QATConfigurationError: If one can never exist, since validation does not log it.
    """
    logged = list(metrics)
    for monitor, mode in our_monitors(trainer).items():
        if logged and not monitor.endswith(tuple(f"/{name}" for name in logged)):
            raise QATConfigurationError(f"{monitor!r} is monitored, but validation logs only {', '.join(logged)}.")
        if monitor not in trainer.callback_metrics:
            worst = torch.finfo(torch.float32).max
            trainer.callback_metrics[monitor] = torch.tensor(worst if mode == "min" else -worst)


def print_scores(console: Console, scores: Sequence[Score], results: PTQResults, step: int) -> None:
    """Print all variants, and which layers kept round-to-nearest in place of what a method found."""
    metrics = list(dict.fromkeys(name for score in scores for name in score.metrics))
    table = Table(title=f"Quantization after training, step {step}", title_justify="left", title_style="bold")
    table.add_column("method", no_wrap=True)
    for heading in ("bits", "effective\nbits", *metrics, "seconds"):
        table.add_column(heading, justify="right", overflow="fold")
    for score in scores:
        cells = [f"{score.metrics[name]:.4f}" if name in score.metrics else "-" for name in metrics]
        bits = (f"{score.num_bits:g}", f"{score.bits.quantized:.2f}")
        table.add_row(score.method, *bits, *cells, f"{score.seconds:.1f}")
    console.print(table)
    if results.calibration is not None:
        console.print(f"Calibrated {results.calibration}.")
    for method in dict.fromkeys(report.method for report in results.fallbacks()):
        kept = results.fallbacks(method)
        first = kept[0]
        console.print(
            f"{method} kept round-to-nearest in {len(kept)} of {results.num_reports(method)} cases, among them "
            f"{first.layer} at {first.num_bits:g} bits: {first.fallback}."
        )
