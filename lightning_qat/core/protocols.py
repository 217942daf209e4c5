"""The architecture on one page: what an observer, an estimator, a schedule and a PTQ method are.

Each is a small object that is called. To add one, write one file in its folder (``observers/``,
``estimators/``, ``schedules/``, ``ptq/``) and one line in that folder's registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

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
class GradientEstimator(Protocol):
    """Rounds, and decides how a gradient passes the rounding."""

    def __call__(self, x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """Return the whole number nearest to ``x`` in ``[low, high]``, half to even."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """Says how many bits a run has at each optimizer step.

    ``final_bits`` is the width of the last rung and ``is_fractional`` says that positions are shares of the
    run, whose length must then be known.
    """

    @property
    def final_bits(self) -> float: ...  # noqa: D102

    @property
    def is_fractional(self) -> bool: ...  # noqa: D102

    def rungs(self, start: int, total_steps: int | None) -> list[tuple[int, float]]:
        """Return (first optimizer step, bits) of each rung that is reached, in order.

        Args:
            start: Step at which fake quantization starts.
            total_steps: Optimizer steps of the run, or None if it has no known end.
        """
        ...

    def update(self, metrics: Mapping[str, float]) -> None:
        """Take note of validation metrics; schedules that only look at the step ignore them."""
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
