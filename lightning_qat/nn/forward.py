"""Running a model on a batch whose layout it alone knows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Let ``root`` compute as in evaluation: nothing is drawn, no statistics move, and all tokens are returned."""
    modes = [(module, module.training) for module in root.modules()]
    nested = [module for module in root.modules() if getattr(module, "use_nested_tensor", False)]
    try:
        for module, _ in modes:
            module.training = False
        for module in nested:
            module.use_nested_tensor = False  # type: ignore[assignment]
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in nested:
            module.use_nested_tensor = True  # type: ignore[assignment]


@contextmanager
def evaluation_mode(root: nn.Module) -> Iterator[None]:
    """Put ``root`` into evaluation mode, and afterwards each of its modules back into its own.

    Buffers, which a forward pass may change, get back what they were. Encoders pass no nested tensors meanwhile:
    their tokens could not be told apart.
    """
    buffers = [(buffer, buffer.clone()) for buffer in root.buffers()]
    try:
        with evaluating(root):
            root.eval()  # modules may have an own way to evaluation mode
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def call_forward(root: nn.Module, batch: Any) -> Any:
    """Call ``root`` on what its ``forward`` takes from a batch.

    Of a mapping it takes the entries that are its parameters, of a sequence as many entries as it has
    parameters without a default (all if it has ``*args``), anything else as it is.
    """
    parameters = inspect.signature(root.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    if isinstance(batch, Mapping):
        takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        taken = {key: value for key, value in batch.items() if takes_all or key in parameters}
        return root(**taken) if taken else root(batch)
    if isinstance(batch, (tuple, list)):
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            return root(*batch)
        optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        num_required = sum(p.default is p.empty and p.kind not in optional for p in parameters.values())
        return root(*batch[: max(num_required, 1)])
    return root(batch)


def copy_batch(batch: Any) -> Any:
    """Return a deep copy, in which a tensor that occurs twice is still one, and a view has no more than it shows."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return copy.deepcopy(batch, {id(tensor): _clone(tensor) for tensor in tensors})


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def find_mask(batch: Any) -> Tensor | None:
    """Return the attention mask of a batch, ``[B, T]``, True where a token counts."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def drop_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the tokens of ``x`` that count, ``[N, I]``, or ``x`` itself if the mask is not one of its tokens.

    Args:
        x: Input of a Linear, ``[B, T, I]`` or ``[B * T, I]``.
        mask: True where a token counts, ``[B, T]``, or None.
    """
    if mask is None or x.shape[:-1] not in (mask.shape, (mask.numel(),)):
        return x
    return x.reshape(-1, x.shape[-1])[mask.flatten().to(x.device)]
