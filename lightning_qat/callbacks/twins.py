"""Lightning under its two names: ``lightning.pytorch`` and ``pytorch_lightning`` have classes of their own."""

from __future__ import annotations

import sys
from typing import TypeVar

import lightning.pytorch as pl
from torch import nn

T = TypeVar("T")

_NAMES = (("lightning.pytorch", "pytorch_lightning"), ("lightning.fabric", "lightning_fabric"))


def either(*classes: type[T]) -> tuple[type[T], ...]:
    """Return ``classes``, of ``lightning``, and their twins of ``pytorch_lightning``, if that is imported."""
    twins = (_find_twin(each) for each in classes)
    return (*classes, *(twin for twin in twins if twin is not None))


def _find_twin(original: type[T]) -> type[T] | None:
    for name, other in _NAMES:
        if original.__module__.startswith(name):
            module = sys.modules.get(other + original.__module__.removeprefix(name))
            return getattr(module, original.__name__, None)
    return None


def overrides(pl_module: pl.LightningModule, method: str) -> bool:
    """Return whether the class of a module has a method of its own, and not the one that all have."""
    inherited = (getattr(base, method, None) for base in (*either(pl.LightningModule), nn.Module))
    return getattr(type(pl_module), method) not in inherited
