"""Checks of a Trainer before training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_qat.callbacks.averaging import WEIGHT_AVERAGING
from lightning_qat.callbacks.errors import QATConfigurationError, as_configuration_error
from lightning_qat.callbacks.ptq_report import has_one_width
from lightning_qat.callbacks.twins import either
from lightning_qat.files import check_file
from lightning_qat.nn import weight_fake_quants
from lightning_qat.nn.sharded import is_sharded

_FREEZING: tuple[type[pl.Callback], ...] = (pl_callbacks.BaseFinetuning,)
_AVERAGING: tuple[type[pl.Callback], ...] = (*WEIGHT_AVERAGING, pl_callbacks.StochasticWeightAveraging)


def check_callbacks(callbacks: Sequence[pl.Callback], qat: pl.Callback) -> None:
    """Check that ``qat`` is the only one of its kind and comes before what copies or freezes the model.

    Raises:
        QATConfigurationError: If it is not.
    """
    if sum(isinstance(callback, type(qat)) for callback in callbacks) > 1:
        raise QATConfigurationError(
            "The Trainer has several QATCallbacks. Use one; it takes a list of rules, "
            "[{'target': ..., 'scheme': ...}, ...], for layers that need different schemes."
        )
    for callback in callbacks[: callbacks.index(qat)]:
        name = type(callback).__name__
        for kinds, harm in (
            (_AVERAGING, "copy the model before the quantizers are in"),
            (_FREEZING, "freeze layers before the quantizers are in, and these would stay in float"),
        ):
            if isinstance(callback, either(*kinds)):
                raise QATConfigurationError(
                    f"{name} is listed before QATCallback, so it would {harm}. List QATCallback first: "
                    f"callbacks=[QATCallback(...), {name}(...)]."
                )


def check_checkpoint_file(path: Any) -> None:
    """Check that the file that is being loaded is whole, if it is one on this machine.

    Raises:
        QATConfigurationError: If it is not.
    """
    if isinstance(path, (str, Path)) and Path(path).is_file():
        with as_configuration_error():
            check_file(path)


def check_rates_of_scales(root: nn.Module, optimizers: Sequence[Any]) -> None:
    """Check that every learned scale of a weight has the learning rate of the weight, as ``scale_lr="same"`` says.

    Raises:
        QATConfigurationError: If the groups of ``configure_optimizers`` give one another.
    """
    rates = {
        parameter: _peak_rate(group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, layer in weight_fake_quants(root):
        own, of_scale = rates.get(layer.weight), rates.get(layer.weight_fake_quant.log_scale_ratio)
        if own is not None and of_scale is not None and not math.isclose(own, of_scale):
            raise QATConfigurationError(
                f"scale_lr='same' stands for the learning rate of the weights, which is {own:g} for {name}; but "
                f"configure_optimizers puts its scales, by their shape or name, into a group with {of_scale:g}. "
                "Put parameters whose name ends in 'log_scale_ratio' beside the weights, or give scale_lr a number."
            )


def _peak_rate(group: Mapping[str, Any]) -> float:
    """Return the learning rate that a scheduler starts from, or leads up to."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def check_pruning(callbacks: Sequence[pl.Callback], writers: Sequence[str]) -> None:
    """Check that no technique writes into weights that are masked before every forward pass.

    Args:
        callbacks: Those of the Trainer.
        writers: Names of the techniques that change weights, or their gradients, themselves.

    Raises:
        QATConfigurationError: If one does.
    """
    if writers and any(isinstance(callback, either(pl_callbacks.ModelPruning)) for callback in callbacks):
        raise QATConfigurationError(
            f"ModelPruning computes weights from masks before every forward pass, so that what {writers[0]} does to "
            "them would be lost. Prune in a run before this one, or let "
            f"{writers[0]} only look: oscillation=True, init without weights."
        )


