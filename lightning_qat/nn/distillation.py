"""The losses of distillation: how far the outputs of a student are from those of its teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.core.checks import check_choice, check_positive

OutputPart = str | int | Callable[[Any], Tensor] | None
"""Which part of a module's output counts: its name, its position, or a function that returns it."""

_USUAL_PARTS = {"kl": ("logits",), "mse": ("logits", "last_hidden_state")}


class DistillationError(ValueError):
    """Raised if student and teacher cannot be compared; the message names the remedy."""


def kl_divergence(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    class_dim: int = -1,
) -> Tensor:
    """Return ``T^2 KL(softmax(teacher / T) || softmax(student / T))`` in nats, averaged over positions.

    The factor keeps the size of the gradient where it is as ``T`` grows (Hinton, Vinyals, Dean 2015,
    arXiv:1503.02531, section 2).

    Args:
        student: Logits, ``[B, ..., C]`` or with the classes in ``class_dim``.
        teacher: Logits of the same shape.
        temperature: ``T``.
        mask: True where a position counts, of the shape of the first dimensions without the classes (``[B, T]``).
        class_dim: The dimension of the classes.

    Returns:
        A scalar, float32 (float64 for logits in float64); 0 if no position counts.

    Raises:
        DistillationError: If the shapes do not fit.
    """
    _check_shapes(student, teacher)
    student, teacher = _wide(student).movedim(class_dim, -1), _wide(teacher).movedim(class_dim, -1)
    if student.shape[-1] < 2:
        raise DistillationError(
            f"The output has the shape {tuple(student.shape)}: a softmax over one class says nothing. Use loss='mse'."
        )
    positions = None if mask is None else _spread(mask, student.shape[:-1])
    if positions is not None:  # not only left out of the sum: if padding gives NaN, so does 0 * NaN
        student = student.masked_fill(~positions.unsqueeze(-1), 0)
        teacher = teacher.masked_fill(~positions.unsqueeze(-1), 0)
    log_probability = F.log_softmax(student / temperature, dim=-1)
    target = F.softmax(teacher / temperature, dim=-1)
    terms = F.kl_div(log_probability, target, reduction="none")
    with torch.no_grad():  # of these terms the gradient is zero already, as the target is; so the mask is not kept
        # A class that the teacher rules out counts nothing, also where the student's logit is -inf: 0 * inf is NaN.
        terms.masked_fill_(target == 0, 0)
    return temperature**2 * _mean(terms.sum(-1), positions)


def relative_error(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the squared error over the power of the teacher: 0 for equal outputs, 1 for a student that gives 0.

    Args:
        student: ``[B, ...]``.
        teacher: The same shape.
        mask: True where a position counts, of the shape of the first dimensions (``[B, T]``).

    Raises:
        DistillationError: If the shapes do not fit.
    """
    _check_shapes(student, teacher)
    teacher = _wide(teacher)
    error = _wide(student) - teacher
    if mask is not None:
        positions = _spread(mask, error.shape)
        error, teacher = error.masked_fill(~positions, 0), teacher.masked_fill(~positions, 0)
    return error.square().sum() / teacher.square().sum().clamp(min=torch.finfo(teacher.dtype).tiny)


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise DistillationError(
            f"The student gives {tuple(student.shape)}, the teacher {tuple(teacher.shape)}. They must have the same "
            "classes (vocabulary) and positions: choose another teacher, or the parts that fit with output=."
        )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _spread(mask: Tensor, shape: torch.Size) -> Tensor:
    """Return ``mask``, which has the first dimensions of ``shape``, as a mask of that shape."""
    if mask.shape != shape[: mask.dim()]:
        raise DistillationError(
            f"The mask has the shape {tuple(mask.shape)}, but the positions of the output are {tuple(shape)}. Give "
            "mask=, a function of the batch that returns True where a position of the output counts, or None if all do."
        )
    return mask.bool().reshape(*mask.shape, *[1] * (len(shape) - mask.dim())).expand(shape)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.mean() if mask is None else values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


@dataclass(frozen=True)
class Objective:
    """What is compared, and how.

    Args:
        loss: ``"kl"`` for logits, see :func:`kl_divergence`; ``"mse"`` for any output, see :func:`relative_error`.
        temperature: Temperature of the softmax.
        output: Which part of the module's output is compared. Default: a tensor as it is, else ``logits``, or for
            ``"mse"`` ``last_hidden_state``.
        class_dim: Dimension of the classes. Default: the last, of outputs with at most three dimensions.
        mask: Returns which positions of a batch count, ``[B, T]``, or None if all do. Default: the attention mask.
        weight: Weight of the loss.
        hidden_weight: Weight of the mean :func:`relative_error` of layer outputs.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If it is out of range.
    """

    loss: str = "kl"
    temperature: float = 1.0
    output: OutputPart = None
    class_dim: int | None = None
    mask: Callable[[Any], Tensor | None] | None = None
    weight: float = 1.0
    hidden_weight: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self.loss, "loss", tuple(_USUAL_PARTS))
        check_positive(self.temperature, "temperature")
        check_weight(self.weight, "weight")
        check_weight(self.hidden_weight, "hidden_weight")
        if not (self.output is None or isinstance(self.output, (str, int)) or callable(self.output)):
            raise TypeError(f"output={self.output!r} must be a name, a position, or a function of the output.")
        if self.mask is not None and not callable(self.mask):
            raise TypeError(f"mask={self.mask!r} must be a function of the batch.")
        if self.class_dim is not None and (isinstance(self.class_dim, bool) or not isinstance(self.class_dim, int)):
            raise TypeError(f"class_dim={self.class_dim!r} must be the number of a dimension.")

    def select(self, output: Any, whose: str) -> Tensor:
        """Return the part that is compared of what a module gave.

        Args:
            output: The output.
            whose: ``"student"`` or ``"teacher"``, for the message.

        Raises:
            DistillationError: If there is no such part.
        """
        part = self._take(output)
        if not isinstance(part, Tensor) or not part.is_floating_point():
            names = ", ".join(map(str, output)) if isinstance(output, Mapping) else type(output).__name__
            wanted = " or ".join(_USUAL_PARTS[self.loss]) if self.output is None else repr(self.output)
            raise DistillationError(
                f"The {whose}'s output ({names}) has no {wanted} that is a tensor of floating-point numbers. Name the "
                "part with output= (a key, a position, or a function), or the module that gives it with module=."
            )
        return part

    def _take(self, output: Any) -> Any:
        if callable(self.output):
            return self.output(output)
        if isinstance(output, Tensor):
            return output
        if isinstance(self.output, int):
            is_there = isinstance(output, (tuple, list)) and -len(output) <= self.output < len(output)
            return output[self.output] if is_there else None
        names = _USUAL_PARTS[self.loss] if self.output is None else (self.output,)
        parts = [output.get(name) if isinstance(output, Mapping) else getattr(output, name, None) for name in names]
        return next((part for part in parts if part is not None), None)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the loss of selected parts, a scalar.

        Raises:
            DistillationError: If they do not fit.
        """
        if self.loss == "mse":
            return relative_error(student, teacher, mask)
        if self.class_dim is None and student.dim() > 3:
            raise DistillationError(
                f"Which dimension of {tuple(student.shape)} are the classes? Give class_dim (1 for a map of classes)."
            )
        class_dim = -1 if self.class_dim is None else self.class_dim
        return kl_divergence(student, teacher, self.temperature, mask, class_dim)


def check_weight(value: Any, name: str) -> None:
    """Check that the weight of a loss is a number from 0 on.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if value != 0:
        check_positive(value, name)
