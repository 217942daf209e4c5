"""A copy of a module without its weights, to try on what may fail."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def meta_copy(module: nn.Module) -> nn.Module | None:
    """Return a copy of ``module`` with parameters and buffers on the meta device, or None if it cannot be copied."""
    memo: dict[int, Any] = {}
    try:
        for parameter in module.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for buffer in module.buffers():
            memo[id(buffer)] = buffer.detach().to("meta")
        return copy.deepcopy(module, memo)
    except Exception:  # whatever its own ways to be copied raise
        return None
