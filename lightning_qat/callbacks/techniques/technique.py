"""What a technique of training is: hooks that QATCallback calls, a line for its summary, and state to resume with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl

from lightning_qat.callbacks.timeline import Timeline


class Technique(pl.Callback):
    """One technique of quantization-aware training, carried out by ``QATCallback``.

    It is a Lightning callback in all but one thing: it is not listed in the Trainer. ``QATCallback`` passes on the
    hooks below, after its own work in each, in the order of its techniques, and keeps ``state_dict()`` in the
    checkpoint. To add one, write one file in this folder and one line in its registry.

    Passed on: ``on_train_start``, ``on_train_batch_start``, ``on_after_backward``, ``on_before_optimizer_step``,
    ``on_train_batch_end``, ``on_train_epoch_end``, ``on_validation_start``, ``on_validation_batch_start``,
    ``on_validation_end``, ``on_train_end``, ``teardown`` and ``on_exception`` (as ``teardown``), with Lightning's own
    arguments; and those that are new here.

    Attributes:
        name: The key of its state in a checkpoint and of its line in the summary.
        shorthand: Name of the argument that a bare value stands for, as in ``init="gptq"``, or None.
        writes_weights: Whether it changes quantized weights, or their gradients, itself.
        needs_whole_model: Whether it copies the model, or looks at all of its weights, which no process has if a
            strategy spreads them.
    """

    name: ClassVar[str]
    shorthand: ClassVar[str | None] = None
    writes_weights: bool = False
    needs_whole_model: bool = False

    def on_model_built(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called in a fit when the quantizers are in, before a checkpoint is restored and optimizers are made."""

    def on_fit_checked(self, trainer: pl.Trainer, pl_module: pl.LightningModule, timeline: Timeline) -> None:
        """Called at the start of a fit, after a checkpoint was restored; the place to refuse what cannot work.

        Raises:
            QATConfigurationError: If model or Trainer do not allow the technique.
        """

    def on_new_rung(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before a training batch whose optimizer step is the first with these widths.

        The quantizers have observed new grids already. It is not called for the rung on which a resumed run goes on.
        """

    def on_rung_restored(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called in place of ``on_new_rung`` if the schedule went back to the rung before.

        Weights, buffers, quantizers and the state of optimizers are again as they were when that rung ended. By default
        it is taken for a new rung.
        """
        self.on_new_rung(trainer, pl_module)

    def describe(self) -> str:
        """Return the text of its line in the summary, once ``on_fit_checked`` was called."""
        return type(self).__name__

    def figures(self) -> Mapping[str, float]:
        """Return what is to be logged now, by name without prefix; called where ``QATCallback`` logs."""
        return {}

    def layer_figures(self) -> Mapping[str, Mapping[str, float]]:
        """Return shares of the weights for the table of layers, by layer and name."""
        return {}


TechniqueT = TypeVar("TechniqueT", bound=Technique)


def read_technique(spec: Any, cls: type[TechniqueT]) -> TechniqueT | None:
    """Return the technique that the value of an argument stands for.

    Args:
        spec: The technique, a mapping with its arguments, True for its defaults, None or False for none; or the value
            of its ``shorthand``.
        cls: Its class.

    Raises:
        TypeError: If it is none of these, or an argument does not exist.
    """
    if spec is None or spec is False:
        return None
    if isinstance(spec, cls):
        return spec
    if isinstance(spec, Mapping):
        arguments = dict(spec)
    elif spec is True:
        arguments = {}
    elif cls.shorthand is not None:
        arguments = {cls.shorthand: spec}
    else:
        raise TypeError(f"{cls.name}={spec!r} must be True, or a mapping with arguments of {cls.__name__}.")
    try:
        return cls(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(cls).parameters)
        raise TypeError(f"{cls.name}={spec!r}: {str(error).rstrip('.')}. Its arguments are {known}.") from error
