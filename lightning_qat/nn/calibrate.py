"""Calibration: what the layers of a model see, gathered by hooks while batches pass through it."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.core import LayerStats
from lightning_qat.nn.accumulator import Accumulator, from_all_processes, is_distributed
from lightning_qat.nn.forward import call_forward, copy_batch, find_mask
from lightning_qat.nn.input_matrix import num_columns, num_groups, token_matrix

GIB = 2**30


def make_runner(
    root: nn.Module, batches: Sequence[Any], step: Callable[[Any], Any] | None = None
) -> Callable[[int], Any]:
    """Return what runs ``root`` on a copy of the batch of an index: the model may change its input in place.

    Args:
        root: The model.
        batches: The batches.
        step: Called with a batch; runs the model. Default: :func:`call_forward`.
    """
    run = step or functools.partial(call_forward, root)
    return lambda index: run(copy_batch(batches[index]))


class _Calls:
    """Which tensors each layer was fed in one batch, and how often these had been changed in place by then.

    Only weak references are kept: while a tensor lives, all references to it are one object, and another tensor
    gets another one, even at the same address.
    """

    def __init__(self) -> None:
        self._inputs: dict[str, list[tuple[weakref.ref[Tensor], int]]] = defaultdict(list)

    def add(self, name: str, x: Tensor) -> None:
        self._inputs[name].append((weakref.ref(x), 0 if x.is_inference() else x._version))

    def identity(self, name: str) -> tuple[tuple[int, int], ...]:
        return tuple((id(reference), version) for reference, version in self._inputs[name])


@dataclass(frozen=True)
class CalibrationPlan:
    """How the layers are calibrated.

    Attributes:
        passes: Layers of each pass over the batches, as lists of layers that share their input.
        num_bytes: Size of the largest pass's Hessians.
        kind: ``one-shot``, with the inputs of the float model, or ``sequential``, with those that the quantized
            layers before give.
        procedure: How the latter is done.
        num_batches: Number of calibration batches.
    """

    passes: tuple[tuple[tuple[str, ...], ...], ...]
    num_bytes: int
    kind: str = "one-shot"
    procedure: str = ""
    num_batches: int | None = None

    def __str__(self) -> str:
        """Describe the plan in one line."""
        inputs = sum(len(groups) for groups in self.passes)
        layers = sum(len(names) for groups in self.passes for names in groups)
        passes = "one pass" if len(self.passes) == 1 else f"{len(self.passes)} passes"
        if self.num_batches is not None:
            passes += f" over {self.num_batches} batch{'' if self.num_batches == 1 else 'es'}"
        size = f"Hessians of {self.num_bytes / GIB:.2f} GiB"
        kind = f"{self.kind} ({self.procedure})" if self.procedure else self.kind
        return f"{kind}: {layers} layers with {inputs} distinct inputs in {passes}, {size}"


class Calibrator:
    """Gathers statistics of layers in as few passes over the batches as the memory budget allows.

    Args:
        layers: The layers by name.
        batches: Calibration batches, which may be read several times.
        run: Runs the model on the batch of an index; see :func:`make_runner`.
        memory_budget: Bytes for Hessians.
        progress: Wraps an iterable of batches, to show a bar.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        batches: Sequence[Any],
        run: Callable[[int], Any],
        memory_budget: int = 4 * GIB,
        progress: Callable[[Sequence[Any], str], Iterator[Any]] | None = None,
    ) -> None:
        if not batches:
            raise ValueError("There are no calibration batches.")
        self.layers, self.batches, self.run = dict(layers), batches, run
        self.memory_budget = memory_budget
        self.progress = progress or (lambda batches, _: iter(batches))

    def plan(self) -> CalibrationPlan:
        """Run the first batch and decide which layers share a Hessian and which are calibrated together.

        With several processes, what the first one sees decides for all.
        """
        plan = [self._plan()]
        if is_distributed():
            torch.distributed.broadcast_object_list(plan, src=0)
        return plan[0]

    def _plan(self) -> CalibrationPlan:
        calls = _Calls()
        with self._hooks(calls.add):
            self.run(0)
        by_input: dict[Any, list[str]] = defaultdict(list)
        for name in self.layers:
            seen = calls.identity(name)
            by_input[(seen, self._layout(name)) if seen else name].append(name)
        return self.plan_passes([tuple(names) for names in by_input.values()])

    def plan_passes(self, groups: Sequence[tuple[str, ...]]) -> CalibrationPlan:
        """Return the plan for layers of which is known which share their input."""
        passes = self._pack(groups)
        most = max((sum(self._num_bytes(names[0]) for names in some) for some in passes), default=0)
        return CalibrationPlan(tuple(tuple(some) for some in passes), most, num_batches=len(self.batches))

    def _pack(self, groups: Sequence[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
        """Spread groups over as few passes as fit the budget: the largest first, each into the first that has room."""
        sizes = {names: self._num_bytes(names[0]) for names in groups}
        passes: list[list[tuple[str, ...]]] = []
        used: list[int] = []
        for names in sorted(groups, key=sizes.__getitem__, reverse=True):
            fits = [index for index, total in enumerate(used) if total + sizes[names] <= self.memory_budget]
            if not fits:
                passes.append([])
                used.append(0)
            index = fits[0] if fits else -1
            passes[index].append(names)
            used[index] += sizes[names]
        return passes

    def _layout(self, name: str) -> Any:
        module: Any = self.layers[name]
        keys = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        return tuple(getattr(module, key, None) for key in keys)

    def _num_bytes(self, name: str) -> int:
        module = self.layers[name]
        return 4 * num_groups(module) * num_columns(module) ** 2

    def collect(self, plan: CalibrationPlan) -> Iterator[tuple[list[str], dict[str, LayerStats]]]:
        """Yield the layers of each pass and their statistics, which are freed when the caller drops them.

        A layer that saw no token has no statistics.
        """
        for index, groups in enumerate(plan.passes):
            label = "Calibrating" if len(plan.passes) == 1 else f"Calibrating, pass {index + 1} of {len(plan.passes)}"
            accumulators, broken = self._one_pass(groups, label)
            yield self._finish(accumulators)
            del accumulators
            for some in self._pack([(name,) for names in broken for name in names]):
                accumulators, _ = self._one_pass(some, f"{label}, inputs that are not shared after all")
                yield self._finish(accumulators)
                del accumulators

    def _finish(self, accumulators: Iterable[Accumulator]) -> tuple[list[str], dict[str, LayerStats]]:
        stats: dict[str, LayerStats] = {}
        names: set[str] = set()
        broken: set[str] = set()
        for accumulator in accumulators:
            names.update(accumulator.names)
            found = accumulator.stats(self.layers[accumulator.names[0]])
            if found is not None and not torch.isfinite(found.hessian).all():
                broken.update(accumulator.names)
            elif found is not None:
                stats.update(dict.fromkeys(accumulator.names, found))
        if broken:
            first, *others = [name for name in self.layers if name in broken]
            more = f" (and of {len(others)} other layers)" if others else ""
            raise ValueError(
                f"During calibration, inputs of the layer '{first}'{more} were NaN or infinite. Look for such "
                "values in the calibration batches, or for an overflow before this layer."
            )
        return [name for name in self.layers if name in names], stats

    def _one_pass(
        self, groups: Sequence[tuple[str, ...]], label: str
    ) -> tuple[list[Accumulator], list[tuple[str, ...]]]:
        """Return the sums over all batches, and the groups left out since their layers do not share their input."""
        accumulators = {names: Accumulator(list(names)) for names in groups}
        leaders = {names[0]: accumulator for names, accumulator in accumulators.items()}
        shared = [names for names in groups if len(names) > 1]
        checked = {name for names in shared for name in names}
        broken: set[tuple[str, ...]] = set()
        for index in self.progress(range(len(self.batches)), label):
            calls, mask = _Calls(), find_mask(self.batches[index])

            def see(name: str, x: Tensor, calls: _Calls = calls, mask: Tensor | None = mask) -> None:
                if name in checked:
                    calls.add(name, x)
                if name in leaders:
                    leaders[name].add(token_matrix(self.layers[name], x, mask))

            with self._hooks(see, {name for names in groups for name in names}):
                self.run(index)
            broken.update(names for names in shared if len({calls.identity(name) for name in names}) > 1)
        left_out = set().union(*from_all_processes(broken))
        return [each for names, each in accumulators.items() if names not in left_out], sorted(left_out)

    def _hooks(self, see: Callable[[str, Tensor], None], names: set[str] | None = None) -> AbstractContextManager[None]:
        return watch_inputs({name: self.layers[name] for name in self.layers if names is None or name in names}, see)


@contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, x)`` for each input ``x`` that one of ``layers`` gets, without gradients.

    Raises:
        TypeError: If a layer is called with something else than a tensor.
    """

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor):
                raise TypeError(
                    f"The layer '{name}' was called with a {type(x).__name__}, not with a tensor: the model did "
                    "not get what its forward takes out of a calibration batch. Give batches of tensors, or say "
                    "how the model is called on a batch (step=..., or a method calibration_step of the module)."
                )
            see(name, x)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name, module in layers.items():
            handle = module.register_forward_pre_hook(make_hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
