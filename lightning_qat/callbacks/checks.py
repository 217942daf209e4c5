"""Checks of a Trainer before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import callbacks as pl_callbacks
from torch import nn

from lightning_qat.callbacks.errors import QATConfigurationError

# WeightAveraging came with Lightning 2.6.
_AVERAGING = tuple(
    getattr(pl_callbacks, name)
    for name in ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")
    if hasattr(pl_callbacks, name)
)


def check_callbacks(callbacks: Sequence[pl.Callback], qat: pl.Callback) -> None:
    """Check that ``qat`` is the only one of its kind and comes before what copies the model.

    Raises:
        QATConfigurationError: If it is not.
    """
    if sum(isinstance(callback, type(qat)) for callback in callbacks) > 1:
        raise QATConfigurationError(
            "The Trainer has several QATCallbacks. Use one; it takes a list of rules, "
            "[{'target': ..., 'scheme': ...}, ...], for layers that need different schemes."
        )
    for callback in callbacks[: callbacks.index(qat)]:
        if isinstance(callback, _AVERAGING):
            name = type(callback).__name__
            raise QATConfigurationError(
                f"{name} is listed before QATCallback, so it would copy the model before the quantizers are in. "
                f"List QATCallback first: callbacks=[QATCallback(...), {name}(...)]."
            )


def check_scales_are_optimized(scales: Mapping[str, nn.Parameter], optimizers: Sequence[Any]) -> None:
    """Check that an optimizer holds every learned scale.

    Raises:
        QATConfigurationError: If one is in none.
    """
    optimized = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, scale in scales.items() if scale not in optimized]
    if missing:
        raise QATConfigurationError(
            f"{len(missing)} learned scales are in no optimizer, among them {missing[0]}. Give configure_optimizers "
            "all parameters (self.parameters()), or at least those whose name ends in 'log_scale_ratio'; or leave "
            "scale_lr out."
        )
