"""Who teaches: the float weights underneath the quantizers, a copy of them, another module, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_qat.nn.calls import Call, recorded_outputs
from lightning_qat.nn.distillation import DistillationError
from lightning_qat.nn.float_model import (
    cast_like,
    digest,
    float_copy,
    frozen_under_adapters,
    keeps_float_weights,
    quantizers_passing,
    weights_of,
)
from lightning_qat.nn.forward import evaluating

Taught = tuple[Any, dict[str, list[Any]]]
"""The teacher's output, and what its layers gave in each of their calls, by name."""

_NOT_KEPT = (
    "The weights that are their own teacher were frozen before, but train now or were changed. Keep a copy of them as "
    "the teacher: teacher='copy'."
)


class Teacher(Protocol):
    """Says what a call of the student should have given."""

    def teach(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any, hidden: list[str]) -> Taught:
        """Return the targets, without gradients.

        Args:
            call: The call of the student.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            batch: The batch of the step.
            hidden: Layers whose outputs are wanted.
        """
        ...

    def digest(self) -> str | None:
        """Return by what to tell whether it is still the same, or None if it has no weights."""
        ...

    def describe(self) -> str:
        """Return what it is, in a few words."""
        ...


class _Unchanged:
    """Notices when weights that must stay as they are change, or begin to train.

    Args:
        weights: Weights by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.digest = digest(weights)
        self._state = self._take_state()

    def check(self) -> None:
        """Look again.

        Raises:
            DistillationError: If one has changed, or trains.
        """
        if (state := self._take_state()) != self._state:
            # They may have been written without a change, as a schedule does that goes back to the rung before.
            if digest(self.weights) != self.digest or any(each.requires_grad for each in self.weights.values()):
                raise DistillationError(_NOT_KEPT)
            self._state = state

    def _take_state(self) -> list[tuple[bool, int]]:
        return [(weight.requires_grad, weight._version) for weight in self.weights.values()]


class OwnWeights:
    """The student is its own teacher: its weights, which do not train, without the quantizers.

    Args:
        student: A module for which :func:`~lightning_qat.nn.float_model.keeps_float_weights` holds.

    Raises:
        DistillationError: If it does not hold.
    """

    def __init__(self, student: nn.Module) -> None:
        if not keeps_float_weights(student):
            raise DistillationError(_NOT_KEPT)
        self.module = student
        self._weights = _Unchanged(weights_of(student))

    def teach(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any, hidden: list[str]) -> Taught:
        """Let the student compute once more, its quantizers passing what they get.

        Raises:
            DistillationError: If the weights train now, or were changed: the float model is lost.
        """
        self._weights.check()
        with quantizers_passing(self.module):
            return _run(self.module, call, args, kwargs, hidden)

    def digest(self) -> str:
        """Return the digest of the float model."""
        return self._weights.digest

    def describe(self) -> str:
        """Describe the teacher."""
        return "its own frozen weights without the quantizers"


class ModuleTeacher:
    """A module that is called with what the student is called with.

    Args:
        module: The module.
        dtype: What it is cast to, or None to leave it. Where the dtypes of student and teacher differ, inputs that are
            floating-point numbers are cast to that of the teacher.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.module = module if dtype is None else module.to(dtype)
        self._shared: dict[str, Tensor] = {}
        self._input_dtype: torch.dtype | None = None

    def teach(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any, hidden: list[str]) -> Taught:
        """Call the module."""
        return _run(self.module, self.module, args, kwargs, hidden, self._input_dtype)

    def suit(self, student: nn.Module, device: torch.device) -> None:
        """Go to ``device``, unless the module is spread over several, and note which dtype ``student`` computes in."""
        weights = list(self.module.parameters()) or weights_of(self.module).values()  # such as a table of logits
        if len({weight.device for weight in weights}) == 1:
            self.module.to(device)
        own = _dtype_of(self.module)
        self._input_dtype = None if own == _dtype_of(student) else own

    def digest(self) -> str:
        """Return the digest of the module."""
        return digest(weights_of(self.module))

    def describe(self) -> str:
        """Describe the teacher."""
        return f"the given {type(self.module).__name__} ({self._describe_size()})"

    def _describe_size(self) -> str:
        shared = set(self._shared.values())
        weights = [weight for weight in weights_of(self.module).values() if weight not in shared]
        dtypes = {str(weight.dtype).removeprefix("torch.") for weight in weights if weight.is_floating_point()}
        num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        return f"{', '.join(sorted(dtypes))}, {num_bytes / 2**20:.1f} MiB"


