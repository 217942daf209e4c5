"""``lightning-qat plot``: table and figure of files of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from lightning_qat.cli.app import quote, run_app
from lightning_qat.cli.explain import UsageError


def main(arguments: Sequence[str]) -> int:
    """Report the files, which are given by name or as ``results=...``."""
    files = [each for each in arguments if "=" not in each and not each.startswith(("-", "+", "~"))]
    rest = [each for each in arguments if each not in files]
    quoted = ",".join(map(quote, files))
    return run_app(plot, "plot", [*rest, *([f"results=[{quoted}]"] if files else [])])


def plot(cfg: DictConfig) -> None:
    """Report ``cfg.results``."""
    results = [Path(each) for each in ([cfg.results] if isinstance(cfg.results, str) else cfg.results)]
    for path in results:
        if not path.is_file():
            raise UsageError(f"There is no file {path}. Give a file of records, such as results.jsonl.")
    from lightning_qat.tracking.report import report

    report(results, Path(cfg.figure) if cfg.figure else results[0].with_suffix(".png"), cfg.title)
