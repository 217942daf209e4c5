"""Weights that are spread over processes (FSDP2)."""

from __future__ import annotations

from torch import Tensor


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that is spread over processes, which all must call this; others as they are."""
    gather = getattr(tensor, "full_tensor", None)  # of DTensor, whose import costs what most runs need not pay
    whole: Tensor = tensor if gather is None else gather()
    return whole


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")
