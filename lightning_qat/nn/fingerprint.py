"""A number by which to tell whether tensors are equal to the bit, without keeping them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

_CHUNK = 2**20
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_AS_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(thing: Any) -> tuple[Any, ...] | None:
    """Return what is equal for equal things, and differs for others but by a chance of about 1 in 2**60.

    Args:
        thing: Tensors and plain values, in containers that PyTorch knows.

    Returns:
        The fingerprint, or None if there is something else in it.
    """
    leaves, structure = tree_flatten(thing)
    if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
        return None
    return (structure, *[_of_tensor(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


@torch.no_grad()
def _of_tensor(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape, dtype, and a sum of the bits, weighted by their position, modulo 2**64."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    bits = values.detach().contiguous().flatten().view(_AS_INTEGERS[values.element_size()])
    weights = torch.arange(min(_CHUNK, len(bits)), device=bits.device)
    weights = (weights * 0x1E3779B97F4A7C15) | 1
    total = 0
    for chunk in torch.split(bits, _CHUNK):
        total = (31 * total + int((chunk.long() * weights[: len(chunk)]).sum())) % 2**64
    return (tensor.shape, tensor.dtype, total)
