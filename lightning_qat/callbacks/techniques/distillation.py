"""Distillation from the float weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_qat.callbacks.errors import QATConfigurationError, as_configuration_error
from lightning_qat.callbacks.hooks import remove_patch, run_around
from lightning_qat.callbacks.teachers import TeacherLike, find_student, make_teacher, settle_copy
from lightning_qat.callbacks.techniques.technique import Technique
from lightning_qat.callbacks.timeline import Timeline
from lightning_qat.nn import PatternsLike, parse_patterns
from lightning_qat.nn.calls import unwrap
from lightning_qat.nn.distillation import DistillationError, Objective, OutputPart, check_weight
from lightning_qat.nn.distiller import Distiller
from lightning_qat.nn.float_model import weights_of
from lightning_qat.nn.teacher import CopyTeacher, ModuleTeacher, OwnWeights, Teacher


class Distillation(Technique):
    """Let the quantized model learn from the outputs of the float one.

    The loss of a step becomes ``task_weight * (loss of training_step) + weight * T^2 KL(teacher || student)
    + hidden_weight * (mean relative error of layer outputs)``, averaged over the positions that the attention mask
    counts and over the calls of the module in the step. What ``training_step`` logs is its own loss; the
    Kullback-Leibler divergence (in nats, with its factor) is logged as ``qat/distillation_loss``, averaged since the
    last time.

    Args:
        weight: Weight of the loss of the outputs.
        task_weight: Weight of the loss that ``training_step`` returns; it stays in the graph even with 0, and must be
            finite.
        temperature: ``T``, which divides all logits.
        loss: ``"kl"`` for logits, or ``"mse"`` for any output (of a regression, an encoder, several labels): the
            squared error over the power of the teacher's output.
        module: Name of the module whose outputs are compared, called as ``self.name(...)`` in ``training_step``.
            Default: the child that holds all that trains and is quantized; the LightningModule, if several do.
        output: Which part of its output: a key, a position, or a function. Default: the tensor as it is, ``logits``, or
            for ``"mse"`` ``last_hidden_state``.
        class_dim: Dimension of the classes. Default: the last.
        mask: A function of the batch that returns which positions count, ``[B, T]``, or None for all. Default: the
            attention mask, of the module's arguments or else of the batch.
        hidden: Patterns or types of layers whose outputs are compared, too, by their squared error over the power of
            the teacher's: ``"LlamaDecoderLayer"``.
        hidden_weight: Weight of that.
        teacher: A module, which is called with the same arguments; or a function of the batch that returns the
            outputs, such as ``lambda batch: batch["teacher_logits"]``. Default: the float model as the fit finds it.
            That is the module itself without its quantizers where nothing in it trains but scales, and otherwise
            (or with ``"copy"``) a copy. A callback that is used for several fits of a model keeps the first copy.
        teacher_dtype: Type that the teacher is cast to, such as ``"bfloat16"``. Default: that of the student for a
            copy; a module is left as it is.
        save_teacher: Keep the weights of the copy in checkpoints, so that a run can be resumed with a module that is
            built with other weights.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of range.

    Source: Hinton, Vinyals, Dean 2015 (arXiv:1503.02531); to the float model's logits alone, as ``task_weight=0``
    does, for QAT: LLM-QAT (arXiv:2305.17888).
    """

    name: ClassVar[str] = "distillation"

    def __init__(
        self,
        weight: float = 1.0,
        task_weight: float = 0.0,
        temperature: float = 1.0,
        loss: str = "kl",
        module: str | None = None,
        output: OutputPart = None,
        class_dim: int | None = None,
        mask: Callable[[Any], Tensor | None] | None = None,
        hidden: PatternsLike = (),
        hidden_weight: float = 1.0,
        teacher: TeacherLike = None,
        teacher_dtype: str | torch.dtype | None = None,
        save_teacher: bool = False,
    ) -> None:
        self.objective = Objective(loss, temperature, output, class_dim, mask, weight, hidden_weight)
        check_weight(task_weight, "task_weight")
        self.task_weight, self.module = task_weight, module
        self.hidden = parse_patterns(hidden)
        if weight == 0 and (hidden_weight == 0 or not self.hidden):
            raise ValueError("With weight=0 and no hidden layers nothing is distilled. Leave distillation out.")
        if isinstance(teacher, str) and teacher != "copy":
            raise ValueError(f"teacher={teacher!r} must be 'copy', a module, a function of the batch, or left out.")
        if not (teacher is None or callable(teacher) or isinstance(teacher, str)):
            raise TypeError(f"teacher={teacher!r} must be a module, a function of the batch, 'copy', or left out.")
        self.teacher, self.teacher_dtype, self.save_teacher = teacher, _read_dtype(teacher_dtype), save_teacher
        self._student: weakref.ref[nn.Module] | None = None
        self._teacher: Teacher | None = None
        self._distiller: Distiller | None = None
        self._restored: Mapping[str, Any] | None = None
        self._digest: str | None = None
        self._batch: Any = None
        self._is_armed = False
        self._totals, self._count = torch.zeros(2), 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to the fit at hand."""
        return {**vars(self), "_student": None, "_distiller": None, "_batch": None, "_is_armed": False}

    # ---------------------------------------------------------------------------------------- before the fit

    @override
    def on_model_built(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find student and teacher; a copy is taken before a checkpoint takes the place of the float weights."""
        self._restored, self._distiller, self._digest = None, None, None
        self._totals, self._count = torch.zeros(2), 0
        if not pl_module.automatic_optimization:
            raise QATConfigurationError(
                "distillation: under manual optimization training_step makes use of the loss before anything can be "
                "added to it. Use automatic optimization, or lightning_qat.nn.distiller.Distiller in training_step."
            )
        _, student = find_student(pl_module, self.module)
        is_same = self._student is not None and self._student() is student
        if not (is_same and isinstance(self._teacher, CopyTeacher)):
            self._teacher = make_teacher(trainer, pl_module, student, self.teacher, self.teacher_dtype)
        self._student = weakref.ref(student)

    @override
    def on_fit_checked(self, trainer: pl.Trainer, pl_module: pl.LightningModule, timeline: Timeline) -> None:
        """Bring the teacher to where the student is, and see whether it has the layers."""
        name, student = find_student(pl_module, self.module)
        with as_configuration_error():
            if isinstance(self._teacher, ModuleTeacher):
                self._teacher.suit(student, pl_module.device)
            if isinstance(self._teacher, CopyTeacher):
                is_of_float_run = self._restored is None and trainer.ckpt_path is not None
                saved = (self._restored or {}).get("weights")
                self._teacher.unshare(saved or {})
                settle_copy(self._teacher.module, weights_of(unwrap(student)) if is_of_float_run else saved)
                self._teacher.settle()
            if self._teacher is None:
                self._teacher = OwnWeights(student)
            self._distiller = Distiller(student, self._teacher, self.objective, self.hidden, name)
        self._digest = self._teacher.digest()
        self._totals = self._totals.to(pl_module.device)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that a resumed run has the teacher that it had."""
        is_new = self._restored is not None and not self._restored  # a run without distillation is resumed with it
        if self._restored is None or self._digest is None or (is_new and isinstance(self.teacher, nn.Module)):
            return
        if self._restored.get("digest") != self._digest:
            raise QATConfigurationError(
                "distillation: the teacher is not the one of the run that is resumed. The module was built with other "
                "weights than then, teacher or teacher_dtype differ, or that run had no distillation. Build it with "
                "the same pretrained weights, or give them as teacher=...; with save_teacher=True a checkpoint keeps "
                "the teacher."
            )

    # ----------------------------------------------------------------------------------------- during the fit

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Be there when training_step is called."""
        self._batch = batch
        self._arm(pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Be there if the optimizer evaluates the loss again, as LBFGS does."""
        self._arm(pl_module)

    def _arm(self, pl_module: pl.LightningModule) -> None:
        if not self._is_armed:
            run_around(pl_module, "training_step", self._run_step)
            self._is_armed = True

    def _run_step(self, training_step: Callable[[], Any]) -> Any:
        assert self._distiller is not None
        self._is_armed = False
        try:
            with self._distiller.watch(self._batch) as calls:
                result = training_step()
            task = result.get("loss") if isinstance(result, Mapping) else result
            if not isinstance(task, Tensor):  # a batch that is skipped, or what Lightning will refuse
                return result
            distances = self._distiller.mean(calls)
        except DistillationError as error:
            raise QATConfigurationError(f"distillation: {error}") from error
        self._totals, self._count = self._totals + torch.stack(distances).detach(), self._count + 1
        loss = self.task_weight * task + self._distiller.weigh(distances)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave nothing behind."""
        self._disarm(pl_module)

    def _disarm(self, pl_module: pl.LightningModule) -> None:
        if self._is_armed:
            remove_patch(pl_module, "training_step")
        self._is_armed, self._batch = False, None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no patch behind, and free the device as Lightning does with the student."""
        self._disarm(pl_module)
        self._distiller = None
        if isinstance(self._teacher, CopyTeacher):
            self._teacher.module.cpu()

    # ---------------------------------------------------------------------------------- what it tells and keeps

    @override
    def describe(self) -> str:
        """Describe loss and teacher."""
        assert self._distiller is not None
        assert self._teacher is not None
        objective, student = self.objective, type(unwrap(self._distiller.student)).__name__
        temperature = f" at temperature {objective.temperature:g}" if objective.loss == "kl" else ""
        terms = [
            (objective.weight, f"{objective.loss} of the outputs of {student}{temperature}"),
            (objective.hidden_weight * bool(self.hidden), f"error of {len(self._distiller.hidden)} layers"),
            (self.task_weight, "loss of training_step"),
        ]
        loss = " + ".join(f"{weight:g} x {what}" for weight, what in terms if weight)
        loss += "" if self.task_weight else " (the loss of training_step is not used)"
        return f"{loss}; teacher: {self._teacher.describe()}"

    @override
    def figures(self) -> Mapping[str, float]:
        """Return the loss of the outputs and the error of the layers, averaged over the batches since the last time."""
        if self._count == 0:
            return {}
        output, hidden = (self._totals / self._count).tolist()
        self._totals, self._count = torch.zeros_like(self._totals), 0
        figures = {"distillation_loss": output} if self.objective.weight else {}
        return {**figures, "distillation_hidden_error": hidden} if self.hidden else figures

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return by what to know the teacher again, its weights if they are to be kept, and what is not yet logged."""
        weights = None
        if self.save_teacher and isinstance(self._teacher, CopyTeacher):
            weights = {name: weight.detach().cpu() for name, weight in weights_of(self._teacher.module).items()}
        has_begun = self._distiller is not None  # a search for a learning rate saves and restores before that
        totals = {"totals": self._totals.cpu(), "count": self._count}
        return {"has_begun": has_begun, "digest": self._digest, "weights": weights, **totals}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what :meth:`state_dict` returned, to be checked when the fit starts."""
        if not state_dict.get("has_begun", True):
            return
        self._restored = state_dict
        if state_dict:
            self._totals, self._count = state_dict["totals"], state_dict["count"]


def _read_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"teacher_dtype={dtype!r} must be a floating-point type, such as 'bfloat16'.")
    return found
