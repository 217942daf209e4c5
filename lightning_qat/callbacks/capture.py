"""Training batches, kept for calibration."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class BatchCapture:
    """Copies the first batches of training to the CPU until they hold enough samples.

    Loaders are never iterated for calibration: that would change what training sees.

    Args:
        num_samples: Samples to keep, rounded up to whole batches.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.batches: list[Any] = []
        self._captured = 0

    @property
    def is_full(self) -> bool:
        """Whether there are enough samples."""
        return self._captured >= self.num_samples

    def add(self, batch: Any) -> None:
        """Keep a copy of ``batch`` unless there are enough."""
        if not self.is_full:
            self.batches.append(apply_to_collection(batch, Tensor, lambda tensor: tensor.detach().cpu().clone()))
            self._captured += _num_samples(batch)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the batches, or None if a checkpoint of plain tensors could not hold them."""
        return {"batches": self.batches, "captured": self._captured} if _is_plain(self.batches) else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.batches, self._captured = state["batches"], state["captured"]


def _is_plain(thing: Any) -> bool:
    if type(thing) is dict:
        return all(_is_plain(each) for pair in thing.items() for each in pair)
    if type(thing) in (list, tuple):
        return all(map(_is_plain, thing))
    return thing is None or type(thing) in (Tensor, bool, int, float, str)


def _num_samples(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except (MisconfigurationException, TypeError):  # no tensor in it that Lightning finds
        return len(batch) if hasattr(batch, "__len__") else 1
