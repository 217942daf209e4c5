"""Lightning's callbacks that end training, and validate, with an average of the weights."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch import callbacks as pl_callbacks

from lightning_qat.callbacks.twins import either

# WeightAveraging came with Lightning 2.6.
WEIGHT_AVERAGING: tuple[type[pl.Callback], ...] = tuple(
    getattr(pl_callbacks, name) for name in ("WeightAveraging",) if hasattr(pl_callbacks, name)
)


def has_weight_average(trainer: pl.Trainer) -> bool:
    """Return whether an average takes the place of the weights in validation and after training."""
    return any(isinstance(callback, either(*WEIGHT_AVERAGING)) for callback in trainer.callbacks)  # type: ignore[attr-defined]
