"""QATCallback: quantization-aware training by adding one callback to a Trainer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qat.callbacks.arguments import build_schedule
from lightning_qat.callbacks.bypass import BypassCheck
from lightning_qat.callbacks.checks import (
    check_adapters,
    check_callbacks,
    check_checkpoint_file,
    check_pruning,
    check_rates_of_scales,
    check_scales_are_optimized,
    check_strategy,
    warn_if_wider,
    warn_of_monitors,
    warn_of_other_scale_lr,
)
from lightning_qat.callbacks.closed_loop import ClosedLoop
from lightning_qat.callbacks.codes_artifact import check_can_save_codes, log_codes, warn_without_wandb
from lightning_qat.callbacks.control import advance, all_bits, forget_old_grids, go_to_rung, learned_scales, mean_bits
from lightning_qat.callbacks.errors import QATConfigurationError, as_configuration_error
from lightning_qat.callbacks.health import HealthMonitor, print_layer_table
from lightning_qat.callbacks.hooks import hidden_gradients, remove_patch, run_around, separate_param_group
from lightning_qat.callbacks.portable import restore_quantizers, store_quantizers
from lightning_qat.callbacks.publish import publish
from lightning_qat.callbacks.recommended import recommended_arguments
from lightning_qat.callbacks.resolution import make_timeline, read_freeze_at, resolve
from lightning_qat.callbacks.run_facts import describe_qat
from lightning_qat.callbacks.scale_drift import DriftBound, ScaleDrift
from lightning_qat.callbacks.summary import print_summary
from lightning_qat.callbacks.techniques import (
    Technique,
    TechniqueHost,
    check_static_inputs,
    make_inputs,
    read_techniques,
)
from lightning_qat.callbacks.timeline import Timeline, check_position
from lightning_qat.callbacks.twins import overrides
from lightning_qat.core import ActivationObserver, GradientEstimator, Observer, PTQMethod
from lightning_qat.core.checks import check_positive
from lightning_qat.core.registry import build
from lightning_qat.estimators import ESTIMATORS
from lightning_qat.nn import (
    PatternsLike,
    Plan,
    QATLayer,
    RulesLike,
    check_finite,
    check_mapping,
    parse_patterns,
    parse_rules,
    prepare,
)
from lightning_qat.nn.state import STATE_KEY
from lightning_qat.observers import ACTIVATION_OBSERVERS, OBSERVERS
from lightning_qat.schedules import ScheduleLike

_HOOKS_THAT_BUILD = ("setup", "configure_model")
_PATCHED_HOOKS = (
    *_HOOKS_THAT_BUILD,
    "configure_optimizers",
    "configure_gradient_clipping",
    "on_save_checkpoint",
    "training_step",
)


class QATCallback(TechniqueHost):
    """Fine-tune with fake-quantized weights, and inputs if the scheme says so.

    The layers are swapped in place during ``setup``, so that optimizers, checkpoints and every later stage
    see the model as it is trained. Positions in time are whole numbers of optimizer steps, or fractions of
    the run in ``[0, 1)``.

    Args:
        scheme: The final scheme, such as ``"w4g128"`` (see
            :meth:`QuantScheme.parse <lightning_qat.core.QuantScheme.parse>`), or ordered rules
            ``[{"target": "Linear", "scheme": "w4"}, {"target": "lm_head", "scheme": "w8"}]`` of which the
            last match wins; a target is a module type or name pattern, and stands for all that the module
            contains. Linear and convolution layers are quantized; embeddings, the output head of a language
            model (tied to an embedding, returned by ``get_output_embeddings``, or named ``lm_head`` or
            ``embed_out``) and parts of the model that do not train only if a rule names them (a part is a child
            of the model, or of the one module in it that holds all parameters). Naming one of two layers that
            share a weight quantizes both.
        ignore: Modules that stay in float with all that they contain: module types or name patterns.
        observer: Where ranges come from: ``"minmax"``, ``"mse"``, a mapping with ``name`` and arguments, or
            an :class:`~lightning_qat.core.Observer`.
        estimator: How gradients pass the rounding: ``"ste"``, a mapping, or an object.
        schedule: Bits over time: a list of widths that share the run equally (``[8, 4, 3, 2]``), a mapping
            from positions to widths (``{0.0: 8, 0.25: 4}``), the name of a schedule (``"linear"``, ``"cosine"``), a
            mapping with ``name`` and arguments (``{"name": "plateau", "bits": [8, 4], "monitor": "val/loss"}``,
            ``{"name": "staggered", "weights": [4], "activations": {0.0: 16, 0.3: 8}}``; see
            :mod:`lightning_qat.schedules`), or a schedule. It must end at the width of ``scheme``; a layer never goes
            below its own. Default: the final width from the start.
        fake_quant_after_n_steps: When fake quantization starts; until then the model trains in float.
        blend_until: If given, the model computes with ``(1 - x) * weight + x * fake_quantize(weight)``, and ``x`` goes
            from 0 to 1 between the start of fake quantization and this position. Inputs are quantized in full.
        freeze_at: When the scales stop moving, not before the last rung; or at which drift, as a mapping with the
            arguments of :class:`~lightning_qat.callbacks.scale_drift.DriftBound`
            (``{"drift_below": 1e-3, "every_n_steps": 50, "not_before": 0.5}``). Default: never.
        scale_lr: If given, scales are learned (LSQ), in a parameter group of their own without weight decay: with this
            learning rate, which is relative to the size of a scale, or with that of the weights if ``"same"``. LSQ's
            gradients grow with the number of levels: under SGD, 8 bits need a much smaller rate than the weights, and
            ``gradient_clip_val`` leaves those of scales out (under manual optimization that is for you to do).
            Default: scales are observed.
        target_module: Name of the submodule outside which nothing is quantized.
        mapping: Further layer classes, each with the :class:`~lightning_qat.nn.QATLayer` it turns into:
            ``class QATMyLinear(QATLinear, MyLinear): float_class = MyLinear`` and
            ``mapping={MyLinear: QATMyLinear}``.
        health_every_n_steps: Optimizer steps between two measurements of ``qat/sqnr_db``, ``qat/clipped_fraction``,
            ``qat/dead_levels``, ``qat/scale_drift`` and, of learned scales, ``qat/gradient_to_scale_ratio``; see
            :class:`~lightning_qat.callbacks.health.HealthMonitor`. Default: the Trainer's ``log_every_n_steps``.
        activation_observer: Where the ranges of static inputs (``"w8a8-static"``) come from: ``"minmax"``, ``"ema"``,
            ``"percentile"``, ``"mse"``, a mapping with ``name`` and arguments, or an
            :class:`~lightning_qat.core.ActivationObserver`. Default: ``"mse"``.
        activation_calibration_steps: Optimizer steps in which these are calibrated, from the first on that quantizes
            inputs; then their grids are frozen, or learned. Default: 32, or a tenth of a shorter run.
        learn_activations: Whether ``scale_lr`` learns the grids of static inputs, too (LSQ+). Default: it does.
        init: Begin each rung with the grids (and weights) that a method of quantization after training finds:
            ``"imatrix"``, ``"gptq"``, or a mapping with the arguments of
            :class:`~lightning_qat.callbacks.techniques.Initialization`. Default: with those of the observer.
        batch_norm: Compute the statistics of batch normalization anew before every validation: True, the number of
            batches, or a mapping with the arguments of :class:`~lightning_qat.callbacks.techniques.BatchNorm`
            (``{"reestimate": 50, "freeze_at": 0.8}``).
        oscillation: Measure weights that oscillate between two levels: True, or a mapping with the arguments of
            :class:`~lightning_qat.callbacks.techniques.Oscillation`, which can dampen and freeze them
            (``{"freeze_threshold": (0.04, 0.011), "momentum": 0.02}``).
        distillation: Learn from the outputs of the float model in place of the loss of ``training_step``, or beside it:
            True, or a mapping with the arguments of :class:`~lightning_qat.callbacks.techniques.Distillation`
            (``{"task_weight": 0.5, "temperature": 2.0}``), which says what serves as the teacher.
        techniques: Further techniques of training, of your own.
        log_codes: Whether ``WandbLogger`` gets an artifact with the integer codes, scales and zero-points when the fit
            has ended, about a byte per quantized weight. Everything else it gets unasked.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is not valid, at once; or, before the first batch, as
            :class:`~lightning_qat.callbacks.errors.QATConfigurationError`, if it does not fit the model or
            the Trainer.

    Example::

        >>> from lightning_qat import QATCallback
        >>> callback = QATCallback("w2g32", schedule=[8, 4, 3, 2], ignore=["classifier"], freeze_at=0.9)
    """

    def __init__(
        self,
        scheme: RulesLike,
        *,
        ignore: PatternsLike = (),
        observer: str | Mapping[str, Any] | Observer = "minmax",
        estimator: str | Mapping[str, Any] | GradientEstimator = "ste",
        schedule: ScheduleLike | None = None,
        fake_quant_after_n_steps: float = 0,
        blend_until: float | None = None,
        freeze_at: float | Mapping[str, Any] | DriftBound | None = None,
        scale_lr: float | Literal["same"] | None = None,
        target_module: str | None = None,
        mapping: Mapping[type[nn.Module], type[QATLayer]] | None = None,
        health_every_n_steps: int | None = None,
        activation_observer: str | Mapping[str, Any] | ActivationObserver | None = None,
        activation_calibration_steps: int | None = None,
        learn_activations: bool | None = None,
        init: str | Mapping[str, Any] | PTQMethod | Technique | None = None,
        batch_norm: bool | int | Mapping[str, Any] | Technique | None = None,
        oscillation: bool | Mapping[str, Any] | Technique | None = None,
        distillation: bool | Mapping[str, Any] | Technique | None = None,
        techniques: Sequence[Technique] = (),
        log_codes: bool = False,
    ) -> None:
        self.rules = parse_rules(scheme)
        self.ignore = parse_patterns(ignore)
        self.observer: Observer = build(observer, OBSERVERS, "observer")
        self.estimator: GradientEstimator = build(estimator, ESTIMATORS, "estimator")
        self.schedule = build_schedule(schedule, self.rules)
        self.fake_quant_after_n_steps = fake_quant_after_n_steps
        self.blend_until = blend_until
        self.freeze_at = read_freeze_at(freeze_at)
        self.scale_lr = scale_lr
        self.target_module = target_module
        self.mapping = check_mapping(mapping)
        self.health_every_n_steps = health_every_n_steps
        self.log_codes = log_codes
        check_can_save_codes(log_codes)
        check_position(fake_quant_after_n_steps, "fake_quant_after_n_steps")
        if target_module is not None and not isinstance(target_module, str):
            raise TypeError(f"target_module={target_module!r} must be the name of one submodule.")
        if blend_until is not None:
            check_position(blend_until, "blend_until")
        if isinstance(self.freeze_at, DriftBound):
            self.freeze_at.check(self.observer, learn_scales=scale_lr is not None)
        if isinstance(scale_lr, str) and scale_lr != "same":
            raise TypeError(f"scale_lr={scale_lr!r} must be a learning rate, 'same' for that of the weights, or None.")
        if scale_lr != "same":
            check_positive(scale_lr, "scale_lr")
        check_positive(health_every_n_steps, "health_every_n_steps", Integral)
        self.activation_observer: ActivationObserver = build(
            "mse" if activation_observer is None else activation_observer, ACTIVATION_OBSERVERS, "activation observer"
        )
        self.learn_activations = learn_activations is not False
        of_static_inputs = {
            "activation_observer": activation_observer,
            "activation_calibration_steps": activation_calibration_steps,
            "learn_activations": learn_activations,
        }
        check_static_inputs(self.rules, of_static_inputs)
        inputs = make_inputs(self.rules, activation_calibration_steps)
        named = {
            "inputs": inputs,
            "init": init,
            "oscillation": oscillation,
            "batch_norm": batch_norm,
            "distillation": distillation,
        }
        super().__init__(read_techniques(named, techniques))
        self.plan: Plan | None = None
        self.timeline: Timeline | None = None
        self._closed_loop = ClosedLoop(self.schedule)
        self._drift = ScaleDrift()
        self._health = HealthMonitor()
        self._bypass = BypassCheck()
        self._last_step: int | None = None
        self._is_restored = False

    @classmethod
    def recommended(cls, scheme: RulesLike, **overrides: Any) -> QATCallback:
        """Return a callback with the techniques that measured best for the narrowest weights of ``scheme``.

        For a model that was fine-tuned in float, which is its own teacher. At 4 bits: ranges by MSE, scales learned at
        the rate of the weights, distillation in place of the loss of ``training_step``, oscillating weights frozen,
        grids and weights from GPTQ. At 3 bits the same but for GPTQ; at 2 bits neither that nor freezing. Measured with
        a language model and AdamW (``benchmarks/results/stories260k_qat``); narrower weights get what 2 bits get, wider
        ones the defaults. Under SGD give ``scale_lr`` a tenth of the rate of the weights.

        Args:
            scheme: The scheme, or rules.
            overrides: Arguments of the callback, which take the place of the recommended ones.

        Example::

            >>> from lightning_qat import QATCallback
            >>> callback = QATCallback.recommended("w4g128", freeze_at=0.9)
        """
        return cls(scheme, **recommended_arguments(parse_rules(scheme), overrides))

    def prepare(self, module: nn.Module) -> Plan:
        """Put the quantizers into ``module`` in place, as in a fit; for use without a Trainer.

        Raises:
            QATConfigurationError: If the arguments do not fit the model.
        """
        with as_configuration_error():
            return prepare(
                module,
                self.rules,
                ignore=self.ignore,
                observer=self.observer,
                estimator=self.estimator,
                learn_scales=self.scale_lr is not None,
                activation_observer=self.activation_observer,
                learn_activations=self.scale_lr is not None and self.learn_activations,
                target_module=self.target_module,
                mapping=self.mapping,
            )

    def resolve(self, total_steps: int) -> Timeline:
        """Return what would happen at which step in a run of ``total_steps`` optimizer steps.

        Raises:
            QATConfigurationError: If the schedule does not fit such a run.
        """
        return resolve(self.schedule, self.fake_quant_after_n_steps, self.freeze_at, total_steps, self.blend_until)

    # ---------------------------------------------------------------------------------------- before the fit

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the fake quantizers in, now or as soon as the model is built."""
        check_callbacks(trainer.callbacks, self)  # type: ignore[attr-defined]
        self._is_restored = False
        self._last_step = None
        if stage == "fit" and self.scale_lr is not None:
            run_around(pl_module, "configure_optimizers", lambda call: self._configure_optimizers(pl_module, call))
        building = [hook for hook in _HOOKS_THAT_BUILD if _is_overridden(pl_module, hook)]
        for hook in building:
            insert_after = functools.partial(self._insert_after, trainer, pl_module, is_last=hook == building[-1])
            run_around(pl_module, hook, insert_after)
        self._insert(trainer, pl_module, is_last=not building)

    def _insert_after(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, build_model: Callable[[], Any], is_last: bool
    ) -> Any:
        result = build_model()
        self._insert(trainer, pl_module, is_last)
        return result

    def _insert(self, trainer: pl.Trainer, pl_module: pl.LightningModule, is_last: bool) -> None:
        """Insert what is not yet in; what does not fit is an error only when the whole model is there."""
        with contextlib.nullcontext() if is_last else contextlib.suppress(QATConfigurationError):
            self.plan = self.prepare(pl_module)
        if is_last and trainer.state.fn == TrainerFn.FITTING:
            self._pass_on("on_model_built", trainer, pl_module)

    @property
    def _own_scale_lr(self) -> float | None:
        return None if self.scale_lr == "same" else self.scale_lr

    def _configure_optimizers(self, pl_module: pl.LightningModule, call: Callable[[], Any]) -> Any:
        with separate_param_group(set(learned_scales(pl_module).values()), self._own_scale_lr):
            return call()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check everything that needs model, loaders and optimizers, and print the summary."""
        assert self.plan is not None
        with as_configuration_error():
            check_finite(self.plan.layers)
        self._check_scales(trainer, pl_module)
        check_strategy(trainer, pl_module, [each.name for each in self.techniques if each.needs_whole_model])
        writers = [each.name for each in self.techniques if each.writes_weights]
        check_adapters(pl_module, writers)
        check_pruning(trainer.callbacks, writers)  # type: ignore[attr-defined]
        is_continued = self._is_restored or trainer.global_step > 0
        self._closed_loop.start(trainer, is_continued)
        self.timeline = make_timeline(
            trainer, self.schedule, self.fake_quant_after_n_steps, self.freeze_at, self.blend_until
        )
        self._drift.start(self.timeline, is_continued)
        warn_of_monitors(trainer.callbacks, self.timeline.num_rungs)  # type: ignore[attr-defined]
        if not self._is_restored:
            self._health = HealthMonitor()
            go_to_rung(pl_module, self.timeline, trainer.global_step)
        self._pass_on("on_fit_checked", trainer, pl_module, self.timeline)
        self._print_summary(pl_module)
        describe_qat(trainer, pl_module, self)
        if self.log_codes:
            warn_without_wandb(trainer)

    def _check_scales(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.scale_lr is not None:
            scales = learned_scales(pl_module)
            check_scales_are_optimized(scales, trainer.optimizers)
            if self._own_scale_lr is not None:
                warn_of_other_scale_lr(scales, trainer.optimizers, self._own_scale_lr)
            else:
                check_rates_of_scales(pl_module, trainer.optimizers)

    @rank_zero_only
    def _print_summary(self, pl_module: pl.LightningModule) -> None:
        assert self.plan is not None
        assert self.timeline is not None
        policy = f"from the observer ({type(self.observer).__name__})"
        if self.scale_lr is not None:
            rate = "that of the weights" if self._own_scale_lr is None else f"{self._own_scale_lr:g}"
            start = "by init" if any(each.name == "init" for each in self.techniques) else policy
            policy = f"learned with learning rate {rate}, initially {start}"
        print_summary(pl_module, self.plan, self.timeline, policy, [(t.name, t.describe()) for t in self.techniques])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring the timeline up to date with a checkpoint."""
        assert self.timeline is not None
        self._closed_loop.refresh(self.timeline)  # sharded strategies restore checkpoints only now
        if self._is_restored:
            self._drift.start(self.timeline, is_continued=True)
        self._pass_on("on_train_start", trainer, pl_module)

    # ----------------------------------------------------------------------------------------- during the fit

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Bring the quantizers to where the schedule is at this optimizer step."""
        if trainer.global_step != self._last_step:  # not at another batch of the same accumulation
            self._advance(trainer, pl_module)
        self._pass_on("on_train_batch_start", trainer, pl_module, batch, batch_idx)

    def _advance(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.timeline is not None
        step, last_step = trainer.global_step, self._last_step
        self._last_step = step
        went_back = self._closed_loop.before_step(trainer, pl_module, self.timeline)
        restored = (all_bits(pl_module), mean_bits(pl_module)) if last_step is None and self._is_restored else None
        advance(pl_module, self.timeline, step)
        if self._drift.follow(pl_module, self.timeline, step):
            advance(pl_module, self.timeline, step)
        if last_step is None:
            self._bypass.start(pl_module)
        if restored is not None:
            warn_if_wider(restored[1], mean_bits(pl_module))
            is_new_rung = restored[0] != all_bits(pl_module)
        else:
            is_new_rung = last_step is None or self.timeline.widths(last_step) != self.timeline.widths(step)
        if went_back or is_new_rung:
            self._pass_on("on_rung_restored" if went_back else "on_new_rung", trainer, pl_module)
        forget_old_grids(pl_module, trainer.optimizers)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Keep frozen scales where they are: without a gradient, no optimizer touches them.

        Turning ``requires_grad`` off instead would break DDP, which then waits for gradients that never come.
        """
        assert self.timeline is not None
        if self.timeline.is_frozen(trainer.global_step):
            for scale in learned_scales(pl_module).values():
                scale.grad = None
        if self._measures_health_at(trainer, trainer.global_step + 1):
            self._health.see_gradients(pl_module)
        self._pass_on("on_before_optimizer_step", trainer, pl_module, optimizer)
        if self.scale_lr is not None and pl_module.automatic_optimization:
            run_around(pl_module, "configure_gradient_clipping", functools.partial(self._clip, pl_module))

    def _clip(self, pl_module: pl.LightningModule, clip: Callable[[], None]) -> None:
        """Clip all gradients but those of learned scales, which grow with the number of levels."""
        with hidden_gradients(learned_scales(pl_module).values()):
            clip()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log bits and health every few optimizer steps."""
        self._bypass.finish()
        self._pass_on("on_train_batch_end", trainer, pl_module, outputs, batch, batch_idx)
        step = trainer.global_step
        if step == self._last_step or not self._measures_health_at(trainer, step):
            return
        figures = {f"qat/{name}": value for name, value in self._health.measure(pl_module).items()}
        figures["qat/num_bits"] = mean_bits(pl_module)
        if self.timeline is not None and self._last_step is not None:
            figures.update({f"qat/{name}": value for name, value in self.timeline.figures(self._last_step).items()})
        figures.update({f"qat/{name}": value for name, value in self._figures().items()})
        publish(trainer, figures, step - 1)  # as Lightning counts what it logs in a training step

    def _measures_health_at(self, trainer: pl.Trainer, step: int) -> bool:
        every_n_steps = self.health_every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every_n_steps > 0 and step % every_n_steps == 0

    def layer_table(self, module: nn.Module) -> None:
        """Print one table of the quantized layers of ``module``, at any time: errors, levels, scales, oscillation."""
        print_layer_table(module, self._layer_figures())

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a schedule that looks at a metric decide."""
        self._pass_on("on_validation_end", trainer, pl_module)
        if self.timeline is not None:
            self._closed_loop.after_validation(trainer, self.timeline, self._last_step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn if the run was stopped before its last rung, or scales did not come to rest."""
        self._pass_on("on_train_end", trainer, pl_module)
        if self.timeline is None or self._last_step is None:
            return
        shortfall = self.timeline.describe_shortfall(self._last_step, trainer.global_step)
        further = (self._closed_loop.describe_shortfall(), self._drift.describe_shortfall(self.timeline))
        for warning in filter(None, (shortfall, *further)):
            rank_zero_warn(warning)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give W&B the codes, if that was asked for."""
        if self.log_codes:
            log_codes(trainer, pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no patch behind."""
        self._bypass.finish(report=False)
        self._pass_on("teardown", trainer, pl_module, stage)
        for hook in _PATCHED_HOOKS:
            remove_patch(pl_module, hook)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no patch behind."""
        self.teardown(trainer, pl_module, "fit")

    # ------------------------------------------------------------------------------------------- checkpoints

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Move the quantizers' state to a key of its own, so that the file loads into the plain module.

        Sharded strategies load the file straight into the prepared model, and keep it in the state dict.
        """
        # So that Lightning warns where a run goes on without this callback.
        checkpoint.setdefault("callbacks", {})[self.state_key] = {"quantizes": True}

        def store(save: Callable[[], Any]) -> None:
            save()
            progress = {
                "closed_loop": self._closed_loop.state_dict(),
                "drift": self._drift.state_dict(),
                "health": self._health.state_dict(),
                "techniques": self._state_of_techniques(),
            }
            store_quantizers(checkpoint, pl_module, progress, trainer.strategy.restore_checkpoint_after_setup)

        run_around(pl_module, "on_save_checkpoint", store)  # Lightning calls it after those of all callbacks

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the quantizers' state, from a file that is whole."""
        check_checkpoint_file(trainer.ckpt_path)
        if (state := checkpoint.get(STATE_KEY)) is not None:
            with as_configuration_error():
                restore_quantizers(checkpoint, pl_module)
                self._closed_loop.load_state_dict(state.get("closed_loop", {}))
            self._drift.load_state_dict(state.get("drift", {}))
            self._health.load_state_dict(state["health"])
            self._load_techniques(state.get("techniques", {}))
            self._is_restored = True
        elif self.scale_lr is not None and trainer.training:
            raise QATConfigurationError(
                "The checkpoint comes from a run without quantizers, whose optimizer knows no learned scales. Load "
                "only its weights: model.load_state_dict(torch.load(path)['state_dict']), then fit without ckpt_path."
            )


def _is_overridden(pl_module: pl.LightningModule, hook: str) -> bool:
    return hook in vars(pl_module) or overrides(pl_module, hook)
