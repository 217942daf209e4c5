"""``lightning-qat train``: fine-tune a recipe with the callbacks of its configuration."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from lightning_qat.api import load_qat
from lightning_qat.cli.arms import ArmRunner


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Train the float base unless ``init_from`` names a checkpoint, then fine-tune and score the result."""
    runner = ArmRunner(cfg, cfg.seeds[0], Path(HydraConfig.get().runtime.output_dir))
    base = Path(cfg.init_from) if cfg.init_from else runner.train("base", cfg.base).last
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    trained = runner.train("qat", cfg.finetune, init_from=base, callbacks=callbacks)
    score = runner.score(load_qat(runner.make_task(), trained.last))
    Console().print(f"{cfg.metric.name}: {score:.4f}\nCheckpoint: {trained.last}", soft_wrap=True)
