"""Running a model up to one of its units, again and again, while the units before it change.

Units that are done need not be computed again: they return what they returned before. Everything outside the
units is computed as ever, by the model's own code, so that masks, positions and whatever else is handed around
need not be understood. That is only done for a model on which it has been shown to give the same to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_qat.nn.accumulator import from_all_processes
from lightning_qat.nn.fingerprint import fingerprint


@dataclass
class _Trace:
    """One forward pass.

    Attributes:
        order: A unit for each of its calls.
        strays: Units with a layer that ran outside of them.
        seen: Fingerprints of what the layers of each unit were fed, and of what the unit returned.
        blanks: What each unit returned, without the values.
        live: Units whose output was still alive when a unit began.
    """

    order: list[int] = field(default_factory=list)
    strays: set[int] = field(default_factory=set)
    seen: dict[int, list[Any]] = field(default_factory=dict)
    blanks: dict[int, Any] = field(default_factory=dict)
    live: dict[int, set[int]] = field(default_factory=dict)


class _Stop(BaseException):
    """Ends a forward pass where nothing further is needed; no Exception, which a model may catch."""


class StagedForward:
    """Runs a model on batches up to one unit after the other.

    Args:
        units: The units by name, none within another.
        layers: The layers in them, by name.
        run: Runs the model on the batch of an index.
        num_batches: Number of batches.

    Attributes:
        stages: Names of the layers of each unit, in the order in which units first run; one that never does is
            left out.
        obstacle: Why units that are done have to be computed again, if that is known. Until :meth:`try_replay` has
            succeeded, they are.
    """

    def __init__(
        self,
        units: Mapping[str, nn.Module],
        layers: Mapping[str, nn.Module],
        run: Callable[[int], Any],
        num_batches: int,
    ) -> None:
        self.names, self.units, self.run, self.num_batches = list(units), list(units.values()), run, num_batches
        homes = {layer: unit for unit, module in reversed([*enumerate(self.units)]) for layer in module.modules()}
        self._homes = {layer: homes[layer] for layer in layers.values()}
        self._traces = [self._trace(index) for index in range(num_batches)]
        orders = [order for rank in from_all_processes([trace.order for trace in self._traces]) for order in rank]
        strays = set().union(*from_all_processes(set().union(*(trace.strays for trace in self._traces))))
        self._stages = list(dict.fromkeys(unit for order in orders for unit in order))
        self.stages = [
            tuple(name for name, layer in layers.items() if self._homes[layer] == unit) for unit in self._stages
        ]
        self.obstacle = self._describe_calls(orders, bool(strays))
        self._is_replaying = False
        self._needed: list[set[int]] = []
        self._outputs: dict[tuple[int, int], Any] = {}

    def _describe_calls(self, orders: list[list[int]], has_strays: bool) -> str | None:
        if has_strays or not all(sorted(order) == sorted(self._stages) for order in orders):
            return "some of its parts run several times, or not for every batch"
        if any(order != self._stages for order in orders):
            return "its parts run in another order for other batches"
        return None

    # ------------------------------------------------------------------------------------------------ one pass

    def run_to(self, stage: int, index: int) -> None:
        """Run the model on a batch, with replay until the unit of ``stage`` is through, otherwise to its end.

        Stages must come in order, each with all batches before the next; see :meth:`finish`.
        """

        def stop(*_: Any) -> None:
            raise _Stop

        with ExitStack() as stack, torch.no_grad():
            if self._is_replaying:
                self._skip_what_is_done(stack, stage, index)
                stack.callback(self.units[self._stages[stage]].register_forward_hook(stop).remove)
            with suppress(_Stop):
                self.run(index)

    def finish(self, stage: int) -> None:
        """Forget outputs that neither the next stage needs, nor the unit of this one to be computed once more."""
        needed = set().union(*self._needed[stage : stage + 2])
        self._outputs = {key: output for key, output in self._outputs.items() if key[0] in needed}

    def reset(self) -> None:
        """Forget all outputs: the weights are others."""
        self._outputs.clear()

    def _skip_what_is_done(self, stack: ExitStack, stage: int, index: int) -> None:
        for unit in self._stages[:stage]:
            key = (unit, index)
            if key in self._outputs:
                stack.enter_context(_returning(self.units[unit], self._outputs[key]))
            elif unit not in self._needed[stage]:
                blank = self._traces[index].blanks[unit]
                stack.enter_context(_returning(self.units[unit], tree_map_only(_Blank, _Blank.fill, blank)))
            else:

                def keep(_: nn.Module, __: Any, output: Any, key: tuple[int, int] = key) -> None:
                    self._outputs[key] = tree_map_only(Tensor, torch.clone, output)

                stack.callback(self.units[unit].register_forward_hook(keep).remove)

    # -------------------------------------------------------------------------------------------------- replay

    def try_replay(self, memory_budget: int) -> None:
        """Let units that are done return what they returned before, if that gives the same to the bit.

        Tried with all batches, with the weights of the passes that were made first: the layers of every unit must
        be fed, and it must return, what they were and it did then. All outputs are kept if they fit the budget;
        otherwise those of the unit before and those that were still alive in a whole pass, all others being NaN.

        Args:
            memory_budget: Bytes for outputs.
        """
        if self.obstacle is not None:
            return
        if max(from_all_processes(self._num_bytes())) <= memory_budget:
            self._needed = [set(self._stages[:stage]) for stage in range(len(self._stages))]
        else:
            live = [set().union(*(trace.live[unit] for trace in self._traces)) for unit in self._stages]
            self._needed = [each | set(self._stages[max(stage - 1, 0) : stage]) for stage, each in enumerate(live)]
        self._is_replaying = True
        self.obstacle = next(filter(None, from_all_processes(self._find_difference())), None)
        self._is_replaying = self.obstacle is None
        self.reset()

    def _num_bytes(self) -> int:
        leaves = [leaf for trace in self._traces for leaf in tree_leaves(trace.blanks)]
        return sum(leaf.shape.numel() * leaf.dtype.itemsize for leaf in leaves if isinstance(leaf, _Blank))

    def _find_difference(self) -> str | None:
        """Return where the replay of all batches differs from the passes that were made first, if it does."""
        for stage, unit in enumerate(self._stages):
            for index, trace in enumerate(self._traces):
                if None in trace.seen[unit]:
                    return f"'{self.names[unit]}' returns other objects than tensors"
                replayed = _Trace()
                try:
                    with self._watching(replayed):
                        self.run_to(stage, index)
                except Exception as error:  # whatever a model's own code makes of outputs that are not there
                    return f"'{self.names[unit]}' fails without the parts before it ({type(error).__name__}: {error})"
                if replayed.seen.get(unit) != trace.seen[unit]:
                    return f"'{self.names[unit]}' is not reproduced to the bit without the parts before it"
            self.finish(stage)
        return None

    def _trace(self, index: int) -> _Trace:
        trace = _Trace()
        with self._watching(trace):
            self.run(index)
        return trace

    @contextmanager
    def _watching(self, trace: _Trace) -> Iterator[None]:
        """Take down what the units do in one forward pass."""
        running = [-1]
        alive: dict[int, list[weakref.ref[Tensor]]] = {}

        def begin(unit: int) -> None:
            running.append(unit)
            trace.order.append(unit)
            trace.seen.setdefault(unit, [])
            trace.live[unit] = {each for each, tensors in alive.items() if any(ref() is not None for ref in tensors)}

        def feed(unit: int, *inputs: Any) -> None:
            if running[-1] == unit:
                trace.seen[unit].append(fingerprint([each for each in tree_leaves(inputs) if isinstance(each, Tensor)]))
            else:
                trace.strays.add(unit)

        def end(unit: int, output: Any) -> None:
            running.pop()
            alive[unit] = [weakref.ref(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            trace.seen[unit].append(fingerprint(output) if alive[unit] else None)
            trace.blanks[unit] = tree_map_only(Tensor, _blank, output) if trace.seen[unit][-1] is not None else None

        with ExitStack() as stack, torch.no_grad():
            for unit, module in enumerate(self.units):
                before = module.register_forward_pre_hook(lambda *_, unit=unit: begin(unit))
                after = module.register_forward_hook(lambda _, __, output, unit=unit: end(unit, output))
                stack.callback(before.remove)
                stack.callback(after.remove)
            for layer, unit in self._homes.items():

                def see(_: nn.Module, args: Any, kwargs: Any, unit: int = unit) -> None:
                    feed(unit, args, kwargs)

                stack.callback(layer.register_forward_pre_hook(see, with_kwargs=True).remove)
            yield


@dataclass(frozen=True)
class _Blank:
    """Shape, dtype and device of an output that nothing should need."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def fill(self) -> Tensor:
        value = torch.nan if self.dtype.is_floating_point or self.dtype.is_complex else 0
        return torch.full(self.shape, value, dtype=self.dtype, device=self.device)


def _blank(tensor: Tensor) -> _Blank:
    return _Blank(tensor.shape, tensor.dtype, tensor.device)


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Let ``module`` return copies of ``output`` without computing anything."""
    before = vars(module).get("forward")
    module.forward = lambda *_, **__: tree_map_only(Tensor, torch.clone, output)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
