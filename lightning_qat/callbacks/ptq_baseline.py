"""How far QAT is ahead of the best quantization after training of a float run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_qat.records import EvalRecord, read_records


class Baseline:
    """Results of quantization after training of a float run.

    Args:
        path: JSON Lines file that ``PTQCallback`` wrote in a run without ``QATCallback``, or that
            ``lightning-qat compare`` wrote.

    Raises:
        ValueError: If it holds no such results.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._records: dict[tuple[str, float, int], list[EvalRecord]] = {}
        for record in read_records(path):
            if record.trained_with == "float" and record.num_bits <= 8:
                self._records.setdefault((record.metric, record.num_bits, record.step), []).append(record)
        if not self._records:
            raise ValueError(f"baseline={str(path)!r} holds no results of quantization after training of a float run.")

    def gaps(self, metrics: Mapping[str, float], num_bits: float, step: int) -> dict[str, float]:
        """Return the value of QAT minus that of the best method at the same width and step, by metric.

        Metrics, widths and steps that the baseline does not have are left out.
        """
        gaps = {}
        for metric, value in metrics.items():
            if records := self._records.get((metric, num_bits, step)):
                best = max if records[0].higher_is_better else min
                gaps[metric] = value - best(record.value for record in records)
        return gaps
