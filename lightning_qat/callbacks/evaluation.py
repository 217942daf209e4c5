"""Lightning's own validation loop, on a copy of the module, without a trace in the Trainer.

Lightning has no public way to do this. ``trainer.validate`` inside a fit destroys the Trainer's state, and
running the loop on the live module accumulates into its metrics. What is private is kept in this file, and a
test compares the metrics of an unchanged copy with those of the live module for every Lightning that is tested.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_qat.callbacks.batch_memory import BatchMemory, RememberingLoader
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.isolation import isolate_randomness
from lightning_qat.nn import quantized_layers, restore_float


def copy_shell(pl_module: pl.LightningModule) -> pl.LightningModule:
    """Return a copy of all but the parameters and buffers, which it shares; see :func:`copy_module`."""
    return copy_module(pl_module, {id(weight): weight for weight in _weights_of(pl_module)})


def copy_weights(pl_module: pl.LightningModule) -> dict[int, Tensor]:
    """Return copies of all parameters and buffers, by the ``id`` of the originals."""
    return {id(weight): _clone(weight) for weight in _weights_of(pl_module)}


@dataclass
class Snapshot:
    """A module as it was validated, to make copies of.

    All copies share the parameters of ``weights``, so that there is never more than one of each; buffers, which a
    validation may change, they have for themselves.

    Args:
        shell: All but the weights, from before the validation.
        weights: Copies of parameters and buffers, by the ``id`` of the originals.
    """

    shell: pl.LightningModule
    weights: Mapping[int, Tensor]

    @property
    def is_qat(self) -> bool:
        """Whether the module is fake-quantized."""
        return bool(quantized_layers(self.shell))

    def copy(self) -> pl.LightningModule:
        """Return a copy, whose pruned weights are parameters again."""
        own = {key: each if isinstance(each, nn.Parameter) else each.clone() for key, each in self.weights.items()}
        twin = copy_module(self.shell, own)
        _make_pruning_permanent(twin)
        return twin

    def copy_float(self) -> pl.LightningModule:
        """Return a copy without fake quantization."""
        twin = self.copy()
        restore_float(twin)
        return twin


def _make_pruning_permanent(twin: pl.LightningModule) -> None:
    """Apply masks for good: a weight that is computed before every forward pass takes no other values."""
    for module in twin.modules():
        masked = [name.removesuffix("_mask") for name in module._buffers if name.endswith("_mask")]
        for name in masked:
            if f"{name}_orig" in module._parameters:
                prune.remove(module, name)  # type: ignore[no-untyped-call]


def _weights_of(pl_module: pl.LightningModule) -> list[Tensor]:
    return [*pl_module.parameters(), *pl_module.buffers()]


def _clone(weight: Tensor) -> Tensor:
    copied = weight.detach().clone()
    return nn.Parameter(copied, requires_grad=weight.requires_grad) if isinstance(weight, nn.Parameter) else copied


def copy_module(pl_module: pl.LightningModule, weights: Mapping[int, Tensor]) -> pl.LightningModule:
    """Return a deep copy of a module in training, its metrics reset, uncompiled, and without its Trainer.

    Args:
        pl_module: The module.
        weights: What takes the place of its parameters and buffers, by their ``id``; those left out are copied.

    Raises:
        QATConfigurationError: If the module cannot be copied.
    """
    memo: dict[int, Any] = dict(weights)
    for module in pl_module.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # such as a loss that was kept
                memo[id(value)] = value.detach().clone()
    try:
        twin = copy.deepcopy(pl_module, memo)
    except (TypeError, RuntimeError) as error:
        raise QATConfigurationError(
            f"PTQCallback works on a copy of {type(pl_module).__name__}, which cannot be copied: {error}. Keep what "
            "cannot be copied outside the module, or give its class a __deepcopy__."
        ) from error
    if twin._compiler_ctx is not None:
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(twin).pop(name, None)
        twin._compiler_ctx = None
    twin._metric_attributes = None
    for module in twin.modules():
        if isinstance(module, Metric):
            module.reset()
    return twin


def validation_loaders(trainer: pl.Trainer) -> list[Any]:
    """Return the loaders of the validation that is running or has just run."""
    combined = trainer._evaluation_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def validate_copy(
    trainer: pl.Trainer, twin: pl.LightningModule, limit_batches: int | None = None, memory: BatchMemory | None = None
) -> dict[str, float]:
    """Return the metrics that validation logs for ``twin``; to be called in ``on_validation_end``.

    Neither callbacks nor loggers see anything of it.

    Args:
        trainer: The Trainer, which has just validated another module on the same loaders.
        twin: The module to score.
        limit_batches: Batches of each loader. Default: those of the validation before.
        memory: Where the batches are kept for other copies, or are taken from if they are there.
    """
    live = trainer._evaluation_loop
    loop = type(live)(trainer, live._trainer_fn, live._stage, verbose=False, inference_mode=live.inference_mode)
    loop.setup_data = _do_nothing  # type: ignore[method-assign]  # the loaders are given
    twins = _twin_loader(live._combined_loader)
    loop._combined_loader = twins if memory is None else RememberingLoader(twins, memory)
    loop._max_batches = [most if limit_batches is None else min(most, limit_batches) for most in live._max_batches]
    with isolate_randomness(validation_loaders(trainer)), _in_place_of_the_live_module(trainer, twin, loop):
        loop.run()
        if memory is not None:
            memory.is_complete = not memory.has_overflowed
        metrics = dict(trainer._logger_connector._callback_metrics)
        loop.teardown()
    return {name: float(value) for name, value in metrics.items()}


def find_modes(trainer: Any) -> dict[str, str]:
    """Return ``min`` or ``max`` for the logged values that are a torchmetrics Metric which knows it."""
    metrics = {item.meta.name: item.value for item in trainer._evaluation_loop._results.values() if not item.is_tensor}
    known = {name: getattr(metric, "higher_is_better", None) for name, metric in metrics.items()}
    return {name: "max" if is_higher else "min" for name, is_higher in known.items() if is_higher is not None}


def logged_step(trainer: Any) -> int:
    """Return the step under which Lightning logs the metrics of a validation."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_last_validation(trainer: Any) -> bool:
    """Return whether the validation that is running is known to be the last of its fit."""
    if trainer.state.fn != TrainerFn.FITTING or trainer.should_stop or trainer.global_step >= trainer.max_steps > 0:
        return True
    is_last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return is_last_epoch and bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def _do_nothing(*_: Any, **__: Any) -> None:
    """Take the place of a method."""


