"""What a run is, for the loggers that keep such facts: arguments of the callbacks, and what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_qat.callbacks.ptq_report import GAP_PREFIX, OF_FLOAT, OF_LATENT
from lightning_qat.callbacks.twins import either
from lightning_qat.callbacks.wandb_runs import define_steps, for_each_run, has_wandb
from lightning_qat.core.registry import describe
from lightning_qat.estimators import ESTIMATORS
from lightning_qat.nn.bits import bit_report
from lightning_qat.nn.rules import Rule
from lightning_qat.observers import ACTIVATION_OBSERVERS, OBSERVERS
from lightning_qat.ptq import PTQ_METHODS

if TYPE_CHECKING:
    from lightning_qat.callbacks.ptq import PTQCallback
    from lightning_qat.callbacks.qat import QATCallback

_KEY = "lightning_qat"


def describe_qat(trainer: pl.Trainer, pl_module: pl.LightningModule, callback: QATCallback) -> None:
    """Write the facts of QATCallback to the loggers; its fit has been checked."""
    _describe(trainer, "qat", ("qat/*",), lambda: _qat_facts(callback, pl_module))


def describe_ptq(trainer: pl.Trainer, callback: PTQCallback) -> None:
    """Write the facts of PTQCallback to the loggers."""
    patterns = (f"{OF_FLOAT}/*", f"{OF_LATENT}/*", f"{GAP_PREFIX}*")
    _describe(trainer, "ptq", patterns, lambda: _ptq_facts(callback))


@rank_zero_only
def _describe(trainer: pl.Trainer, part: str, patterns: Iterable[str], make_facts: Callable[[], Any]) -> None:
    """Write facts to W&B's configuration and CSVLogger's ``hparams.yaml``.

    TensorBoardLogger would log a metric of its own with them, ``hp_metric``; what other loggers do is not known.
    """
    tables = [logger for logger in trainer.loggers if isinstance(logger, either(CSVLogger))]
    if not tables and not has_wandb(trainer):
        return
    facts = _to_primitives(make_facts())
    for logger in tables:
        known = logger.experiment.hparams.get(_KEY, {})
        logger.log_hyperparams({_KEY: {**known, part: facts}})

    def log_to(logger: Any, run: Any) -> None:
        known = dict(run.config.get(_KEY) or {})
        run.config.update({_KEY: {**known, part: facts}}, allow_val_change=True)
        define_steps(logger, run, patterns)

    for_each_run(trainer, log_to)


def _qat_facts(callback: QATCallback, root: nn.Module) -> dict[str, Any]:
    assert callback.plan is not None
    timeline, bits = callback.timeline, bit_report(root)
    assert timeline is not None
    return {
        "rules": _rules_as_text(callback.rules),
        "ignore": callback.ignore,
        "target_module": callback.target_module,
        "layers_by_scheme": Counter(str(layer.scheme) for layer in callback.plan.layers),
        "effective_bits": bits.quantized,
        "model_bits": bits.model,
        "schedule": str(timeline),
        "rungs": timeline.rungs,
        "activation_rungs": timeline.activation_rungs,
        "total_steps": timeline.total_steps,
        "freeze_step": timeline.freeze_step,
        "blend_step": timeline.blend_step,
        "scale_lr": callback.scale_lr,
        "observer": describe(callback.observer, OBSERVERS),
        "estimator": describe(callback.estimator, ESTIMATORS),
        "activation_observer": describe(callback.activation_observer, ACTIVATION_OBSERVERS),
        "techniques": {technique.name: technique.describe() for technique in callback.techniques},
    }


def _ptq_facts(callback: PTQCallback) -> dict[str, Any]:
    scorer = callback.scorer
    return {
        "methods": {name: describe(method, PTQ_METHODS) for name, method in callback.methods.items()},
        "bits": callback.bits,
        "final_bits": callback.final_bits,
        "rules": None if callback.rules is None else _rules_as_text(callback.rules),
        "ignore": callback.ignore,
        "target_module": callback.target_module,
        "observer": describe(scorer.observer, OBSERVERS),
        "activation_observer": describe(scorer.activation_observer, ACTIVATION_OBSERVERS),
        "every_n_validations": callback.every_n_validations,
        "limit_val_batches": scorer.limit_val_batches,
        "max_seconds": scorer.max_seconds,
        "sequential": scorer.sequential,
        "seed": callback.seed,
        "baseline": None if callback.baseline is None else callback.baseline.path,
    }


def _rules_as_text(rules: Iterable[Rule]) -> list[dict[str, str | None]]:
    """Return rules as the argument ``scheme`` takes them."""
    return [{"target": rule.target, "scheme": None if rule.scheme is None else str(rule.scheme)} for rule in rules]


def _to_primitives(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _to_primitives(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_primitives(each) for each in value]
    return str(value)