def check_adapters(root: nn.Module, writers: Sequence[str]) -> None:
    """Check that no technique writes into a weight that adapters train.

    Args:
        root: The module.
        writers: Names of the techniques that change weights, or their gradients, themselves.

    Raises:
        QATConfigurationError: If one does.
    """
    adapted = [name for name, layer in weight_fake_quants(root) if len(layer.parameters_of(layer)) > 1]
    if writers and adapted:
        without = ", ".join(f"{name}=None" for name in writers)
        raise QATConfigurationError(
            f"{' and '.join(writers)} changes weights one by one, and {adapted[0]} trains by adapters, which cannot "
            f"follow. Leave it out ({without}, for QATCallback.recommended, too), or let it only look: "
            "oscillation=True, init='imatrix'."
        )


def check_strategy(trainer: pl.Trainer, root: nn.Module, names: Sequence[str]) -> None:
    """Check that no technique needs a model that is spread over processes.

    Args:
        trainer: The Trainer.
        root: Its module.
        names: Those that need the whole model on every process.

    Raises:
        QATConfigurationError: If one does.
    """
    if names and any(is_sharded(layer.weight) for _, layer in weight_fake_quants(root)):
        raise QATConfigurationError(
            f"{names[0]}: {type(trainer.strategy).__name__} spreads the weights over processes, and this needs them "
            "whole on each. Leave it out, or use a strategy that does not, such as 'ddp'."
        )


def warn_of_monitors(callbacks: Sequence[pl.Callback], num_rungs: int) -> None:
    """Warn of callbacks that take the best value of a metric, which a wide rung has and the last one has not."""
    if num_rungs < 2:
        return
    for callback in callbacks:
        if isinstance(callback, either(pl_callbacks.ModelCheckpoint)):
            monitor = callback.monitor or ""
            keeps_best = (
                monitor != "" and not has_one_width(monitor) and callback.save_top_k != 0 and not callback.save_last
            )
            remedy = "Add save_last=True and use ckpt_path='last', or monitor a run on the last rung alone."
        else:
            is_stopping = isinstance(callback, either(pl_callbacks.EarlyStopping))
            keeps_best = is_stopping and not has_one_width(callback.monitor)  # type: ignore[attr-defined]
            remedy = "It may stop the run as a rung begins; give it patience for a rung, or leave it out."
        if keeps_best:
            rank_zero_warn(
                f"{type(callback).__name__} monitors {callback.monitor!r}, whose best value an annealed run has on a "  # type: ignore[attr-defined]
                f"wide rung, not at the final width. {remedy}"
            )


def warn_of_other_scale_lr(scales: Mapping[str, nn.Parameter], optimizers: Sequence[Any], scale_lr: float) -> None:
    """Warn if a learning rate scheduler has put another learning rate in place of ``scale_lr``."""
    learned = set(scales.values())
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        peak = _peak_rate(group)
        if learned.intersection(group["params"]) and not math.isclose(peak, scale_lr):
            rank_zero_warn(
                f"The learning rate scheduler sets the learning rate of the scales to {peak:g}, not to "
                f"scale_lr={scale_lr:g}. Give it a list with one entry for each parameter group; that of the scales "
                "comes right after the group that it was split from."
            )


def warn_if_wider(before: float, after: float) -> None:
    """Warn if a resumed run goes on at more bits than its checkpoint had."""
    if after > before:
        rank_zero_warn(
            f"The checkpoint was trained at {before:g} bits, and its run goes on at {after:g}: schedule or length of "
            "the run are not those of the checkpoint. To go on as it was, give the same; to train further at the "
            "final width, give no schedule."
        )


def check_scales_are_optimized(scales: Mapping[str, nn.Parameter], optimizers: Sequence[Any]) -> None:
    """Check that an optimizer holds every learned scale, but for those that a callback has frozen with their layer.

    Raises:
        QATConfigurationError: If one is in none.
    """
    optimized = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, scale in scales.items() if scale.requires_grad and scale not in optimized]
    if missing:
        raise QATConfigurationError(
            f"{len(missing)} learned scales are in no optimizer, among them {missing[0]}. Give configure_optimizers "
            "all parameters (self.parameters()), or at least those whose name ends in 'log_scale_ratio' or "
            "'zero_point_offset'; or leave scale_lr out."
        )
