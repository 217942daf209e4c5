"""The float model underneath the quantizers: running it, copying it, and telling whether it is still the same."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.nn.adapters import is_adapter_layer
from lightning_qat.nn.annealed_grid import AnnealedGrid
from lightning_qat.nn.calls import holds_compiled, unwrap
from lightning_qat.nn.convert import restore_float
from lightning_qat.nn.distillation import DistillationError
from lightning_qat.nn.fingerprint import fingerprint


@contextmanager
def quantizers_passing(root: nn.Module) -> Iterator[None]:
    """Let every quantizer in ``root`` return what it is given, and neither observe nor count anything."""
    with ExitStack() as stack:
        for module in root.modules():
            if isinstance(module, AnnealedGrid):
                stack.enter_context(_forward_replaced(module))
        yield


@contextmanager
def _forward_replaced(module: nn.Module) -> Iterator[None]:
    own = vars(module)
    previous = own.get("forward")
    own["forward"] = _return_as_is
    try:
        yield
    finally:
        if previous is None:
            del own["forward"]
        else:
            own["forward"] = previous


def _return_as_is(tensor: Tensor) -> Tensor:
    return tensor


def weights_of(root: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers of ``root`` by name, without those of quantizers.

    A module and its copy without fake quantization have the same names.
    """
    weights: dict[str, Tensor] = {}
    for prefix, module in root.named_modules():
        if isinstance(module, AnnealedGrid):
            continue
        persistent = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        own = {**module._parameters, **persistent}
        weights.update({f"{prefix}.{name}".lstrip("."): w for name, w in own.items() if w is not None})
    return weights


def digest(weights: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits by which to tell whether weights are the same to the bit.

    A single integer, as a buffer that counts calls, is left out: it moves while a model teaches.
    """
    parts = [(name, fingerprint(weight)) for name, weight in sorted(weights.items()) if not _is_count(weight)]
    text = ";".join(f"{name}={[str(part) for part in found[1:]] if found else None}" for name, found in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_count(weight: Tensor) -> bool:
    return weight.numel() == 1 and not (weight.is_floating_point() or weight.is_complex())


def keeps_float_weights(student: nn.Module) -> bool:
    """Return whether ``student`` stays the float model underneath its quantizers while it trains.

    So it is if nothing in it trains but scales, and it has no buffer in its state that could move, such as statistics
    of BatchNorm or a count of calls. What is compiled does not count: its quantizers cannot be told to pass without
    compiling anew.
    """
    if holds_compiled(student):
        return False
    weights = weights_of(student).values()
    return all(isinstance(weight, nn.Parameter) and not weight.requires_grad for weight in weights)


def frozen_under_adapters(student: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that do not train, by name, if the student trains by adapters (PEFT); else none.

    Elsewhere parameters are frozen for a while, too, and train later.
    """
    student = unwrap(student)
    if not any(is_adapter_layer(module) for module in student.modules()):
        return {}
    own = weights_of(student)
    return {name: each for name, each in own.items() if isinstance(each, nn.Parameter) and not each.requires_grad}


def float_copy(student: nn.Module, shared: Sequence[Tensor] = ()) -> nn.Module:
    """Return a copy of ``student`` without fake quantization, that does not train, in evaluation mode, not compiled.

    Args:
        student: The module.
        shared: Weights that the copy shares with it.

    Raises:
        DistillationError: If there is nothing to copy, or it cannot be copied.
    """
    student = unwrap(student)
    if any(weight.is_meta for weight in student.parameters()):
        raise DistillationError("The weights are on the meta device. Materialise them in configure_model.")
    kept = [value for module in student.modules() for value in vars(module).values() if _is_intermediate(value)]
    try:
        memo = {id(tensor): tensor.detach().clone() for tensor in kept} | {id(tensor): tensor for tensor in shared}
        twin = copy.deepcopy(student, memo)
    except (TypeError, RuntimeError) as error:
        raise DistillationError(
            f"The teacher would be a copy of {type(student).__name__}, which cannot be copied: {error}. Give a module "
            "with the float weights: teacher=..."
        ) from error
    restore_float(twin)
    return twin.eval().requires_grad_(False)


def _is_intermediate(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_leaf


@torch.no_grad()
def copy_weights(source: Mapping[str, Tensor], target: nn.Module) -> None:
    """Give ``target`` the values of ``source``, in its own dtypes.

    Args:
        source: Weights by name, as :func:`weights_of` names them.
        target: The module.

    Raises:
        DistillationError: If names or shapes differ.
    """
    own = weights_of(target)
    if {name: weight.shape for name, weight in own.items()} != {name: weight.shape for name, weight in source.items()}:
        raise DistillationError("The teacher in the checkpoint is of another model. Build the model as it was then.")
    for name, weight in own.items():
        weight.copy_(source[name])


def cast_like(module: nn.Module, other: nn.Module) -> None:
    """Give parameters and buffers of ``module`` the dtypes of those of ``other`` that have their names."""
    other = unwrap(other)
    dtypes = {name: tensor.dtype for name, tensor in (*other.named_parameters(), *other.named_buffers())}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
