"""Temporary patches: code around a hook of the LightningModule, scales in a group of their own, out of clipping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_qat.callbacks.errors import QATConfigurationError

_PREVIOUS = "_lightning_qat_previous"


def run_around(module: nn.Module, hook: str, wrapper: Callable[[Callable[..., Any]], Any]) -> None:
    """Let ``wrapper(call)`` run in place of the next call of ``module.hook``; ``call()`` is the original.

    The patch lives in the instance and takes itself out first, since a module that holds a closure can be
    neither pickled nor deep-copied.
    """
    original, previous = getattr(module, hook), vars(module).get(hook)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        remove_patch(module, hook)
        return wrapper(functools.partial(original, *args, **kwargs))

    patched.__dict__[_PREVIOUS] = previous
    vars(module)[hook] = patched


def remove_patch(module: nn.Module, hook: str) -> None:
    """Take patches of :func:`run_around` out, if they are still there; what others put there stays."""
    while _PREVIOUS in getattr(vars(module).get(hook), "__dict__", {}):
        previous = vars(module)[hook].__dict__[_PREVIOUS]
        if previous is None:
            del vars(module)[hook]
        else:
            vars(module)[hook] = previous


@contextmanager
def hidden_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this context, ``parameters`` have no gradients."""
    kept = [(parameter, parameter.grad) for parameter in parameters]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def separate_param_group(parameters: set[nn.Parameter], lr: float | None) -> Iterator[None]:
    """Within this context, optimizers put ``parameters`` into groups of their own, without weight decay.

    Every group that holds some of them is split in two as it is added. Adding a group later would break
    learning rate schedulers, which count the groups when they are made.

    Args:
        parameters: The parameters to separate.
        lr: Their learning rate, or None for that of the group that they come from.

    Raises:
        QATConfigurationError: If an optimizer or scheduler made within it raised a ValueError, as they do when
            the number of groups does not suit them.
    """
    add_param_group = Optimizer.add_param_group

    def add_split(optimizer: Optimizer, group: dict[str, Any]) -> None:
        if isinstance(group["params"], set):  # refused by torch: it has no order
            add_param_group(optimizer, group)
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        separate = [member for member in members if _parameter(member) in parameters]
        rest = [member for member in members if _parameter(member) not in parameters]
        if rest or not separate:
            add_param_group(optimizer, {**group, "params": rest})
        if separate:
            no_decay = {"weight_decay": 0.0} if "weight_decay" in optimizer.defaults else {}
            own_lr = {} if lr is None else {"lr": lr}
            add_param_group(optimizer, {**group, "params": separate, **own_lr, **no_decay})

    Optimizer.add_param_group = add_split  # type: ignore[method-assign, assignment]
    try:
        yield
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise QATConfigurationError(
            f"configure_optimizers failed: {reason}. With scale_lr, each parameter group with learned scales is "
            "followed by one of their own: an optimizer must allow several groups, and the lists that schedulers take "
            "must have an entry more for each. Or leave scale_lr out."
        ) from error
    finally:
        Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]


def _parameter(member: Any) -> Any:
    """Return the parameter of a group member, which may be a (name, parameter) pair."""
    return member[1] if isinstance(member, tuple) else member
