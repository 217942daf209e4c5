"""Distillation while a model trains: every call of the student is compared with its teacher."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_qat.nn.annealed_grid import AnnealedGrid
from lightning_qat.nn.calls import Call, around_calls, attention_mask, holds_compiled, recorded_outputs, unwrap
from lightning_qat.nn.distillation import DistillationError, Objective, relative_error
from lightning_qat.nn.layers import QATLayer, float_type
from lightning_qat.nn.rules import check_patterns, matches
from lightning_qat.nn.teacher import FunctionTeacher, ModuleTeacher, OwnWeights, Teacher


class Distances(NamedTuple):
    """How far a student is from its teacher.

    Attributes:
        output: The loss of the outputs, a scalar; 0 if its weight is.
        hidden: The mean relative error of the layer outputs, a scalar; 0 if there are none.
    """

    output: Tensor
    hidden: Tensor


class Distiller:
    """Compares each call of a student with its teacher, as long as it watches.

    Works with any loop::

        distiller = Distiller(model, ModuleTeacher(float_copy(model)), Objective())
        with distiller.watch(batch) as calls:
            model(batch)
        loss = distiller.loss(calls)

    Args:
        student: The module.
        teacher: Where the targets come from.
        objective: What is compared.
        hidden: Patterns or types of layers of the student whose outputs are compared, too. Of modules within one
            another that one pattern matches, the outermost counts.
        prefix: Name of the student in the model that patterns may refer to.

    Raises:
        DistillationError: If nothing is compared, a pattern matches nothing, the teacher lacks a layer, or layers are
            compiled.
    """

    def __init__(
        self, student: nn.Module, teacher: Teacher, objective: Objective, hidden: Sequence[str] = (), prefix: str = ""
    ) -> None:
        self.student, self.teacher, self.objective = student, teacher, objective
        self.hidden = _find_hidden(student, hidden, prefix)
        if not (self.hidden or objective.weight):
            raise DistillationError("With weight=0 and no hidden layers nothing is distilled.")
        if self.hidden and holds_compiled(student):
            raise DistillationError(
                f"{type(student).__name__} is compiled, and what its layers give cannot be read from outside. Leave "
                "hidden out, or do not compile."
            )
        if self.hidden and isinstance(teacher, FunctionTeacher):
            raise DistillationError("A function as the teacher has no layers: leave hidden out, or give a module.")
        if isinstance(teacher, (OwnWeights, ModuleTeacher)):
            _check_has(teacher.module, self.hidden)

    @contextmanager
    def watch(self, batch: Any = None) -> Iterator[list[Distances]]:
        """Collect the distances of each call of the student that has gradients.

        Args:
            batch: The batch at hand, for a teacher that is a function, and to look for a mask.
        """
        found: list[Distances] = []
        with around_calls(self.student, functools.partial(self._called, batch, found)):
            yield found

    def loss(self, calls: Sequence[Distances]) -> Tensor:
        """Return the weighted loss, averaged over calls.

        Raises:
            DistillationError: If the student was not called.
        """
        return self.weigh(self.mean(calls))

    def weigh(self, distances: Distances) -> Tensor:
        """Return the weighted sum of the distances."""
        return self.objective.weight * distances.output + self.objective.hidden_weight * distances.hidden

    def mean(self, calls: Sequence[Distances]) -> Distances:
        """Return the distances averaged over calls.

        Raises:
            DistillationError: If the student was not called.
        """
        if not calls:
            raise DistillationError(
                f"{type(self.student).__name__} was not called, or no call had gradients, so that there is nothing to "
                "distil. Name the module that is called as module(...) and gives the outputs: module='...'."
            )
        return Distances(*(torch.stack(each).mean() for each in zip(*calls, strict=True)))

    def _called(
        self, batch: Any, found: list[Distances], call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not torch.is_grad_enabled():  # such as a metric, or a target of the model's own making
            return call(*args, **kwargs)
        if found and isinstance(self.teacher, FunctionTeacher):
            raise DistillationError(
                "The student is called several times in a step, and a function of the batch teaches one call. Give a "
                "module as the teacher."
            )
        taught, hidden_taught = self.teacher.teach(call, args, kwargs, batch, self.hidden)
        with recorded_outputs(self.student, self.hidden) as hidden:
            output = call(*args, **kwargs)
        mask = self._mask(args, kwargs, batch)
        compared = self._compare(output, taught, mask)
        if compared is None or compared.requires_grad:
            found.append(_with_zeros(compared, self._compare_hidden(hidden, hidden_taught, mask)))
        return output

    def _mask(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any) -> Tensor | None:
        if self.objective.mask is not None:
            return self.objective.mask(batch)
        return attention_mask(unwrap(self.student), args, kwargs, batch)

    def _compare(self, output: Any, taught: Any, mask: Tensor | None) -> Tensor | None:
        if self.objective.weight == 0:
            return None
        ours = self.objective.select(output, "student")
        is_selected = isinstance(self.teacher, FunctionTeacher) and isinstance(taught, Tensor)
        theirs = taught if is_selected else self.objective.select(taught, "teacher")
        return self.objective.compare(ours, theirs.detach().to(ours.device), self._fitting(mask, ours))

    def _fitting(self, mask: Tensor | None, output: Tensor) -> Tensor | None:
        """Flatten the mask where all tokens are in one dimension, and leave it out where there is none of tokens."""
        if mask is not None and output.dim() == 2 and len(output) == mask.numel():
            mask = mask.flatten()
        is_left_out = mask is None or (output.dim() < 3 and mask.dim() > 1 and self.objective.mask is None)
        return None if mask is None or is_left_out else mask.to(output.device)

    def _compare_hidden(
        self, hidden: dict[str, list[Any]], taught: dict[str, list[Any]], mask: Tensor | None
    ) -> Tensor | None:
        errors: list[Tensor] = []
        for name in self.hidden:
            ours, theirs = hidden[name], taught[name]
            if not ours or len(ours) != len(theirs):
                raise DistillationError(
                    f"{name!r} was called {len(ours)} times by the student and {len(theirs)} times by the teacher. "
                    "Leave out of hidden what is not always called."
                )
            errors.extend(self._hidden_error(name, *pair, mask) for pair in zip(ours, theirs, strict=True))
        return torch.stack(errors).mean() if errors else None

    def _hidden_error(self, name: str, ours: Tensor | None, theirs: Tensor | None, mask: Tensor | None) -> Tensor:
        if ours is None or theirs is None or not ours.requires_grad:
            raise DistillationError(
                f"What {name!r} gives has no gradient. Leave it out of hidden; if it lies within gradient "
                "checkpointing, checkpoint with use_reentrant=False."
            )
        try:
            return relative_error(ours, theirs.detach().to(ours.device), self._fitting(mask, ours))
        except DistillationError as error:
            raise DistillationError(f"{name!r}: {error}") from error


def _with_zeros(output: Tensor | None, hidden: Tensor | None) -> Distances:
    some = hidden if output is None else output
    assert some is not None
    zero = torch.zeros_like(some)
    return Distances(zero if output is None else output, zero if hidden is None else hidden)


def _check_has(teacher: nn.Module, hidden: Sequence[str]) -> None:
    missing = set(hidden) - {name for name, _ in teacher.named_modules()}
    if missing:
        raise DistillationError(
            f"The teacher {type(teacher).__name__} has no {sorted(missing)[0]!r}. Layers are compared by name: leave "
            "hidden out, or give a teacher with the same layers."
        )


def _find_hidden(student: nn.Module, patterns: Sequence[str], prefix: str) -> list[str]:
    """Return the names of the layers that ``patterns`` ask for, within the student."""
    floats = [name for name, module in student.named_modules() if name and not isinstance(module, AnnealedGrid)]
    full = {name: f"{prefix}.{name}".strip(".") for name in floats}
    types = {name: float_type(student.get_submodule(name)) for name in full}
    try:
        check_patterns(
            patterns, {full[name]: layer_type for name, layer_type in types.items()}, "The pattern of hidden"
        )
    except ValueError as error:
        raise DistillationError(str(error)) from error
    chosen: dict[str, None] = {}
    for pattern in patterns:
        outermost: list[str] = []
        for name, layer_type in types.items():  # what contains a module comes before it
            is_within = any(name.startswith(f"{other}.") for other in outermost)
            if not is_within and matches(pattern, full[name], layer_type, set(full.values())):
                outermost.append(name)
        chosen.update(dict.fromkeys(outermost))
    return list(chosen)


def default_student(root: nn.Module) -> tuple[str, nn.Module]:
    """Return name and module of what is distilled if nothing else is asked for.

    It is the outermost child that holds all that trains or is quantized, through containers that cannot be called;
    ``root`` itself if several children do.
    """
    name, module = "", root
    while module is root or type(module).forward is nn.Module.forward:
        holders = {key: child for key, child in module.named_children() if _matters(child)}
        if len(holders) != 1 or any(parameter is not None for parameter in module._parameters.values()):
            return "", root
        key, module = next(iter(holders.items()))
        name = f"{name}.{key}".lstrip(".")
    return name, module


def _matters(module: nn.Module) -> bool:
    is_quantized = any(isinstance(each, QATLayer) for each in module.modules())
    return is_quantized or any(parameter.requires_grad for parameter in module.parameters())