def _twin_loader(combined: Any) -> Any:
    """Return the same loaders with iterators of their own, also where the live ones keep their workers."""
    twin = copy.copy(combined)
    twin._iterator = None
    twin._flattened = [_without_iterator(loader) for loader in combined.flattened]
    return twin


def _without_iterator(loader: Any) -> Any:
    if not isinstance(loader, DataLoader) or loader._iterator is None:
        return loader
    twin = copy.copy(loader)
    twin._iterator = None
    return twin


@contextmanager
def _in_place_of_the_live_module(trainer: Any, twin: pl.LightningModule, loop: Any) -> Iterator[None]:
    is_fit = trainer.state.fn == TrainerFn.FITTING
    holder, name = (trainer.fit_loop.epoch_loop, "val_loop") if is_fit else (trainer, "validate_loop")
    replacements: list[tuple[Any, str, Any]] = [
        (holder, name, loop),
        (trainer.strategy, "_lightning_module", twin),
        (trainer.strategy, "model", twin),
        (trainer, "_logger_connector", type(trainer._logger_connector)(trainer)),
        (sys.modules[type(loop).__module__].call, "_call_callback_hooks", _do_nothing),
        (trainer, "_loggers", [_SilentLogger(logger) for logger in trainer.loggers]),
        (trainer, "should_stop", trainer.should_stop),
        (trainer, "_last_val_time", getattr(trainer, "_last_val_time", None)),
    ]
    optimization = _state_of_optimization(trainer)
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements if hasattr(owner, name)]
    try:
        for owner, name, value in replacements:
            setattr(owner, name, value)
        twin.trainer = trainer
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        _restore_optimization(trainer, optimization)
        twin._trainer = None


def _state_of_optimization(trainer: Any) -> list[Any]:
    """Return what the hooks of a module may change in learning rate schedulers and parameter groups."""
    schedulers = [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
    groups = [{**group} for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return [schedulers, groups]


def _restore_optimization(trainer: Any, state: list[Any]) -> None:
    schedulers, groups = state
    for config, scheduler_state in zip(trainer.lr_scheduler_configs, schedulers, strict=True):
        config.scheduler.load_state_dict(scheduler_state)
    live_groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, before in zip(live_groups, groups, strict=True):
        group.update(before)


class _SilentLogger(DummyLogger):
    """Logs nothing, in the folders of another logger."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def save_dir(self) -> str | None:
        return self._logger.save_dir

    @property
    def log_dir(self) -> str | None:
        return self._logger.log_dir

    @property
    def root_dir(self) -> str | None:
        return self._logger.root_dir
