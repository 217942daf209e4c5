"""What is quantized only if a rule names it: output heads, and parts of the model that do not train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_qat.nn.adapters import is_adapted_model
from lightning_qat.nn.annealed_grid import AnnealedGrid

OUTPUT_HEAD_NAMES = ("lm_head", "embed_out")


def frozen_parts(root: nn.Module) -> set[str]:
    """Return the parts of the model of whose parameters none trains, unless nothing trains at all.

    The parts are the children of ``root``, or of the innermost module that holds all parameters. What adapters (PEFT)
    are trained in is one part, though most of it is frozen.
    """
    prefix, whole = "", root
    while len(holders := _parameter_holders(whole)) == 1 and not (whole._parameters or is_adapted_model(whole)):
        prefix, whole = f"{prefix}{next(iter(holders))}.", next(iter(holders.values()))
    if is_adapted_model(whole):
        return set()
    trains = {name: any(p.requires_grad for p in _float_parameters(child)) for name, child in holders.items()}
    own_trains = any(p is not None and p.requires_grad for p in whole._parameters.values())
    if not own_trains and not any(trains.values()):
        return set()
    return {prefix + name for name, is_trained in trains.items() if not is_trained}


def _parameter_holders(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if any(True for _ in _float_parameters(child))}


def _float_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Yield all parameters but those of grids: one of those does not make its layer one that trains."""
    for child in module.modules():
        if not isinstance(child, AnnealedGrid):
            yield from child.parameters(recurse=False)


def output_heads(names: Mapping[nn.Module, list[str]]) -> set[nn.Module]:
    """Return what turns hidden states into logits over a vocabulary."""
    heads = {module for module, aliases in names.items() if aliases[0].rpartition(".")[2] in OUTPUT_HEAD_NAMES}
    embedded = {module._parameters.get("weight") for module in names if isinstance(module, nn.Embedding)}
    heads |= {m for m in names if isinstance(m, nn.Linear) and m._parameters.get("weight") in embedded}
    for module in names:
        get_head = getattr(module, "get_output_embeddings", None)
        head = get_head() if callable(get_head) else None
        if isinstance(head, nn.Module):
            heads.add(head)
    return heads
