"""Pairwise covering arrays: few combinations in which every two values of two axes meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence

Combination = dict[str, str]


def covering_array(
    axes: Mapping[str, Sequence[str]], allowed: Callable[[Combination], bool], tries: int = 60
) -> list[Combination]:
    """Return combinations of one value for each axis that have all allowed pairs, by a greedy choice.

    Args:
        axes: Values of every axis; the first is the default.
        allowed: Whether a combination, of all axes or of some, can be.
        tries: Random candidates for every combination that is chosen.

    Raises:
        ValueError: If an allowed pair is in no allowed combination.
    """
    source = random.Random(0)
    pairs = {
        frozenset([(a, x), (b, y)])
        for a, b in itertools.combinations(axes, 2)
        for x in axes[a]
        for y in axes[b]
        if allowed({a: x, b: y})
    }
    chosen: list[Combination] = []
    while pairs:
        seed = min(pairs, key=lambda pair: sorted(pair))
        candidates = [_complete(dict(seed), axes, allowed, pairs, source) for _ in range(tries)]
        best = max((each for each in candidates if each), key=lambda each: len(_pairs(each) & pairs), default=None)
        if best is None:
            raise ValueError(f"No combination has {dict(seed)}.")
        chosen.append({axis: best[axis] for axis in axes})
        pairs -= _pairs(best)
    return chosen


def _complete(
    start: Combination,
    axes: Mapping[str, Sequence[str]],
    allowed: Callable[[Combination], bool],
    pairs: set[frozenset[tuple[str, str]]],
    source: random.Random,
) -> Combination | None:
    """Return a combination that begins with ``start``, each axis in turn with the value that covers most."""
    found = dict(start)
    rest = [axis for axis in axes if axis not in found]
    source.shuffle(rest)
    for axis in rest:
        values = [value for value in axes[axis] if allowed({**found, axis: value})]
        if not values:
            return None
        source.shuffle(values)
        gains = {value: len(_pairs({**found, axis: value}) & pairs) for value in values}
        found[axis] = max(values, key=gains.__getitem__)
    return found


def _pairs(combination: Combination) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in itertools.combinations(combination.items(), 2)}
