"""Batch normalization under quantization: statistics computed anew before they are used, and frozen late."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_qat.callbacks.averaging import has_weight_average
from lightning_qat.callbacks.calibration import make_step, try_step
from lightning_qat.callbacks.capture import BatchCapture
from lightning_qat.callbacks.errors import QATConfigurationError
from lightning_qat.callbacks.evaluation import is_last_validation
from lightning_qat.callbacks.hooks import remove_patch, run_around
from lightning_qat.callbacks.isolation import aside
from lightning_qat.callbacks.ptq_arguments import check_calibration_data
from lightning_qat.callbacks.techniques.positions import find_step
from lightning_qat.callbacks.techniques.technique import Technique
from lightning_qat.callbacks.timeline import Timeline, check_position
from lightning_qat.callbacks.twins import overrides
from lightning_qat.core.checks import check_positive
from lightning_qat.nn.batch_norm import batch_norms, reestimate
from lightning_qat.nn.calibrate import GIB, make_runner


class BatchNorm(Technique):
    """Compute running statistics anew for the quantized weights as they are, and freeze them late in training.

    Weights that jump between levels leave running averages behind that belong to no weights in particular. So before
    every validation, and at the end of training, the averages over batches of training take their place for good:
    checkpoints that are saved then have them. In training, where layers normalize by the batch, nothing else changes,
    to the bit. The module's ``calibration_step(batch)`` runs, or its ``forward`` on what that takes from the batch, in
    evaluation mode (no dropout) but for the layers themselves. Layers that do not train, keep no statistics, or are not
    batch normalization are left alone.

    Beside an average of weights (EMA) it is the average that statistics are computed for, in validation and after
    training. Checkpoints of the average have them if they are saved after a validation and before the next step: for
    the last checkpoint to have them, validate at the last step.

    Args:
        reestimate: Number of training batches to compute statistics from: copies of the first ones of the run (those
            seen so far, in an early validation). None to leave statistics alone.
        freeze_at: When layers begin to normalize by their running statistics in training, too, and no longer update
            them: in optimizer steps, or as a fraction of the run. They are computed anew once more then (if all batches
            have been seen), and stay for the rest of the run, or until a rung of the schedule begins. Default: never.
        memory_gib: GiB that the copies may take, in the memory of the CPU and in checkpoints; fewer are kept if they
            would take more.
        calibration_data: Batches to use instead, as ``calibration_step`` or ``forward`` takes them; checkpoints do not
            hold them.

    Source: re-estimation, 50 batches: Nagel et al. 2022 (arXiv:2203.11086), section 2.3.1; freezing: Krishnamoorthi
    2018 (arXiv:1806.08342).
    """

    name: ClassVar[str] = "batch_norm"
    needs_whole_model = True
    shorthand: ClassVar[str] = "reestimate"

    def __init__(
        self,
        reestimate: int | None = 50,
        freeze_at: float | None = None,
        memory_gib: float = 0.5,
        calibration_data: Sequence[Any] | None = None,
    ) -> None:
        check_positive(reestimate, "reestimate", Integral)
        check_positive(memory_gib, "memory_gib")
        if reestimate is None and freeze_at is None:
            raise ValueError("batch_norm does nothing without reestimate and freeze_at. Give one, or leave it out.")
        if freeze_at is not None:
            check_position(freeze_at, "batch_norm: freeze_at")
        check_calibration_data(calibration_data)
        self.reestimate, self.freeze_at, self.memory_gib = reestimate, freeze_at, memory_gib
        self.calibration_data = calibration_data
        self._forget()

    def _forget(self) -> None:
        self._capture = BatchCapture(sys.maxsize)
        self._num_bytes, self._is_complete = 0, False
        self._norms: dict[str, _BatchNorm] = {}
        self._in_training: list[_BatchNorm] = []
        self._switched: list[_BatchNorm] = []
        self._freeze_step: int | None = None
        self._is_frozen = self._has_tried = self._is_alone = False
        self._is_up_to_date = True  # there has been no training yet

    # ------------------------------------------------------------------------------------------------- before

    @override
    def on_model_built(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier fit."""
        self._forget()
        self._is_alone = trainer.world_size == 1

    @override
    def on_fit_checked(self, trainer: pl.Trainer, pl_module: pl.LightningModule, timeline: Timeline) -> None:
        """Find the layers, and refuse what cannot work."""
        self._norms = batch_norms(pl_module)
        if not self._norms:
            raise QATConfigurationError(
                f"batch_norm: {type(pl_module).__name__} has no batch normalization with running statistics. Leave "
                "batch_norm out."
            )
        has_forward = overrides(pl_module, "forward")
        if self.reestimate is not None and not has_forward and not hasattr(pl_module, "calibration_step"):
            raise QATConfigurationError(
                f"batch_norm: {type(pl_module).__name__} has no forward to compute statistics with. Give it a method "
                "calibration_step(self, batch) that runs the model on a training batch, or set reestimate=None."
            )
        if self.freeze_at is not None:
            self._freeze_step = find_step(trainer, timeline, self.freeze_at, "batch_norm: freeze_at")

    @override
    def describe(self) -> str:
        """Describe what happens to how many layers, when, and at what cost."""
        parts = []
        if self.reestimate is not None:
            source = "given batches" if self.calibration_data is not None else f"{self.reestimate} training batches"
            kept = "" if self.calibration_data is not None else f" (kept: {self.memory_gib:g} GiB at most)"
            parts.append(f"computed anew from {source}{kept} before validation")
        if self._freeze_step is not None:
            parts.append(f"frozen from step {self._freeze_step}")
        return f"statistics of {len(self._norms)} layers {', '.join(parts)}"

    # ------------------------------------------------------------------------------------------------- during

    @override
    def on_new_rung(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let frozen statistics be computed anew once more: those of another width do not fit."""
        self._is_frozen = False

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep a copy of the first batches; hold statistics still from the step on that they are frozen at."""
        self._in_training = [norm for norm in self._norms.values() if norm.training or norm in self._switched]
        if self.reestimate is not None and self.calibration_data is None and not self._is_complete:
            self._keep(batch, self.reestimate)
        if self._freeze_step is not None and trainer.global_step >= self._freeze_step:
            self._freeze(trainer, pl_module)
        self._is_up_to_date = False

    def _keep(self, batch: Any, num_batches: int) -> None:
        most = int(self.memory_gib * GIB)
        num_bytes = sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        if self._capture.batches and self._num_bytes + num_bytes > most:
            self._is_complete = True
            rank_zero_warn(
                f"batch_norm keeps {len(self._capture.batches)} training batches, not {num_batches}: more would take "
                f"over {self.memory_gib:g} GiB. Raise memory_gib, lower reestimate, or give calibration_data."
            )
            return
        self._capture.add(batch)
        self._num_bytes += num_bytes
        self._is_complete = len(self._capture.batches) >= num_batches

    def _freeze(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Freeze the layers; every time, since callbacks and modules put layers into training mode again."""
        if not self._is_frozen:
            # The memory for copies may be full at another batch in another process, and all of them must take part.
            is_ready = self._is_complete or self.calibration_data is not None
            if _least(trainer, is_ready):
                self._run(trainer, pl_module)
        self._is_frozen = True
        for norm in self._in_training:
            norm.training = False
            if norm not in self._switched:
                self._switched.append(norm)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Try once whether the batches can be run; compute statistics for checkpoints of the last step."""
        if not self._has_tried:
            self._has_tried = True
            self._try(trainer, pl_module)
        if trainer.global_step >= trainer.max_steps > 0:
            self._bring_up_to_date(trainer, pl_module)

    def _try(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.reestimate is None:
            return
        if not self._in_training and not self._is_frozen:
            rank_zero_warn("batch_norm has no effect: no batch normalization of the model is in training mode.")
        what_fails = f"batch_norm cannot compute statistics of {type(pl_module).__name__}"
        with aside(pl_module):
            try_step(trainer, pl_module, self._batches, what_fails, "batch", ", or set reestimate=None")

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Compute statistics before the first batch; by then an average of weights has taken the place of the last."""
        if batch_idx > 0 or dataloader_idx > 0 or trainer.sanity_checking or not self._in_training:
            return
        if has_weight_average(trainer):
            self._update_average(trainer, pl_module)
        else:
            self._bring_up_to_date(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute statistics if this is the last epoch."""
        if is_last_validation(trainer):
            self._bring_up_to_date(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute statistics for what is saved after training, and put the layers back into training mode."""
        if has_weight_average(trainer):  # which takes the place of the weights only now, in a later callback
            run_around(pl_module, "on_train_end", lambda call: self._end_with_average(trainer, pl_module, call))
        else:
            self._bring_up_to_date(trainer, pl_module)
            self._unfreeze()

    def _end_with_average(self, trainer: pl.Trainer, pl_module: pl.LightningModule, call: Callable[[], Any]) -> Any:
        self._update_average(trainer, pl_module)
        self._unfreeze()
        return call()

    def _update_average(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute statistics of the average that stands in for the weights, unless they are frozen."""
        if not self._is_frozen:
            self._run(trainer, pl_module)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the layers back into training mode, and leave no patch behind."""
        remove_patch(pl_module, "on_train_end")
        self._unfreeze()

    def _unfreeze(self) -> None:
        for norm in self._switched:
            norm.training = True
        self._switched, self._in_training = [], []

    def _bring_up_to_date(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute statistics unless they belong to the weights already, or are frozen."""
        if not self._is_up_to_date and not self._is_frozen:
            self._run(trainer, pl_module)
            self._is_up_to_date = True

    @property
    def _batches(self) -> Sequence[Any]:
        return self._capture.batches if self.calibration_data is None else self.calibration_data[: self.reestimate]

    def _run(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compute the statistics anew."""
        batches = self._batches
        if self.reestimate is None or not self._in_training or not batches:
            return
        # Synchronized layers wait for the other processes, so that all must run as many batches.
        num_batches = int(_least(trainer, len(batches)))
        run = make_runner(pl_module, batches, make_step(trainer, pl_module))
        average = functools.partial(trainer.strategy.reduce, reduce_op="mean")
        with aside(pl_module):
            reestimate(pl_module, self._in_training, run, num_batches, average)

    # -------------------------------------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on with: the batches, if they are plain tensors of a single process.

        With several processes each has batches of its own, and only one writes the checkpoint: they are left out.
        """
        return {
            "capture": self._capture.state_dict() if self._is_alone else None,
            "num_batches": len(self._capture.batches),
            "num_bytes": self._num_bytes,
            "is_complete": self._is_complete,
            "is_frozen": self._is_frozen,
            "is_up_to_date": self._is_up_to_date,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if not state_dict:  # of a run without this technique
            return
        self._is_frozen, self._is_up_to_date = state_dict["is_frozen"], state_dict["is_up_to_date"]
        if state_dict["capture"] is not None:
            self._num_bytes, self._is_complete = state_dict["num_bytes"], state_dict["is_complete"]
            self._capture.load_state_dict(state_dict["capture"])
        elif state_dict["num_batches"]:
            rank_zero_warn(
                "The checkpoint does not hold the batches that batch_norm computes statistics from: it goes on with "
                "the next ones. Give calibration_data to use the same ones."
            )


def _least(trainer: pl.Trainer, number: float) -> float:
    """Return the least that any process has; all of them must call this."""
    if trainer.world_size == 1:
        return number
    own = torch.tensor(float(number), device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(own, reduce_op="min"))
