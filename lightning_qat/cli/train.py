"""``lightning-qat train``: fine-tune a recipe with the callbacks of its configuration."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from lightning_qat.cli.arms import ArmRunner, load_trained, read_seeds


@hydra.main(version_base="1.3", config_path="pkg://lightning_qat.conf", config_name="train")
def main(cfg: DictConfig) -> None:
    """Train the float base unless ``init_from`` names a checkpoint, then fine-tune and score the result."""
    for seed in read_seeds(cfg):
        train_seed(cfg, seed, Path(HydraConfig.get().runtime.output_dir))


def train_seed(cfg: DictConfig, seed: int, output_dir: Path) -> None:
    """Train one seed, and print its score and where the checkpoint is."""
    runner = ArmRunner(cfg, seed, output_dir)
    callbacks = list(runner.make_callbacks().values())
    base = Path(cfg.init_from) if cfg.init_from else runner.train("base", cfg.base).last
    trained = runner.train("qat", cfg.finetune, init_from=base, callbacks=callbacks)
    score = runner.score(load_trained(runner.make_task(), trained.last, callbacks))
    Console().print(f"seed {seed}: {cfg.metric.name} {score:.4f}\nCheckpoint: {trained.last}", soft_wrap=True)
