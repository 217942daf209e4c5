"""How far QAT is ahead of the best quantization after training of a float run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lightning_qat.callbacks.ptq_report import FLOAT, Score
from lightning_qat.records import EvalRecord, read_records


class Baseline:
    """Results of quantization after training of a float run.

    Args:
        path: JSON Lines file that ``PTQCallback`` wrote in a run without ``QATCallback``, or that
            ``lightning-qat compare`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no such results, or those of several runs.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"baseline={str(path)!r}: there is no such file.")
        self.path = path
        of_float = [record for record in read_records(path) if record.trained_with == "float"]
        self._records = [record for record in of_float if record.num_bits <= 8]
        self._controls = [record for record in of_float if record.method == FLOAT]
        if not self._records:
            raise ValueError(f"baseline={str(path)!r} holds no results of quantization after training of a float run.")
        self._check_one_run()

    def _check_one_run(self) -> None:
        values: dict[object, float] = {}
        for each in self._records:
            key = (each.method, each.scheme, each.metric, each.step, each.seed, each.limit_val_batches)
            if values.setdefault(key, each.value) != each.value:
                raise ValueError(
                    f"baseline={str(self.path)!r} holds different results of {each.method} at step {each.step} with "
                    f"seed {each.seed}: several runs wrote to it. Give the file of one run (PTQCallback(results=...))."
                )

    def gaps(
        self, score: Score, step: int, seed: int, mode_of: Callable[[str], str | None] = lambda metric: None
    ) -> dict[str, float]:
        """Return the metrics of QAT minus those of the best method on the same grid, at the same step.

        Records of the same seed are preferred. What the baseline does not have is left out.

        Args:
            score: The score of QAT.
            step: Optimizer steps.
            seed: Seed of the run.
            mode_of: Says whether a metric is better if smaller (``"min"``) or larger (``"max"``); None leaves that to
                the records.
        """
        gaps = {}
        for metric, value in score.metrics.items():
            records = self._matching(score, metric, step)
            records = [record for record in records if record.seed == seed] or records
            if records:
                mode = mode_of(metric) or ("max" if records[0].higher_is_better else "min")
                best = max if mode == "max" else min
                gaps[metric] = value - best(record.value for record in records)
        return gaps

    def _matching(self, score: Score, metric: str, step: int) -> list[EvalRecord]:
        wanted = (metric, score.num_bits, score.scheme, step, score.limit_val_batches)
        return [
            each
            for each in self._records
            if (each.metric, each.num_bits, each.scheme, each.step, each.limit_val_batches) == wanted
        ]

    def comparable(self, score: Score, step: int, seed: int) -> list[EvalRecord]:
        """Return what a score of QAT can be drawn beside: methods on its grid, and the control, at the same step.

        Of one seed: ``seed`` where there is such a record, else the first.

        Args:
            score: The score of QAT.
            step: Optimizer steps.
            seed: Seed of the run.
        """
        limit = score.limit_val_batches
        found = []
        for metric in score.metrics:
            records = self._matching(score, metric, step)
            wanted = (metric, step, limit)
            records += [each for each in self._controls if (each.metric, each.step, each.limit_val_batches) == wanted]
            seeds = {record.seed for record in records}
            chosen = seed if seed in seeds else min(seeds, default=seed)
            found += [record for record in records if record.seed == chosen]
        return found

    def explain_missing(self, score: Score, step: int) -> str:
        """Say what the baseline has in place of what QAT is to be compared with."""
        schemes = sorted({str(each.scheme) for each in self._records})
        steps = sorted({each.step for each in self._records})
        limits = sorted({str(each.limit_val_batches) for each in self._records})
        return (
            f"PTQCallback's baseline {str(self.path)!r} has no result of {score.scheme} at step {step} with "
            f"limit_val_batches={score.limit_val_batches}, so no gap is logged. It has {', '.join(schemes)} at steps "
            f"{', '.join(map(str, steps))} with limit_val_batches={', '.join(limits)}."
        )
