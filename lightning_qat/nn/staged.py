"""Running a model up to one of its units, again and again, while the units before it change.

Units that are done need not be computed again: they return what they returned before. Everything outside the
units is computed as ever, by the model's own code, so that masks, positions and whatever else is handed around
need not be understood. That is only done for a model on which it has been shown to give the same to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_qat.nn.accumulator import from_all_processes


@dataclass
class _Trace:
    """One forward pass: which units ran in which order, and what they gave.

    Attributes:
        order: A unit for each of its calls.
        strays: Units with a layer that ran outside of them.
        outputs: What each unit returned.
        live: Units whose output was still alive when a unit began.
    """

    order: list[int] = field(default_factory=list)
    strays: set[int] = field(default_factory=set)
    outputs: dict[int, Any] = field(default_factory=dict)
    live: dict[int, set[int]] = field(default_factory=dict)


class _Stop(Exception):
    """Ends a forward pass where nothing further is needed."""


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
        obstacle: Why units that are done have to be computed again, or None. Until :meth:`try_replay` has
            succeeded, they are.
    """

    def __init__(
        self,
        units: Mapping[str, nn.Module],
        layers: Mapping[str, nn.Module],
        run: Callable[[int], Any],
        num_batches: int,
    ) -> None:
        self.names, self.units, self.run = list(units), list(units.values()), run
        self._tried = sorted({0, num_batches - 1})
        self._homes = {layer: self._find_home(layer) for layer in layers.values()}
        traces = [self._trace(index, _blank) for index in range(num_batches)]
        self._blanks = {(unit, index): out for index, trace in enumerate(traces) for unit, out in trace.outputs.items()}
        orders = [order for rank in from_all_processes([trace.order for trace in traces]) for order in rank]
        strays = set().union(*from_all_processes(set().union(*(trace.strays for trace in traces))))
        self._stages = list(dict.fromkeys(unit for order in orders for unit in order))
        self.stages = [
            tuple(name for name, layer in layers.items() if self._homes[layer] == unit) for unit in self._stages
        ]
        self._can_stop = not strays and all(sorted(order) == sorted(self._stages) for order in orders)
        self._is_steady = self._can_stop and all(order == self._stages for order in orders)
        self._live = [set().union(*(trace.live.get(unit, ()) for trace in traces)) for unit in self._stages]
        self._needed: list[set[int]] = []
        self.obstacle: str | None = "it has not been tried"
        self._outputs: dict[tuple[int, int], Any] = {}

    def _find_home(self, layer: nn.Module) -> int:
        return next(unit for unit, module in enumerate(self.units) if layer in module.modules())

    # ------------------------------------------------------------------------------------------------ one pass

    def run_to(self, stage: int, index: int) -> Any:
        """Run the model on a batch until the unit of ``stage`` is through, and return what that gave.

        Stages must come in order, each with all batches before the next; see :meth:`finish`. Without replay, a
        model whose units run several times is run to its end.
        """
        unit, returned = self._stages[stage], []

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            returned.append(output)
            if self._can_stop:
                raise _Stop

        with ExitStack() as stack, torch.no_grad():
            if self.obstacle is None:
                self._skip_what_is_done(stack, stage, index)
            stack.callback(self.units[unit].register_forward_hook(leave).remove)
            with suppress(_Stop):
                self.run(index)
        return returned[-1] if returned else None

    def finish(self, stage: int) -> None:
        """Forget outputs that no later stage needs."""
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
                stack.enter_context(_returning(self.units[unit], tree_map_only(_Blank, _Blank.fill, self._blanks[key])))
            else:

                def keep(_: nn.Module, __: Any, output: Any, key: tuple[int, int] = key) -> None:
                    self._outputs[key] = tree_map_only(Tensor, torch.clone, output)

                stack.callback(self.units[unit].register_forward_hook(keep).remove)

    # -------------------------------------------------------------------------------------------------- replay

    def try_replay(self, changes: Iterable[Callable[[], None]], memory_budget: int) -> None:
        """Let units that are done return what they returned before, if that gives the same to the bit.

        Tried with the first batch and the last, and with several sets of weights: what a unit hands on other than by
        its output would be that of another batch, or of the weights before. First with the outputs of the unit
        before, and those that were still alive in a whole forward pass, all others being NaN; then with all outputs.

        Args:
            changes: Each puts other weights into the model; the first is called again after the last.
            memory_budget: Bytes for all outputs of all batches.
        """
        if not self._is_steady:
            self.obstacle = self._describe_calls()
            return
        changes = list(changes)
        expected = [self._outputs_after(change) for change in changes]
        some = [live | set(self._stages[max(stage - 1, 0) : stage]) for stage, live in enumerate(self._live)]
        self._try(changes, expected, some)
        if self.obstacle is not None and max(from_all_processes(self._num_bytes())) <= memory_budget:
            self._try(changes, expected, [set(self._stages[:stage]) for stage in range(len(self._stages))])

    def _try(
        self,
        changes: Sequence[Callable[[], None]],
        expected: Sequence[Mapping[int, Mapping[int, Any]]],
        needed: list[set[int]],
    ) -> None:
        self.obstacle, self._needed = None, needed
        obstacles = [self._compare(change, outputs) for change, outputs in zip(changes, expected, strict=True)]
        mine = next(filter(None, obstacles), None)
        self.obstacle = next(filter(None, from_all_processes(mine)), None)
        self.reset()

    def _num_bytes(self) -> int:
        blanks = [leaf for output in self._blanks.values() for leaf in tree_leaves(output) if isinstance(leaf, _Blank)]
        return sum(blank.shape.numel() * blank.dtype.itemsize for blank in blanks)

    def _outputs_after(self, change: Callable[[], None]) -> dict[int, dict[int, Any]]:
        change()
        return {index: self._trace(index, torch.clone).outputs for index in self._tried}

    def _compare(self, change: Callable[[], None], expected: Mapping[int, Mapping[int, Any]]) -> str | None:
        """Return which unit's output is not reproduced after ``change``, if one is not."""
        change()
        self.reset()
        for stage, unit in enumerate(self._stages):
            for index in self._tried:
                try:
                    is_same = _is_same(self.run_to(stage, index), expected[index][unit])
                except Exception as error:  # whatever a model's own code makes of outputs that are not there
                    return f"'{self.names[unit]}' fails without the units before it ({type(error).__name__}: {error})"
                if not is_same:
                    return f"'{self.names[unit]}' depends on the units before it by more than their outputs"
            self.finish(stage)
        return None

    def _describe_calls(self) -> str:
        if self._can_stop:
            return "its parts run in another order for other batches"
        return "some of its parts run several times, or not for every batch"

    def _trace(self, index: int, keep: Callable[[Tensor], Any]) -> _Trace:
        """Run the model on a batch and take down what its units do; ``keep`` says what is kept of their outputs."""
        trace, running = _Trace(), [-1]
        alive: dict[int, list[weakref.ref[Tensor]]] = {}

        def begin(unit: int) -> None:
            running.append(unit)
            trace.order.append(unit)
            trace.live[unit] = {each for each, tensors in alive.items() if any(ref() is not None for ref in tensors)}

        def end(unit: int, output: Any) -> None:
            running.pop()
            alive[unit] = [weakref.ref(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            trace.outputs[unit] = tree_map_only(Tensor, keep, output)

        def see(unit: int) -> None:
            if running[-1] != unit:
                trace.strays.add(unit)

        with ExitStack() as stack, torch.no_grad():
            for unit, module in enumerate(self.units):
                before = module.register_forward_pre_hook(lambda *_, unit=unit: begin(unit))
                after = module.register_forward_hook(lambda _, __, output, unit=unit: end(unit, output))
                stack.callback(before.remove)
                stack.callback(after.remove)
            for layer, unit in self._homes.items():
                stack.callback(layer.register_forward_pre_hook(lambda *_, unit=unit: see(unit)).remove)
            self.run(index)
        return trace


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


def _is_same(first: Any, second: Any) -> bool:
    """Return whether all tensors are equal to the bit, and there are some."""
    tensors: list[tuple[Any, Any]] = [
        (a, b) for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True) if isinstance(b, Tensor)
    ]
    return bool(tensors) and all(torch.equal(a, b) for a, b in tensors)
