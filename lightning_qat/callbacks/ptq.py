"""PTQCallback: what quantization after training would give, at every validation, training undisturbed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from lightning_qat.callbacks.averaging import has_weight_average
from lightning_qat.callbacks.calibration import try_calibration
from lightning_qat.callbacks.capture import BatchCapture
from lightning_qat.callbacks.control import current_bits
from lightning_qat.callbacks.errors import QATConfigurationError, as_configuration_error
from lightning_qat.callbacks.evaluation import (
    Snapshot,
    copy_shell,
    copy_weights,
    find_modes,
    is_last_validation,
    logged_step,
    validation_loaders,
)
from lightning_qat.callbacks.isolation import isolate_randomness
from lightning_qat.callbacks.metric_modes import MetricModes
from lightning_qat.callbacks.ptq_arguments import (
    check_calibration_data,
    check_not_negative,
    check_whole_numbers,
    read_path,
)
from lightning_qat.callbacks.ptq_baseline import Baseline
from lightning_qat.callbacks.ptq_report import (
    GAP_PREFIX,
    QAT,
    Score,
    check_monitors,
    check_pace,
    name_figures,
    print_scores,
    publish_missing,
)
from lightning_qat.callbacks.ptq_scoring import VariantScorer
from lightning_qat.callbacks.publish import publish
from lightning_qat.callbacks.quality_vs_bits import QualityVsBits
from lightning_qat.callbacks.run_facts import describe_ptq
from lightning_qat.callbacks.twins import overrides
from lightning_qat.core import PASS_THROUGH_BITS, ActivationObserver, Observer, PTQMethod
from lightning_qat.core.checks import check_choice, check_positive
from lightning_qat.core.registry import build
from lightning_qat.nn import (
    PatternsLike,
    Plan,
    QATLayer,
    RulesLike,
    check_mapping,
    find_final_bits,
    parse_patterns,
    parse_rules,
    quantized_layers,
    static_inputs,
)
from lightning_qat.nn.calibrate import GIB
from lightning_qat.nn.plan import plan_as_prepared
from lightning_qat.nn.sweep import PTQResults
from lightning_qat.nn.sweep_plan import plan_sweep, read_bits
from lightning_qat.observers import ACTIVATION_OBSERVERS, OBSERVERS
from lightning_qat.ptq import build_methods
from lightning_qat.records import replace_records


class PTQCallback(pl.Callback):
    """At the end of validation, quantize a copy of the weights by several methods and validate each result.

    The copy is of the float weights that were just validated (of an average, if one was), without fake
    quantization. It is calibrated on copies of the first training batches, and scored by the module's own
    validation loop. Training goes on as if nothing had happened, to the bit.

    Records and table begin with the live model: ``qat``, or ``float_control``. Metrics appear as
    ``ptq/<method>_w<bits>/<metric>``, and at the width that QAT is at (without QAT, or if that is not among ``bits``,
    at the smallest) as ``ptq/current/<method>/<metric>``: in the loggers, and in ``trainer.callback_metrics`` for
    callbacks that monitor them and are listed later. Beside ``QATCallback`` the prefix is ``ptq_of_latent``: the
    weights under fake quantization are not those of a float run, and their quantization is not the baseline to
    compare with.

    ``WandbLogger`` also gets a table and a chart of quality against bits for every metric
    (``quality_vs_bits_table/<metric>``, ``quality_vs_bits/<metric>``), with the newest scores of each method and width
    and those of ``baseline``; and, when the fit has ended, an artifact with the records.

    Args:
        methods: ``"rtn"``, ``"imatrix"``, ``"awq"``, ``"gptq"``, mappings with ``name`` and arguments, or methods
            by the names they shall have.
        bits: Width or widths. Default: the one that ``QATCallback`` is at, or that of ``scheme``.
        final_bits: Widths of the last validation of a fit instead, if that is known to be the last: at ``max_steps``,
            or at the end of the last epoch.
        scheme: Scheme or rules at the smallest width, as in ``QATCallback``, whose own are used where it is
            there. Default: symmetric per channel at the smallest of ``bits``.
        ignore: Modules that stay in float.
        observer: Where ranges come from for methods that do not search for them.
        activation_observer: Where the ranges of static inputs come from, which are calibrated on the same batches, in
            float. Beside ``QATCallback`` its own is used.
        every_n_validations: Run at every n-th validation.
        calibration_samples: Training samples to keep for calibration, rounded up to whole batches.
        calibration_data: Batches to calibrate on instead, as ``calibration_step`` or ``forward`` takes them; needed
            in ``trainer.validate``.
        limit_val_batches: Number of batches of each validation loader to score on. Default: all that were validated.
        max_seconds: Score no further variant after so long; what was left out is said.
        mode: Whether the metrics are better if smaller (``"min"``) or larger (``"max"``), or that by metric. Default:
            as a torchmetrics ``Metric`` that was logged says of itself, and smaller for all others. A name stands for
            its values on all loaders, too.
        baseline: Results file of a float run with PTQCallback. With ``QATCallback``, ``gap_to_best_ptq/<metric>`` is
            then logged: QAT minus the best method of that run, at the same step and on the same grid and batches.
        results: JSON Lines file that records are added to. Default: ``ptq_results.jsonl`` in the Trainer's
            ``default_root_dir``.
        seed: Seed of the run, for the records.
        memory_budget_gib: GiB for the statistics of inputs.
        validation_cache_gib: GiB of memory for validation batches, so that they are loaded once for all variants;
            batches that take more, or that cannot be copied, are loaded again for each. 0 keeps none.
        unseen: What to do with layers that no token of the calibration reached: ``"error"`` or ``"rtn"``.
        sequential: Calibrate later parts of the model on what the quantized earlier ones give, once for every method
            and width, instead of all on the float model's inputs.
        target_module: Name of the submodule outside which nothing is quantized.
        mapping: Further layer classes, as in ``QATCallback``.

    A module may define ``calibration_step(batch)``; by default its ``forward`` gets what it takes from the batch.
    The copy is a deep copy: a forward hook that is a closure over the live module would still write into that.
    Checkpoints hold the training samples that are calibrated on, for a resumed run (in a single process). One
    PTQCallback for each Trainer: several settings of a method are several entries of ``methods``.

    A metric that a callback monitors and that a validation leaves out (fake quantization has not started, every
    n-th validation, ``max_seconds``) keeps its last value, or gets the worst there is if it never had one.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is not valid, or does not fit the model.
    """

    def __init__(
        self,
        methods: str | Sequence[str | Mapping[str, Any]] | Mapping[str, PTQMethod] = ("rtn", "awq", "gptq"),
        bits: float | Sequence[float] | None = None,
        *,
        final_bits: float | Sequence[float] | None = None,
        scheme: RulesLike | None = None,
        ignore: PatternsLike = (),
        observer: str | Mapping[str, Any] | Observer = "minmax",
        activation_observer: str | Mapping[str, Any] | ActivationObserver = "mse",
        every_n_validations: int = 1,
        calibration_samples: int = 128,
        calibration_data: Sequence[Any] | None = None,
        limit_val_batches: int | None = None,
        max_seconds: float | None = None,
        mode: Literal["min", "max"] | Mapping[str, str] | None = None,
        baseline: str | Path | None = None,
        results: str | Path | None = None,
        seed: int = 0,
        memory_budget_gib: float = 4.0,
        validation_cache_gib: float = 1.0,
        unseen: Literal["error", "rtn"] = "error",
        sequential: bool = False,
        target_module: str | None = None,
        mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
    ) -> None:
        self.methods = build_methods(methods)
        self.bits = read_bits(bits, "bits")
        self.final_bits = read_bits(final_bits, "final_bits")
        self.rules = None if scheme is None else parse_rules(scheme)
        self.ignore = parse_patterns(ignore)
        check_whole_numbers(
            every_n_validations=every_n_validations,
            calibration_samples=calibration_samples,
            limit_val_batches=limit_val_batches,
        )
        check_calibration_data(calibration_data)
        check_not_negative(max_seconds=max_seconds, validation_cache_gib=validation_cache_gib)
        check_positive(memory_budget_gib, "memory_budget_gib")
        check_choice(unseen, "unseen", ("error", "rtn"))
        self.scorer = VariantScorer(
            methods=self.methods,
            observer=build(observer, OBSERVERS, "observer"),
            activation_observer=build(activation_observer, ACTIVATION_OBSERVERS, "activation observer"),
            memory_budget=int(memory_budget_gib * GIB),
            unseen=unseen,
            sequential=sequential,
            limit_val_batches=limit_val_batches,
            max_seconds=max_seconds,
            validation_cache=int(validation_cache_gib * GIB),
        )
        self.every_n_validations = every_n_validations
        self.calibration_data = calibration_data
        self.modes = MetricModes(mode)
        self.results = read_path(results, "results")
        self.baseline = None if baseline is None else Baseline(baseline)
        self.seed = seed
        self.target_module = target_module
        self.mapping = check_mapping(mapping)
        self.scores: list[Score] = []
        self._chart = QualityVsBits()
        self._capture = BatchCapture(calibration_samples)
        self._num_validations = 0
        self._shell: pl.LightningModule | None = None
        self._validated: dict[int, Tensor] | None = None
        self._has_swept_final_bits = False
        self._is_resumed = self._went_on = self._has_tried = False
        self._is_alone = self._is_fitting = True
        schemes = [rule.scheme for rule in self.rules or () if rule.scheme is not None]
        self._has_static_inputs = any(scheme.has_static_activation for scheme in schemes)

    # ------------------------------------------------------------------------------------------------- before

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what can be checked before any time is spent."""
        self._is_alone, self._is_fitting = trainer.world_size == 1, stage == "fit"
        if trainer.strategy.restore_checkpoint_after_setup:
            raise QATConfigurationError(
                f"PTQCallback works on a copy of the model, which {type(trainer.strategy).__name__} spreads over "
                "processes. Use a strategy that does not, such as 'ddp', or quantize_model on the float checkpoint."
            )

    @property
    def _needs_calibration(self) -> bool:
        return self._has_static_inputs or any(method.needs_stats for method in self.methods.values())

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make a plan for the model, so that what does not fit is refused before training."""
        plan = self._plan(pl_module, self._widths(pl_module) + (self.final_bits or ()))
        self._has_static_inputs = any(layer.has_static_input for layer in plan.layers)
        is_qat = bool(quantized_layers(pl_module))
        widths = None if is_qat and self.bits is None else (*self._widths(pl_module), *(self.final_bits or ()))
        check_monitors(trainer, is_qat, self.methods, widths)
        self._check_forward(pl_module)
        check_pace(trainer, self.every_n_validations, self.scorer.max_seconds)
        copy_shell(pl_module)  # or say that it cannot be copied
        self._has_tried = False
        self._has_swept_final_bits = False
        if is_qat:
            self._warn_of_what_qat_decides()
        elif self.baseline is not None:
            rank_zero_warn("PTQCallback's baseline has no effect without QATCallback: it is what QAT is compared with.")
        if not self._is_resumed:
            self._went_on, self._chart = False, QualityVsBits()
            self._capture, self._num_validations = BatchCapture(self._capture.num_samples), 0
        self._is_resumed = False
        describe_ptq(trainer, self)

    def _warn_of_what_qat_decides(self) -> None:
        given = {"scheme": self.rules, "ignore": self.ignore, "target_module": self.target_module}
        if names := [name for name, value in {**given, "mapping": self.mapping}.items() if value]:
            rank_zero_warn(
                f"PTQCallback's {', '.join(names)} have no effect beside QATCallback: the same layers are quantized, "
                "by the same schemes, so that the two can be compared."
            )

    def _check_forward(self, pl_module: pl.LightningModule) -> None:
        has_forward = overrides(pl_module, "forward")
        if self._needs_calibration and not has_forward and not hasattr(pl_module, "calibration_step"):
            raise QATConfigurationError(
                f"{type(pl_module).__name__} has no forward to calibrate with. Give it a method "
                "calibration_step(self, batch) that runs the model on a training batch."
            )

    def _widths(self, pl_module: pl.LightningModule) -> tuple[float, ...]:
        if self.bits is not None:
            return self.bits
        if quantized_layers(pl_module):
            current = current_bits(pl_module)
            return (current,) if current != PASS_THROUGH_BITS else ()
        if self.rules is None:
            raise QATConfigurationError(
                "PTQCallback knows no width: give bits, such as bits=(8, 4), or a scheme, or use it with QATCallback. "
                "(final_bits are for the last validation alone.)"
            )
        return (find_final_bits(self.rules),)

    def _plan(self, module: nn.Module, widths: Sequence[float]) -> Plan:
        if quantized_layers(module):
            return plan_as_prepared(module, min(widths, default=PASS_THROUGH_BITS))
        with as_configuration_error():
            return plan_sweep(module, widths, self.rules, self.ignore, self.target_module, self.mapping)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep a copy of the first batches, and see whether they can be calibrated on."""
        if not self._needs_calibration:
            return
        if self.calibration_data is None:
            self._capture.add(batch)
        if not self._has_tried:
            self._has_tried = True
            batches = self.calibration_data or self._capture.batches
            with torch.inference_mode(False), torch.no_grad(), isolate_randomness([]):
                try_calibration(trainer, Snapshot(copy_shell(pl_module), copy_weights(pl_module)), batches[0])

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy all but the weights: by the end of validation, it has left its traces."""
        self._has_static_inputs |= bool(static_inputs(pl_module))
        if not self._is_fitting and self._needs_calibration and not (self.calibration_data or self._capture.batches):
            raise QATConfigurationError(
                f"{', '.join(self.methods)} need inputs to calibrate on, and trainer.validate has no training batches. "
                "Give PTQCallback(calibration_data=[...]), batches of the training data, or a checkpoint that has them."
            )
        if not trainer.sanity_checking and self._is_due(self._num_validations + 1, trainer):
            with torch.inference_mode(False):
                self._shell = copy_shell(pl_module)

    def _is_due(self, num_validations: int, trainer: pl.Trainer) -> bool:
        is_asked_for = trainer.state.fn != TrainerFn.FITTING
        return is_asked_for or num_validations % self.every_n_validations == 0 or self._is_final(trainer)

    def _is_final(self, trainer: pl.Trainer) -> bool:
        return self.final_bits is not None and is_last_validation(trainer)

    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the weights of an average, which are gone by the end of validation."""
        is_first = batch_idx == 0 and dataloader_idx == 0 and self._shell is not None
        if is_first and has_weight_average(trainer):
            self._validated = copy_weights(pl_module)

    # -------------------------------------------------------------------------------------------------- the pass

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantize, score, and report."""
        shell, self._shell = self._shell, None
        validated, self._validated = self._validated, None
        if trainer.sanity_checking:
            return
        self._num_validations += 1
        widths = () if shell is None else self._widths_now(trainer, pl_module)
        batches = self.calibration_data if self.calibration_data is not None else self._capture.batches
        if shell is not None and widths:
            if self._needs_calibration and not batches:
                rank_zero_warn("PTQCallback has seen no training batch yet, and leaves this validation out.")
            else:
                self._run(trainer, pl_module, shell, validated, list(batches), widths)
        publish_missing(trainer, self.scores[-1].metrics if self.scores else ())

    def _widths_now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[float, ...]:
        """Return the widths of this validation; none before fake quantization has started."""
        widths = self._widths(pl_module)
        if self.final_bits is None or not self._is_final(trainer):
            return widths
        self._has_swept_final_bits = True
        return tuple(dict.fromkeys((*self.final_bits, *widths)))  # with the width that callbacks monitor

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the last validation was not known to be the last."""
        if self.final_bits is not None and not self._has_swept_final_bits:
            rank_zero_warn(
                f"PTQCallback has not swept final_bits={self.final_bits}: no validation was known to be the last. Run "
                "trainer.validate with PTQCallback(bits=..., calibration_data=...)."
            )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give W&B the records."""
        self._chart.log_file(trainer, self._path(trainer))

    def _run(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        shell: pl.LightningModule,
        validated: dict[int, Tensor] | None,
        batches: Sequence[Any],
        widths: tuple[float, ...],
    ) -> None:
        with torch.inference_mode(False), torch.no_grad(), isolate_randomness(validation_loaders(trainer)):
            snapshot = Snapshot(shell, validated or copy_weights(pl_module))
            plan = functools.partial(self._plan, widths=widths)
            live, scores, results = self.scorer.run(trainer, snapshot, plan, widths, batches)
        if not any(score.metrics for score in scores):
            rank_zero_warn("PTQCallback has nothing to report: no variant was scored, or validation logged no metric.")
            return
        current = live.num_bits if live.num_bits in widths else min(self._widths(pl_module))
        self._publish(trainer, live, scores, current)
        self._report(trainer, live, scores, results)

    # ---------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to calibrate on the same batches: these, if they are plain tensors.

        With several processes each has batches of its own, and only one writes the checkpoint: they are left out.
        """
        capture = self._capture.state_dict() if self._is_alone else None
        return {"num_validations": self._num_validations, "capture": capture, "chart": self._chart.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._num_validations = state_dict["num_validations"]
        self._chart.load_state_dict(state_dict.get("chart", ()))
        self._capture = BatchCapture(self._capture.num_samples)
        if state_dict["capture"] is not None:
            self._capture.load_state_dict(state_dict["capture"])
        elif self.calibration_data is None and self._needs_calibration:
            rank_zero_warn(
                "The checkpoint does not hold the batches that PTQCallback calibrated on: it goes on with the next "
                "ones. Give calibration_data to calibrate on the same ones."
            )
        self._is_resumed = self._went_on = self._is_fitting  # Lightning loads this for trainer.validate, too

    # ------------------------------------------------------------------------------------------------ reporting

    def _publish(self, trainer: pl.Trainer, live: Score, scores: Sequence[Score], current_bits: float | None) -> None:
        figures = name_figures(scores, current_bits)
        if self.baseline is not None and live.method == QAT:
            gaps = self.baseline.gaps(live, trainer.global_step, self.seed, self.modes.given)
            if not gaps:
                rank_zero_warn(self.baseline.explain_missing(live, trainer.global_step))
            figures.update({f"{GAP_PREFIX}{name}": gap for name, gap in gaps.items()})
        publish(trainer, figures, logged_step(trainer))

    @rank_zero_only
    def _report(self, trainer: pl.Trainer, live: Score, scores: list[Score], results: PTQResults) -> None:
        self.scores += [live, *scores] if live.method == QAT else scores
        modes = self.modes.all([metric for score in scores for metric in score.metrics], find_modes(trainer))
        self.modes.warn_of_unknown(modes)
        records = [
            score.to_record(metric, modes[metric] == "max", trainer.global_step, self.seed)
            for score in (live, *scores)
            for metric in score.metrics
        ]
        replace_records(self._path(trainer), *records, if_equal=not self._went_on)
        print_scores(Console(), [live, *scores], results, trainer.global_step)
        if self.baseline is not None and live.method == QAT:
            records += self.baseline.comparable(live, trainer.global_step, self.seed)
        self._chart.add(records)
        self._chart.log(trainer)

    def _path(self, trainer: pl.Trainer) -> Path:
        return self.results or Path(trainer.default_root_dir, "ptq_results.jsonl")
