"""Sums over the tokens that layers see, over all processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_qat.core import LayerStats
from lightning_qat.core.precision import full_float32
from lightning_qat.nn.input_matrix import columns_per_channel, num_columns, num_groups

ThingT = TypeVar("ThingT")


@dataclass
class Accumulator:
    """Sums for the layers of ``names``, which are always fed the same tensors."""

    names: list[str]
    hessian: Tensor | None = None
    abs_sum: Tensor | None = None
    num_tokens: int = 0

    def add(self, tokens: Tensor) -> None:
        """Add tokens ``[K, N, I]``; in full float32 also where the model runs under autocast or in TF32."""
        with torch.autocast(tokens.device.type, enabled=False), full_float32():
            if self.hessian is None or self.abs_sum is None:
                self.hessian, self.abs_sum = tokens.mT @ tokens, tokens.abs().sum(1)
            else:
                self.hessian.baddbmm_(tokens.mT, tokens)
                self.abs_sum.add_(tokens.abs().sum(1))
        self.num_tokens += tokens.shape[1]

    def stats(self, module: nn.Module) -> LayerStats | None:
        """Return what was gathered by all processes; None if no token was seen."""
        self._reduce(module)
        if self.hessian is None or self.abs_sum is None or self.num_tokens == 0:
            return None
        return LayerStats(self.hessian, self.abs_sum / self.num_tokens, self.num_tokens, columns_per_channel(module))

    def _reduce(self, module: nn.Module) -> None:
        if not is_distributed():
            return
        num_tokens = torch.tensor(float(self.num_tokens), device=_device(module))
        torch.distributed.all_reduce(num_tokens)
        self.num_tokens = int(num_tokens.item())
        if self.num_tokens == 0:
            return
        groups, in_features = num_groups(module), num_columns(module)
        if self.hessian is None or self.abs_sum is None:  # another process has seen tokens
            self.hessian = torch.zeros(groups, in_features, in_features, device=_device(module))
            self.abs_sum = torch.zeros(groups, in_features, device=_device(module))
        torch.distributed.all_reduce(self.hessian)
        torch.distributed.all_reduce(self.abs_sum)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def is_distributed() -> bool:
    """Return whether there are several processes."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def from_all_processes(thing: ThingT) -> list[ThingT]:
    """Return what each process has, in the order of their ranks."""
    if not is_distributed():
        return [thing]
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, thing)
    return everywhere
