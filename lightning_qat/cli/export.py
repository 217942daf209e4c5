"""``lightning-qat export``: write what a run trained to files, and check that they hold it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from lightning_qat.cli.app import run_app
from lightning_qat.cli.explain import UsageError


def main(arguments: Sequence[str]) -> int:
    """Score the quantized model of a checkpoint, export it, load the export and score it again."""
    return run_app(export, "export", arguments)


def export(cfg: DictConfig) -> None:
    """Export ``cfg.checkpoint`` to ``cfg.path``.

    Raises:
        RuntimeError: If the exported model scores otherwise.
    """
    checkpoint, folder = Path(cfg.checkpoint), Path(cfg.path)
    if not checkpoint.is_file():
        raise UsageError(f"There is no checkpoint {checkpoint}.")
    from rich.console import Console

    import lightning_qat
    from lightning_qat.cli.arms import ArmRunner, load_trained, read_seeds

    runner = ArmRunner(cfg, read_seeds(cfg)[0])
    callbacks = runner.make_callbacks(cfg.callbacks)
    task = load_trained(runner.make_task(cfg.finetune), checkpoint, callbacks.values())
    score = runner.score(task)
    manifest = lightning_qat.export(task, folder, cfg.format, metrics={cfg.metric.name: score}, source=checkpoint)
    again = runner.score(lightning_qat.load_exported(runner.make_task(cfg.finetune), folder))
    if again != score:
        raise RuntimeError(f"{folder} scores {again}, the checkpoint {score}: do not deploy it, and report this.")
    Console().print(
        f"{folder}: {manifest['format']}, {manifest['bytes'] / 2**20:.3f} MiB, {manifest['stored_bits']:.2f} bits per "
        f"quantized weight, {cfg.metric.name} {score:.4f} before and after.",
        soft_wrap=True,
    )
