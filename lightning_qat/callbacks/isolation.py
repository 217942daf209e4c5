"""Keeps random numbers as they are: what runs inside draws from the same states and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextmanager
def isolate_randomness(loaders: Iterable[Any]) -> Iterator[None]:
    """Restore the global random states, and those of all generators and stateful loaders among ``loaders``.

    Generators are looked for in a loader, its samplers and its dataset, in their attributes and containers. The
    states are restored after an exception, too.

    Args:
        loaders: Data loaders that are iterated inside.
    """
    found: dict[int, Any] = {}
    for loader in loaders:
        _find(loader, found, depth=5)
        if callable(getattr(loader, "state_dict", None)) and hasattr(loader, "load_state_dict"):
            found[id(loader)] = loader
    states = [(each, _get_state(each)) for each in found.values()]
    everywhere = (torch.get_rng_state(), random.getstate(), np.random.get_state())
    accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_rng_state(everywhere[0])
        random.setstate(everywhere[1])
        np.random.set_state(everywhere[2])
        if accelerators:
            torch.cuda.set_rng_state_all(accelerators)
        for each, state in states:
            _set_state(each, state)


def _find(thing: Any, found: dict[int, Any], depth: int) -> None:
    if isinstance(thing, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
        found[id(thing)] = thing
    if depth > 0:
        for member in _members(thing):
            _find(member, found, depth - 1)


def _members(thing: Any) -> list[Any]:
    if isinstance(thing, dict):
        members = list(thing.values())
    elif isinstance(thing, (list, tuple, set)):
        members = list(thing)
    else:
        return list(vars(thing).values()) if hasattr(thing, "__dict__") and not isinstance(thing, type) else []
    return [] if members and isinstance(members[0], (str, bytes, int, float, Tensor)) else members  # data, not parts


def _get_state(thing: Any) -> Any:
    if isinstance(thing, np.random.Generator):
        return thing.bit_generator.state
    if isinstance(thing, random.Random):
        return thing.getstate()
    return thing.get_state() if hasattr(thing, "get_state") else thing.state_dict()


def _set_state(thing: Any, state: Any) -> None:
    if isinstance(thing, np.random.Generator):
        thing.bit_generator.state = state
    elif isinstance(thing, random.Random):
        thing.setstate(state)
    elif hasattr(thing, "set_state"):
        thing.set_state(state)
    else:
        thing.load_state_dict(state)
