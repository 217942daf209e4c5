"""A callback that carries out techniques: what it does with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_qat.callbacks.techniques.technique import Technique


class TechniqueHost(pl.Callback):
    """Passes Lightning's hooks on to techniques; those in which it has work of its own, it passes on itself.

    Args:
        techniques: The techniques, in the order in which they are called.
    """

    def __init__(self, techniques: Sequence[Technique]) -> None:
        self.techniques = list(techniques)

    def _pass_on(self, hook: str, *arguments: Any) -> None:
        for technique in self.techniques:
            getattr(technique, hook)(*arguments)

    def _figures(self) -> dict[str, float]:
        return {name: value for technique in self.techniques for name, value in technique.figures().items()}

    def _layer_figures(self) -> dict[str, dict[str, float]]:
        """Return what the techniques know about single layers, by layer."""
        shares: dict[str, dict[str, float]] = {}
        for technique in self.techniques:
            for name, figures in technique.layer_figures().items():
                shares.setdefault(name, {}).update(figures)
        return shares

    def _state_of_techniques(self) -> dict[str, Any]:
        return {technique.name: technique.state_dict() for technique in self.techniques}

    def _load_techniques(self, states: Mapping[str, Any]) -> None:
        left_out = set(states) - {technique.name for technique in self.techniques}
        if left_out:
            rank_zero_warn(
                f"The checkpoint is of a run with {', '.join(sorted(left_out))}, and this one goes on without: weights "
                "that were frozen are free again, losses are those of training_step. Give QATCallback the same "
                "arguments to go on as before."
            )
        for technique in self.techniques:
            technique.load_state_dict(states.get(technique.name, {}))

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the hook on."""
        self._pass_on("on_after_backward", trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the hook on."""
        self._pass_on("on_train_epoch_end", trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the hook on."""
        self._pass_on("on_validation_start", trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Pass the hook on."""
        self._pass_on("on_validation_batch_start", trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the hook on."""
        self._pass_on("on_test_start", trainer, pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pass the hook on."""
        self._pass_on("on_predict_start", trainer, pl_module)
