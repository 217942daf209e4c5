"""``lightning-qat plot``: table and figure of a results file."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from lightning_qat.tracking.report import report


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="plot")
def main(cfg: DictConfig) -> None:
    """Report ``cfg.results``."""
    results = Path(cfg.results)
    report(results, Path(cfg.figure) if cfg.figure else results.with_suffix(".png"), cfg.title)
