"""The parts of a model that sequential calibration quantizes one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set

from torch import nn


def find_units(root: nn.Module, layers: Set[nn.Module]) -> list[nn.Module]:
    """Return modules that together hold all ``layers``, and never one within another.

    A unit is a block, or a layer outside all blocks. Blocks are children of a ``ModuleList``, ``ModuleDict`` or
    ``Sequential`` that holds several of the same class, such as the layers of a transformer; only the outermost
    ones count, so that the experts of a block are parts of it.

    Args:
        root: The model.
        layers: The layers to quantize.
    """
    if root in layers:
        return [root]
    units: dict[nn.Module, None] = {}
    _walk(root, layers, units)
    inner = {module for unit in units for module in unit.modules() if module is not unit}
    return [unit for unit in units if unit not in inner]


def _walk(module: nn.Module, layers: Set[nn.Module], units: dict[nn.Module, None]) -> None:
    blocks = _blocks(module, layers)
    for child in module.children():
        if child in layers or child in blocks:
            units[child] = None
        elif _holds(child, layers):
            _walk(child, layers, units)


def _blocks(container: nn.Module, layers: Set[nn.Module]) -> set[nn.Module]:
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    if not isinstance(container, containers):
        return set()
    candidates = [
        child
        for child in container.children()
        if child not in layers and not isinstance(child, containers) and _holds(child, layers)
    ]
    numbers = Counter(type(child) for child in candidates)
    return {child for child in candidates if numbers[type(child)] > 1}


def _holds(module: nn.Module, layers: Set[nn.Module]) -> bool:
    return any(each in layers for each in module.modules())
