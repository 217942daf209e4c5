"""Keeps random numbers as they are: what runs inside draws from the same states and leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_qat.nn import static_inputs


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The global random states of a moment: of torch, Python, NumPy, and all CUDA devices."""

    of_torch: Tensor
    of_python: Any
    of_numpy: Any
    of_accelerators: list[Tensor]

    @classmethod
    def now(cls) -> RandomStates:
        """Return the states as they are."""
        accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(torch.get_rng_state(), random.getstate(), np.random.get_state(), accelerators)

    def restore(self) -> None:
        """Put them back."""
        torch.set_rng_state(self.of_torch)
        random.setstate(self.of_python)
        np.random.set_state(self.of_numpy)
        if self.of_accelerators:
            torch.cuda.set_rng_state_all(self.of_accelerators)

    def is_same(self, other: RandomStates) -> bool:
        """Return whether the states are equal."""
        ours, theirs = ([each.of_torch, *each.of_accelerators] for each in (self, other))
        return (
            all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            and self.of_python == other.of_python
            and self.of_numpy[2:] == other.of_numpy[2:]
            and bool((self.of_numpy[1] == other.of_numpy[1]).all())
        )

    @property
    def num_bytes(self) -> int:
        """About how much memory they take."""
        tensors = [self.of_torch, *self.of_accelerators]
        return sum(tensor.nbytes for tensor in tensors) + int(self.of_numpy[1].nbytes) + 36 * len(self.of_python[1])


@contextmanager
def aside(root: nn.Module) -> Iterator[None]:
    """Run what is no part of training: without gradients, a trace in random numbers, or the observers of inputs."""
    observing = [quantizer for quantizer in static_inputs(root).values() if quantizer.is_observing]
    for quantizer in observing:
        quantizer.is_observing = False
    try:
        with torch.inference_mode(False), torch.no_grad(), isolate_randomness([]):
            yield
    finally:
        for quantizer in observing:
            quantizer.is_observing = True


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
    everywhere = RandomStates.now()
    try:
        yield
    finally:
        everywhere.restore()
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
