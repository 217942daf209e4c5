"""Validation batches kept in memory, so that they are loaded and decoded once for many variants."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import Self, override

from lightning_qat.callbacks.isolation import RandomStates
from lightning_qat.nn.forward import copy_batch


class BatchMemory:
    """What the loaders of a validation gave: filled by the first variant, read by all others.

    Where loading has drawn random numbers, the states in which it left them are kept, too, so that what validation
    itself draws is what it would be if each variant had loaded its own batches.

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
        self._items: list[tuple[Any, RandomStates | None]] = []
        self._num_bytes = 0

    def begin(self, before: RandomStates, length: int | None) -> None:
        """Record from here on; ``before`` are the random states before the loaders began."""
        self.length, self._items, self._num_bytes = length, [], 0
        self.add(None, before)

    def add(self, item: Any, before: RandomStates) -> None:
        """Keep a copy of what the loaders gave; ``before`` are the random states before they did."""
        if self.has_overflowed:
            return
        now = RandomStates.now()
        states = None if now.is_same(before) else now
        try:
            self._num_bytes += _num_bytes(item) + (0 if states is None else states.num_bytes)
            self.has_overflowed = self._num_bytes > self.max_bytes
            if not self.has_overflowed:
                self._items.append((copy_batch(item), states))
        except Exception:  # objects have their own ways of refusing; what cannot be copied is loaded again
            self.has_overflowed = True
        if self.has_overflowed:
            self._items = []

    def replay(self) -> Iterator[Any]:
        """Return copies of what was kept, random states being changed as loading did."""
        first, *items = self._items
        _recall(first)
        return map(_recall, items)


def _recall(kept: tuple[Any, RandomStates | None]) -> Any:
    item, states = kept
    if states is not None:
        states.restore()
    return copy_batch(item)


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
            before = RandomStates.now()
            super().__iter__()
            self._memory.begin(before, sized_len(self))
        return self

    @override
    def __next__(self) -> Any:
        if self._replayed is not None:
            return next(self._replayed)
        if self._memory.has_overflowed:
            return super().__next__()
        before = RandomStates.now()
        item = super().__next__()
        self._memory.add(item, before)
        return item

    @override
    def __len__(self) -> int:
        if self._replayed is None:
            return super().__len__()
        if self._memory.length is None:
            raise TypeError("The loaders have no length.")
        return self._memory.length
