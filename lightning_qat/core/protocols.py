"""The architecture on one page: what an observer, an estimator, a schedule, a PTQ method and an exporter are.

To add one, write one file in its folder (``observers/``, ``estimators/``, ``schedules/``, ``ptq/``, ``exporters/``) and
one line in that folder's registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_qat.core.grid import QuantizedWeight, QuantParams
from lightning_qat.core.scheme import Levels, QuantScheme
from lightning_qat.core.stats import LayerStats


@runtime_checkable
class Observer(Protocol):
    """Chooses the grid for a weight: where a range comes from.

    ``every_forward`` says that a call is cheap enough to follow the weight in every forward pass; the
    others are called when a rung begins and every ``refresh_every_n_steps`` optimizer steps.
    """

    @property
    def every_forward(self) -> bool: ...  # noqa: D102

    @property
    def refresh_every_n_steps(self) -> int: ...  # noqa: D102

    def __call__(
        self, weight: Tensor, scheme: QuantScheme, levels: Levels | None = None, importance: Tensor | None = None
    ) -> QuantParams:
        """Return scales and zero-points for ``weight`` ``[O, I]``.

        Args:
            weight: The weight, ``[O, I]``.
            scheme: Granularity, symmetry and scale rule.
            levels: Levels in place of the scheme's own, on a rung of a schedule.
            importance: Weight of each input feature in the error, ``[I]`` or ``[O, I]``; observers that search
                for the least error use it.
        """
        ...


@runtime_checkable
class ActivationObserver(Protocol):
    """Chooses one grid for the inputs of a layer, which it sees batch by batch.

    What it has seen is a float32 tensor of a fixed shape, which begins with the smallest and the largest value
    (``inf`` and ``-inf``: none yet); the observer itself remembers nothing.
    """

    def empty(self, device: torch.device | None = None) -> Tensor:
        """Return what is known before anything was seen."""
        ...

    def collect(self, x: Tensor) -> Tensor:
        """Return what is to be known of one input ``x``, of any shape and floating dtype, but not empty."""
        ...

    def merge(self, first: Tensor, second: Tensor) -> Tensor:
        """Return what is known of inputs of the same batch: of several calls, or on several processes."""
        ...

    def update(self, seen: Tensor, batch: Tensor) -> Tensor:
        """Return what is known of all batches after one more."""
        ...

    def __call__(self, seen: Tensor, scheme: QuantScheme, levels: Levels | None = None) -> QuantParams:
        """Return scale and zero-point, ``[1, 1]``.

        Args:
            seen: What was seen.
            scheme: Granularity ``"tensor"``, symmetry and scale rule.
            levels: Levels in place of the scheme's own, on a rung of a schedule.
        """
        ...


@runtime_checkable
class GradientEstimator(Protocol):
    """Rounds, and decides how a gradient passes the rounding."""

    def __call__(self, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Return the whole number nearest to ``x`` in ``[low, high]``, half to even."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """Says how many bits a run has at each optimizer step.

    Most look at the step alone; their base class :class:`~lightning_qat.schedules.open_loop.OpenLoop` has all but
    ``final_bits``, ``is_fractional`` and ``rungs``. The others look at a metric at the end of each validation, too.

    ``final_bits`` is the width of the last rung, ``is_fractional`` says that positions are shares of the run, whose
    length must then be known, and ``monitor`` is the name of the metric, or None.
    """

    @property
    def final_bits(self) -> float: ...  # noqa: D102

    @property
    def is_fractional(self) -> bool: ...  # noqa: D102

    @property
    def monitor(self) -> str | None: ...  # noqa: D102

    def rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]]:
        """Return (first optimizer step, bits) of each rung, in order.

        Of a schedule that looks at a metric they are those that there were, and those that there will be at the
        latest; after an ``update`` they may be others, but from its ``step`` on only.

        Args:
            start: Step at which fake quantization starts.
            total_steps: Optimizer steps of the run, or None if it has no known end.
        """
        ...

    def activation_rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]] | None:
        """Return the rungs of the inputs, or None if these have the rungs of the weights."""
        ...

    def update(self, metrics: Mapping[str, float], step: int, start: int, total_steps: int | None) -> str | None:
        """Take note of validation metrics.

        Args:
            metrics: The metrics by name; ``monitor`` is among them.
            step: The next optimizer step, the first that can have another width.
            start: As in :meth:`rungs`.
            total_steps: As in :meth:`rungs`.

        Returns:
            What was decided, in words, or None.
        """
        ...

    def may_go_back(self, step: int, start: int, total_steps: int | None) -> bool:
        """Return whether the rung of ``step`` may yet be left for the one before it, whose end is then kept."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as primitives."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        ...


@runtime_checkable
class PTQMethod(Protocol):
    """Quantizes one weight after training, at several widths at once.

    ``needs_stats`` says that it must know the layer's inputs.
    """

    @property
    def needs_stats(self) -> bool: ...  # noqa: D102

    def __call__(
        self, weight: Tensor, schemes: Sequence[QuantScheme], observer: Observer, stats: LayerStats | None = None
    ) -> list[QuantizedWeight]:
        """Return the quantized form of ``weight`` for each scheme.

        Args:
            weight: The weight, ``[O, I]``.
            schemes: Schemes that differ in width alone.
            observer: The observer of the layer, which training would use.
            stats: What calibration gathered about the layer's inputs.
        """
        ...


@runtime_checkable
class Exporter(Protocol):
    """Writes a quantized model to a folder, and reads it back.

    ``name`` is what the manifest calls the format; ``holds_codes`` says that it stores codes and not floats.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def holds_codes(self) -> bool: ...  # noqa: D102

    def explain(self, scheme: QuantScheme) -> str | None:
        """Return why the format cannot hold a scheme, or None."""
        ...

    def stored_bits(self, weight: QuantizedWeight) -> float:
        """Return the bits that a file has for a weight, scales and zero-points included."""
        ...

    def write(self, weights: Mapping[str, QuantizedWeight], rest: Mapping[str, Tensor], folder: Path) -> None:
        """Write a model.

        Args:
            weights: Quantized weights by the name of their layer; of layers that share one, each has it.
            rest: The state of the model in float without those weights, or with them, dequantized, if the format
                does not hold codes.
            folder: An empty folder.
        """
        ...

    def read(self, folder: Path) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
        """Return what :meth:`write` was given."""
        ...
