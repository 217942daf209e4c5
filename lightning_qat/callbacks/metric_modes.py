"""Whether a metric is better if smaller or larger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_qat.core.checks import check_choice

MODES = ("min", "max")


class MetricModes:
    """The directions of metrics, as given, as they say of themselves, or else ``min``.

    A name stands for its values on all loaders, and for its value over an epoch.

    Args:
        given: ``min`` or ``max`` for all metrics, a mapping from names to these, or None.

    Raises:
        ValueError: If it is something else.
    """

    def __init__(self, given: str | Mapping[str, str] | None) -> None:
        for mode in given.values() if isinstance(given, Mapping) else () if given is None else (given,):
            check_choice(mode, "mode", MODES)
        self._given = given

    def given(self, metric: str) -> str | None:
        """Return what was given for a metric, or None."""
        return _look_up(self._given, metric) if isinstance(self._given, Mapping) else self._given

    def all(self, metrics: Iterable[str], known: Mapping[str, str]) -> dict[str, str]:
        """Return the directions of ``metrics``; ``known`` holds what metrics say of themselves."""
        return {metric: self.given(metric) or _look_up(known, metric) or "min" for metric in metrics}

    def warn_of_unknown(self, metrics: Iterable[str]) -> None:
        """Warn if a name was given that none of the ``metrics`` has."""
        logged = list(metrics)
        known = {name for metric in logged for name in _names_of(metric)}
        if isinstance(self._given, Mapping) and (unknown := sorted(set(self._given) - known)):
            rank_zero_warn(f"PTQCallback's mode names {', '.join(unknown)}, but validation logs {', '.join(logged)}.")


def _look_up(modes: Mapping[str, Any], metric: str) -> Any:
    return next((modes[name] for name in _names_of(metric) if name in modes), None)


def _names_of(metric: str) -> list[str]:
    """Return the names by which a metric may be called: as it is, without its loader, and without ``_epoch``."""
    plain = metric.partition("/dataloader_idx_")[0]
    return [metric, plain, plain.removesuffix("_epoch")]
