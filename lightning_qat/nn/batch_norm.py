"""Running statistics of batch normalization, computed anew for the weights as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.nn.forward import evaluation_mode

_STATISTICS = ("running_mean", "running_var")


def batch_norms(root: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch normalization layers of ``root`` that keep running statistics, by name.

    Synchronized and lazy ones are among them; instance normalization is not, nor is a layer with
    ``track_running_stats=False``, which has none.
    """
    norms = {name: module for name, module in root.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.track_running_stats and norm.running_mean is not None}


@torch.no_grad()
def reestimate(
    root: nn.Module,
    norms: Sequence[_BatchNorm],
    run: Callable[[int], object],
    num_batches: int,
    average: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Replace the running statistics of ``norms`` by their averages over batches.

    Mean and (unbiased) variance of every batch count the same, as with ``BatchNorm(momentum=None)``. The layers
    normalize each batch by its own statistics meanwhile, as in training; the rest of the model is in evaluation mode.
    Nothing else changes: not the modes, the number of batches tracked, nor any other buffer. What the statistics were
    does not matter, so that they recover from NaN; but a layer that is not called keeps them.

    Source: Nagel et al. 2022 (arXiv:2203.11086), section 2.3.1.

    Args:
        root: The model.
        norms: The layers.
        run: Runs the model on the batch of an index.
        num_batches: How many batches there are.
        average: Averages a tensor over processes.
    """
    momenta = [norm.momentum for norm in norms]
    before = [[_statistic(norm, name) for name in _STATISTICS] for norm in norms]
    found: list[list[Tensor]] = []
    with evaluation_mode(root):  # which puts the buffers back, too
        try:
            for norm in norms:
                norm.training, norm.momentum = True, None
                norm.reset_running_stats()  # or NaN would stay: the average begins with 0 times what was there
            for index in range(num_batches):
                run(index)
            for norm, own in zip(norms, before, strict=True):
                is_called = _counter(norm) > 0
                counted = (_statistic(norm, name) for name in _STATISTICS)
                found.append([torch.where(is_called, new, old) for new, old in zip(counted, own, strict=True)])
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    for norm, statistics in zip(norms, found, strict=True):
        for name, value in zip(_STATISTICS, statistics, strict=True):
            norm.get_buffer(name).copy_(value if average is None else average(value))


def _counter(norm: _BatchNorm) -> Tensor:
    assert norm.num_batches_tracked is not None
    return norm.num_batches_tracked


def _statistic(norm: _BatchNorm, name: str) -> Tensor:
    return norm.get_buffer(name).clone()
