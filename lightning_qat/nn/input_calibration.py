"""Calibration of static inputs: in training, on batches without a Trainer, or of a float model."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_qat.core import PASS_THROUGH_BITS, ActivationObserver
from lightning_qat.nn.accumulator import from_all_processes, is_distributed
from lightning_qat.nn.calibrate import make_runner, watch_inputs
from lightning_qat.nn.convert import static_inputs
from lightning_qat.nn.forward import drop_padding, evaluation_mode, find_mask
from lightning_qat.nn.input_matrix import CONVOLUTIONS
from lightning_qat.nn.plan import Plan
from lightning_qat.nn.static_input import InputStatistics, StaticInputFakeQuantize


def take_batch(quantizers: Mapping[str, StaticInputFakeQuantize]) -> None:
    """Let each quantizer take what all processes have seen since it last did, and find its grid anew.

    With several processes, all must call this for the same layers; the grids are then the same on all of them.

    Raises:
        ValueError: If inputs were NaN or infinite; layers are named.
    """
    batches = _from_all_processes([(each.config.observer, each.pending) for each in quantizers.values()])
    bad = []
    for (name, quantizer), batch in zip(quantizers.items(), batches, strict=True):
        try:
            quantizer.take(batch)
        except ValueError:
            bad.append(name)
    if bad:
        raise ValueError(_explain_values(bad))


def _from_all_processes(pending: Sequence[tuple[ActivationObserver, Tensor]]) -> list[Tensor]:
    if not is_distributed():
        return [seen for _, seen in pending]
    ranks = from_all_processes([seen.cpu() for _, seen in pending])  # in the order of their ranks, on every rank
    return [
        functools.reduce(observer.merge, [rank[index] for rank in ranks]).to(own.device)
        for index, (observer, own) in enumerate(pending)
    ]


def _explain_values(names: Sequence[str]) -> str:
    return (
        f"During calibration, inputs of {', '.join(names)} were NaN or infinite. Look for such values in the data, or "
        "for an overflow before these layers."
    )


def calibrate_inputs(
    root: nn.Module, batches: Iterable[Any], step: Callable[[Any], Any] | None = None
) -> dict[str, StaticInputFakeQuantize]:
    """Find the static grids of the inputs of a prepared ``root``, without a Trainer; they are found anew.

    The model runs in evaluation mode and as it is quantized, so that each layer is calibrated on what the layers
    before it give; on the first batch, inputs pass unchanged. With several processes, all must call this, each with
    batches of its own.

    Args:
        root: The model, as :func:`~lightning_qat.nn.prepare` left it, on the device of the batches.
        batches: Batches of training data.
        step: Called with each batch; runs the model. Default: ``root`` on the batch, by keywords if it is a mapping.

    Returns:
        The quantizers by the names of their layers.

    Raises:
        ValueError: If there are no batches, none reached some layer, or its inputs were NaN or infinite; layers are
            named. If the model has no static inputs, or they are at 16 bits.
    """
    batches, quantizers = list(batches), static_inputs(root)
    if not quantizers or any(each.num_bits == PASS_THROUGH_BITS for each in quantizers.values()):
        raise ValueError(
            "The model has no static inputs to calibrate, or is at 16 bits. Prepare it with a scheme such as "
            "'w8a8-static', and go to a width with set_num_bits(model, num_bits)."
        )
    for quantizer in quantizers.values():
        quantizer.reset(quantizer.seen.device)
    run = make_runner(root, batches, step)
    with evaluation_mode(root), torch.no_grad():
        for index in range(max(from_all_processes(len(batches)))):
            if index < len(batches):
                _observe(quantizers, batches[index], functools.partial(run, index))
            take_batch(quantizers)
    if unseen := [name for name, each in quantizers.items() if not each.is_calibrated]:
        raise ValueError(_explain_unseen(unseen))
    for quantizer in quantizers.values():
        quantizer.settle()
    return quantizers


def _observe(quantizers: Mapping[str, StaticInputFakeQuantize], batch: Any, run: Callable[[], Any]) -> None:
    for quantizer in quantizers.values():
        quantizer.observe(find_mask(batch))
    try:
        run()
    finally:
        for quantizer in quantizers.values():
            quantizer.stop_observing()


def _explain_unseen(names: Sequence[str]) -> str:
    return (
        f"No input but zeros reached {', '.join(names)} during calibration. Give more batches, ignore these layers, or "
        "give them a scheme with dynamic inputs (without '-static')."
    )


@torch.no_grad()
def observe_inputs(
    plan: Plan,
    observer: ActivationObserver,
    run: Callable[[int], Any],
    batches: Sequence[Any],
    unseen: Literal["error", "rtn"] = "error",
) -> Plan:
    """Return ``plan`` with what its layers with static inputs are fed by the float model.

    With several processes, all must call this, each with batches of its own.

    Args:
        plan: The layers, in float.
        observer: Who looks at their inputs.
        run: Runs the model on the batch of an index.
        batches: The batches; tokens that their ``attention_mask`` leaves out do not count.
        unseen: What to do with layers that nothing reached: raise, or leave their inputs in float.

    Raises:
        ValueError: If nothing reached a layer and ``unseen`` is ``"error"``, inputs were NaN or infinite, or there are
            no batches; layers are named.
    """
    layers = {layer.name: layer for layer in plan.layers if layer.has_static_input}
    if not layers:
        return plan
    seen = {name: observer.empty(layer.weight.device) for name, layer in layers.items()}
    for index in range(max(from_all_processes(len(batches)))):
        found = {name: observer.empty(each.device) for name, each in seen.items()}
        mask = find_mask(batches[index]) if index < len(batches) else None

        def see(name: str, x: Tensor, found: dict[str, Tensor] = found, mask: Tensor | None = mask) -> None:
            x = x if isinstance(layers[name].module, CONVOLUTIONS) else drop_padding(x, mask)
            if x.numel() > 0:
                found[name] = observer.merge(found[name], observer.collect(x))

        if index < len(batches):
            with watch_inputs({name: layer.module for name, layer in layers.items()}, see):
                run(index)
        everywhere = _from_all_processes([(observer, each) for each in found.values()])
        seen = {name: observer.update(seen[name], each) for name, each in zip(found, everywhere, strict=True)}
    reached = _check_seen(seen, unseen)
    return replace(
        plan,
        layers=tuple(
            replace(layer, input_statistics=InputStatistics(observer, seen[layer.name]))
            if layer.name in reached
            else layer
            for layer in plan.layers
        ),
    )


def _check_seen(seen: Mapping[str, Tensor], unseen: str) -> set[str]:
    """Return the layers that inputs have reached."""
    ranges = {name: each[:2].tolist() for name, each in seen.items()}
    idle = [name for name, (low, high) in ranges.items() if low > high]
    if idle and unseen == "error":
        raise ValueError(_explain_unseen(idle))
    if idle:
        warnings.warn(f"The inputs of {', '.join(idle)} stay in float: none was seen in calibration.", stacklevel=3)
    reached = {name: ends for name, ends in ranges.items() if name not in idle}
    if bad := [name for name, ends in reached.items() if not all(map(math.isfinite, ends))]:
        raise ValueError(_explain_values(bad))
    return set(reached)
