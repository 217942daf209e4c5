"""Watching the calls of a module without changing it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_qat.nn.forward import find_mask

Call = Callable[..., Any]


@contextmanager
def around_calls(module: nn.Module, wrapper: Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Let ``wrapper(call, args, kwargs)`` run in place of each call of ``module``; ``call`` is the original.

    It sits where ``Module.compile`` puts the compiled call, outside of hooks and of whatever is compiled: a hook would
    be traced, and compiled anew in every step.
    """
    own = vars(module)
    compiled = own.get("_compiled_call_impl")
    call = compiled or module._call_impl
    own["_compiled_call_impl"] = lambda *args, **kwargs: wrapper(call, args, kwargs)
    try:
        yield
    finally:
        if compiled is None:
            del own["_compiled_call_impl"]
        else:
            own["_compiled_call_impl"] = compiled


@contextmanager
def recorded_outputs(root: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Any]]]:
    """Collect what the submodules ``names`` of ``root`` give, in the order of their calls."""
    outputs: dict[str, list[Any]] = {name: [] for name in names}
    handles = [
        root.get_submodule(name).register_forward_hook(functools.partial(_record, found))
        for name, found in outputs.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _record(found: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    """Keep the first tensor: blocks of transformers return their hidden states first."""
    found.append(next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None))


def attention_mask(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: Any) -> Tensor | None:
    """Return the mask of the positions that a call of ``module`` gives, ``[B, T]``, True where one counts.

    It is taken from the arguments, by name, position, or within one of them, else from the batch. That of an
    encoder-decoder is the one of its decoder.
    """
    named = _bind(module, args, kwargs)
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        named = {"attention_mask": named.get("decoder_attention_mask")}
        return find_mask(named)
    for candidate in (named, *args, batch):
        if (mask := find_mask(candidate)) is not None:
            return mask
    return None


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):  # a forward that tells nothing about its parameters
        return dict(kwargs)
    return {**bound.arguments, **kwargs}


def unwrap(module: nn.Module) -> nn.Module:
    """Return what ``torch.compile`` has wrapped, or the module itself."""
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


def is_compiled(module: nn.Module) -> bool:
    """Return whether the call of ``module`` itself is compiled."""
    marks = ("_compiled_call_impl", "_orig_mod", "_compiler_ctx")  # of Module.compile, torch.compile, Lightning
    return any(getattr(module, mark, None) is not None for mark in marks)


def holds_compiled(root: nn.Module) -> bool:
    """Return whether something in ``root`` is compiled, or ``root`` itself."""
    return any(is_compiled(module) for module in root.modules())
