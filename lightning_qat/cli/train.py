"""``lightning-qat train``: fine-tune a recipe with the callbacks of its configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lightning_qat.cli.app import run_app


def main(arguments: Sequence[str]) -> int:
    """Train the float base unless ``init_from`` names a checkpoint, then fine-tune and score the result."""
    return run_app(train, "train", arguments)


def train(cfg: DictConfig) -> float:
    """Train every seed, and return the mean of their scores: what a Hydra sweeper optimizes."""
    from lightning_qat.cli.arms import read_seeds

    output_dir = Path(HydraConfig.get().runtime.output_dir)
    scores = [train_seed(cfg, seed, output_dir) for seed in read_seeds(cfg)]
    return sum(scores) / len(scores)


def train_seed(cfg: DictConfig, seed: int, output_dir: Path) -> float:
    """Train one seed, add its record to ``results.jsonl``, and return its score."""
    from rich.console import Console

    from lightning_qat.cli.arms import ArmRunner, load_trained
    from lightning_qat.records import append_records

    runner = ArmRunner(cfg, seed)
    nodes, folder = dict(cfg.callbacks), output_dir / f"seed{seed}"
    callbacks = list(runner.make_callbacks(nodes).values())
    if cfg.init_from:
        base = Path(cfg.init_from)
    else:
        base = folder / "base" / runner.train("base", cfg.base, folder / "base", logs=False).last  # one run of W&B
    name = "qat" if "qat" in nodes else "float"
    trained = runner.train(name, cfg.finetune, folder / name, init_from=base, callbacks=callbacks)
    checkpoint = folder / name / trained.last
    task = load_trained(runner.make_task(), checkpoint, callbacks)
    record = runner.make_record(task, name, step=max(trained.checkpoints), seconds=trained.seconds)
    append_records(output_dir / "results.jsonl", record)
    Console().print(f"seed {seed}: {record.metric} {record.value:.4f}\nCheckpoint: {checkpoint}", soft_wrap=True)
    return record.value
