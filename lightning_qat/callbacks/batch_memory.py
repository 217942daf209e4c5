"""Validation batches kept in memory, so that they are loaded and decoded once for many variants."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from typing_extensions import Self, override

from lightning_qat.callbacks.isolation import RandomStates


class BatchMemory:
    """What the loaders of a validation gave: filled by the first variant, read by all others.

    With each batch the random states are kept in which the loaders left them, so that whatever validation itself
    draws is the same for all variants, and the same as if each had loaded its own batches.

    Args:
        max_bytes: If the batches take more, none are kept.

    Attributes:
        is_complete: Whether all batches are here; to be set by who has seen the last.
        has_overflowed: Whether they took too much, or are of a kind that cannot be copied.
        length: Number of batches that the loaders announced, if they did.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.is_complete, self.has_overflowed = False, False
        self.length: int | None = None
        self._items: list[tuple[Any, RandomStates]] = []
        self._num_bytes = 0

    def begin(self, length: int | None) -> None:
        """Record from here on."""
        self.length, self._items, self._num_bytes = length, [], 0
        self.add(None)

    def add(self, item: Any) -> None:
        """Keep a copy of what the loaders gave."""
        if self.has_overflowed:
            return
        try:
            self._num_bytes += _num_bytes(item)
            copied = _copy(item)
        except Exception:  # objects have their own ways of refusing; what cannot be copied is loaded again
            self.has_overflowed = True
        else:
            self._items.append((copied, self._random_states()))
            self.has_overflowed = self._num_bytes > self.max_bytes
        if self.has_overflowed:
            self._items = []

    def _random_states(self) -> RandomStates:
        states = RandomStates.now()
        if self._items and self._items[-1][1].is_same(states):
            return self._items[-1][1]
        self._num_bytes += states.num_bytes
        return states

    def replay(self) -> Iterator[Any]:
        """Restore the random states of the beginning, and return copies of what was kept, each with its own."""
        (_, states), *items = self._items
        states.restore()
        return map(_recall, items)


def _recall(kept: tuple[Any, RandomStates]) -> Any:
    item, states = kept
    states.restore()
    return _copy(item)


def _copy(item: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf), item)


def _num_bytes(item: Any) -> int:
    """Return about how much memory a batch takes; what is no tensor counts as long as its pickle."""
    leaves = tree_leaves(item)
    return sum(leaf.nbytes if isinstance(leaf, Tensor) else len(pickle.dumps(leaf)) for leaf in leaves)


class RememberingLoader(CombinedLoader):
    """The same loaders, whose batches go into a memory, or come from it once that is complete.

    Args:
        combined: The loaders.
        memory: The memory.
    """

    def __init__(self, combined: CombinedLoader, memory: BatchMemory) -> None:
        vars(self).update(vars(combined))
        self._memory = memory
        self._replayed: Iterator[Any] | None = None

    @override
    def __iter__(self) -> Self:
        if self._memory.is_complete:
            self._replayed = self._memory.replay()
        else:
            super().__iter__()
            self._memory.begin(sized_len(self))
        return self

    @override
    def __next__(self) -> Any:
        if self._replayed is not None:
            return next(self._replayed)
        item = super().__next__()
        self._memory.add(item)
        return item

    @override
    def __len__(self) -> int:
        if self._replayed is None:
            return super().__len__()
        if self._memory.length is None:
            raise TypeError("The loaders have no length.")
        return self._memory.length