class CopyTeacher(ModuleTeacher):
    """A copy of the student without fake quantization.

    Args:
        student: The module.
        dtype: What the copy is cast to. Default: the dtypes of the student.
        share: Whether the copy of a student with adapters (LoRA) shares what is frozen underneath, unless it is cast.

    Raises:
        DistillationError: If the student cannot be copied.
    """

    def __init__(self, student: nn.Module, dtype: torch.dtype | None = None, share: bool = False) -> None:
        shared = frozen_under_adapters(student) if share and dtype is None else {}
        super().__init__(float_copy(student, list(shared.values())), dtype)
        self.dtype = dtype
        self._shared = shared
        self._kept: _Unchanged | None = None

    def teach(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any, hidden: list[str]) -> Taught:
        """Call the copy.

        Raises:
            DistillationError: If weights that it shares with the student train now, or were changed.
        """
        if self._kept is not None:
            self._kept.check()
        return super().teach(call, args, kwargs, batch, hidden)

    def suit(self, student: nn.Module, device: torch.device) -> None:
        """Go to ``device``, and take the dtypes that ``student`` has by now."""
        if self.dtype is None:
            cast_like(self.module, student)
        super().suit(student, device)

    def unshare(self, saved: Mapping[str, Tensor]) -> None:
        """Take weights for its own that it shares with the student, but that were others when ``saved`` was."""
        changed = [n for n, each in self._shared.items() if n in saved and not torch.equal(each, saved[n].to(each))]
        for name in changed:
            path, _, last = name.rpartition(".")
            own = nn.Parameter(self._shared.pop(name).detach().clone(), requires_grad=False)
            self.module.get_submodule(path)._parameters[last] = own

    def settle(self) -> None:
        """Note what the shared weights are, once a checkpoint is restored."""
        self._kept = _Unchanged(self._shared) if self._shared else None

    def describe(self) -> str:
        """Describe the teacher."""
        what = "the frozen weights with a copy of the adapters" if self._shared else "a copy of its weights"
        return f"{what} ({self._describe_size()}), float as this callback first found them"


class FunctionTeacher:
    """A function of the batch that returns the targets, such as logits that were computed before.

    Args:
        function: Called with the batch once for each step.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def teach(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any, hidden: list[str]) -> Taught:
        """Call the function."""
        with torch.no_grad():
            return self.function(batch), {}

    def digest(self) -> None:
        """Return None."""

    def describe(self) -> str:
        """Describe the teacher."""
        return f"what {getattr(self.function, '__name__', type(self.function).__name__)} returns for the batch"


def _run(
    root: nn.Module,
    call: Call,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    hidden: list[str],
    dtype: torch.dtype | None = None,
) -> Taught:
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not leaf.is_inference()]
    versions = [tensor._version for tensor in inputs]
    # A mapping of this call's own: a model may take entries out of the one that it is given.
    args, kwargs = tree_map(lambda leaf: _cast(leaf, dtype), (args, kwargs))
    with torch.no_grad(), evaluating(root), recorded_outputs(root, hidden) as outputs:
        output = call(*args, **kwargs)
    if versions != [tensor._version for tensor in inputs]:
        raise DistillationError(
            f"{type(root).__name__} changes its input in place, so student and teacher would not see the same. Let it "
            "compute on a copy (x = x + ..., not x += ...)."
        )
    return output, outputs


def _cast(leaf: Any, dtype: torch.dtype | None) -> Any:
    is_number = dtype is not None and isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if is_number else leaf


def _dtype_of(module: nn.Module) -> torch.dtype | None:
    return next((weight.dtype for weight in module.parameters() if weight.is_floating_point()), None)
