"""The state of a model and of its optimizers at the end of a rung, to go back to."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_qat.nn.annealed_grid import named_grids


class RungMemory:
    """Keeps what a run needs to go on from the end of a rung as if the next one had not been.

    Kept are parameters, buffers, quantizers and the state of optimizers (not their learning rates), in CPU memory.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] = {}

    @torch.no_grad()
    def keep(self, root: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Keep the state as it is now, in place of what was kept before."""
        tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}
        grids = {name: quantizer.get_extra_state() for name, quantizer in named_grids(root).items()}
        self._kept = {
            "tensors": _to_cpu(tensors),
            "grids": _to_cpu(grids),
            "optimizers": [_to_cpu(optimizer.state_dict()["state"]) for optimizer in optimizers],
        }

    @torch.no_grad()
    def bring_back(self, root: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Restore what was kept, and forget it."""
        kept, self._kept = self._kept, {}
        if not kept:
            return
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            tensor.copy_(kept["tensors"][name])
        for name, quantizer in named_grids(root).items():
            quantizer.set_extra_state(kept["grids"][name])
        for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for parameter in root.parameters():
            parameter.grad = None  # of the weights that are gone

    def drop(self) -> None:
        """Forget what was kept."""
        self._kept = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was kept."""
        return self._kept

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._kept = dict(state)


def _to_cpu(value: Any) -> Any:
    """Return a copy of nested containers that shares no memory with ``value``, its tensors on the CPU."""
    return tree_map(_leaf_to_cpu, value)


def _leaf_to_cpu(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)
