"""Student and teacher of a LightningModule that is to be distilled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_qat.callbacks.errors import QATConfigurationError, as_configuration_error
from lightning_qat.callbacks.hooks import remove_patch
from lightning_qat.callbacks.twins import overrides
from lightning_qat.nn import QATLayer, quantized_layers
from lightning_qat.nn.accumulator import is_distributed
from lightning_qat.nn.calls import is_compiled
from lightning_qat.nn.distiller import default_student
from lightning_qat.nn.float_model import copy_weights, keeps_float_weights, weights_of
from lightning_qat.nn.teacher import CopyTeacher, FunctionTeacher, ModuleTeacher, Teacher

TeacherLike = nn.Module | Callable[[Any], Any] | str | None
"""A module, a function of the batch, ``"copy"``, or None for the float model."""


def find_student(pl_module: pl.LightningModule, name: str | None) -> tuple[str, nn.Module]:
    """Return name and module of what is distilled.

    Args:
        pl_module: The prepared module.
        name: Its name, or None for the default; see :func:`~lightning_qat.nn.distiller.default_student`.

    Raises:
        QATConfigurationError: If there is no such module, or its calls cannot be seen.
    """
    modules = dict(pl_module.named_modules())
    if name is not None and name not in modules:
        close = sorted(child for child, _ in pl_module.named_children())
        raise QATConfigurationError(f"distillation: module={name!r} does not exist; the children are {close}.")
    name, student = default_student(pl_module) if name is None else (name, modules[name])
    if student is pl_module and not overrides(pl_module, "forward"):
        raise QATConfigurationError(
            f"distillation: several children of {type(pl_module).__name__} are trained or quantized, and it has no "
            "forward. Name the one that gives the outputs, module='...', or write a forward and call self(...)."
        )
    parts = name.split(".")
    around = [pl_module, *(modules[".".join(parts[:end])] for end in range(1, len(parts)))]
    if pl_module._compiler_ctx is not None or (student is not pl_module and any(map(is_compiled, around))):
        raise QATConfigurationError(
            f"distillation: {name or type(pl_module).__name__} is compiled as a part of something larger, so that its "
            "calls cannot be seen. Compile that module itself: self.model = torch.compile(self.model)."
        )
    return name, student


def make_teacher(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    student: nn.Module,
    teacher: TeacherLike,
    dtype: torch.dtype | None,
) -> Teacher | None:
    """Return the teacher of ``student``, a part of ``pl_module``; None if it can be its own, once it has its weights.

    Args:
        trainer: The Trainer.
        pl_module: The prepared module, before a checkpoint is restored.
        student: The module that is distilled.
        teacher: What was asked for.
        dtype: Type of its weights, or None.

    Raises:
        QATConfigurationError: If it is a part of what trains, or cannot be made.
    """
    if isinstance(teacher, nn.Module):
        _check_is_apart(teacher, pl_module)
        return ModuleTeacher(teacher, dtype)
    if callable(teacher):
        return FunctionTeacher(teacher)
    if not quantized_layers(student):
        raise QATConfigurationError(
            f"distillation: {type(student).__name__} has no quantized layer, so that it would teach itself. Name "
            "another module, or give a teacher."
        )
    if trainer.strategy.restore_checkpoint_after_setup:
        raise QATConfigurationError(
            f"distillation: {type(trainer.strategy).__name__} splits the model, and the float weights cannot be kept "
            "beside it. Give a module that has them: teacher=..."
        )
    if teacher is None and keeps_float_weights(student):
        return None
    with as_configuration_error():
        copied = CopyTeacher(student, dtype, share=teacher is None)
    for hook in list(vars(copied.module)):
        remove_patch(copied.module, hook)
    return copied


def _check_is_apart(teacher: nn.Module, pl_module: pl.LightningModule) -> None:
    quantized = {module for module in pl_module.modules() if isinstance(module, QATLayer)}
    trained = {parameter for parameter in pl_module.parameters() if parameter.requires_grad}
    if not (quantized.isdisjoint(teacher.modules()) and trained.isdisjoint(teacher.parameters())):
        raise QATConfigurationError(
            "distillation: the teacher is, or holds, a part of the LightningModule that is quantized or trained. Leave "
            "teacher out to learn from the float weights, or give a module of its own."
        )


def settle_copy(twin: nn.Module, weights: Mapping[str, Tensor] | None) -> None:
    """Give a copy the float weights of a checkpoint, if it had some, and let all processes have the same.

    Each process has built its module by itself; that of the student, too, is the one of the first process.
    """
    if weights is not None:
        copy_weights(weights, twin)
    if is_distributed():
        for weight in weights_of(twin).values():
            torch.distributed.broadcast(weight.data, src=0)
