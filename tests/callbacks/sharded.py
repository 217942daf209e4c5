"""Run by a test in two processes: the same training under a strategy that copies the model, or one that spreads it."""

import json
import logging
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_qat import PTQCallback, QATCallback, prepare, quantized_weights
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from tests.matrix.models import WIDTH, Task, loaders

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
NUM_STEPS = 10

RUNS = {
    "observed": {"scheme": "w4g8", "schedule": [8, 4]},
    "learned": {"scheme": "w2", "schedule": [8, 4, 2], "scale_lr": 1e-2, "observer": "mse", "freeze_at": 0.9},
    "static inputs": {"scheme": "w4a8-static", "scale_lr": 1e-2, "activation_calibration_steps": 2},
}


class Numbered(Task):
    """Makes its own batches, so that a resumed run sees those of one that was never stopped."""

    def training_step(self, batch, batch_idx):
        number = 100 * self.global_rank + self.trainer.fit_loop.total_batch_idx
        x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))
        return super().training_step((x, x[:, :4].argmax(1)), batch_idx)


class Sharded(Numbered):
    """A model whose layers are spread over processes; prepared by hand, or by the callback."""

    by_hand = False

    def configure_model(self) -> None:
        if self.by_hand:
            prepare(self.model, "w2", observer="mse", learn_scales=True)
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def make_strategy(name: str, is_distributed_checkpoint: bool = True):
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=is_distributed_checkpoint,
        process_group_backend="gloo",
    )


def fit(strategy: str, arguments: dict, *callbacks: pl.Callback, by_hand=False, full=False, **kwargs):
    """Return Trainer and module."""
    task = (Numbered if strategy == "ddp" else Sharded)()
    task.by_hand = by_hand
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=make_strategy(strategy, not full),
        max_steps=kwargs.pop("max_steps", NUM_STEPS),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[QATCallback(**arguments), *callbacks],
    )
    trainer.fit(task, *loaders(), **kwargs)
    return trainer, task


def compare_with_ddp(folder: Path) -> dict:
    """Return losses of both strategies, and those of a sharded run that was resumed."""
    found = {}
    for name, arguments in RUNS.items():
        _, copied = fit("ddp", arguments)
        saver = StepCheckpoint(folder / name, [5])
        _, spread = fit("sharded", arguments, saver)
        _, resumed = fit("sharded", arguments, ckpt_path=saver.path(5))
        codes = {key: each.codes.tolist() for key, each in quantized_weights(spread).items()}
        expected = {key: each.codes.tolist() for key, each in quantized_weights(copied).items()}
        found[name] = {
            "ddp": copied.losses,
            "sharded": spread.losses,
            "resumed": resumed.losses,
            "codes": codes,
            "expected codes": expected,
        }
    _, by_hand = fit("sharded", RUNS["learned"], by_hand=True)
    found["by hand"] = {"ddp": found["learned"]["ddp"], "sharded": by_hand.losses}
    trainer, _ = fit("sharded", RUNS["learned"], full=True)
    trainer.save_checkpoint(folder / "full.ckpt")
    return found


def collect_refusals(folder: Path) -> dict:
    """Return what is said to each technique that needs the whole model."""
    found = {}
    for name, arguments in {
        "oscillation": {"scheme": "w4", "oscillation": True},
        "init": {"scheme": "w4", "scale_lr": 1e-3, "init": "imatrix"},
        "distillation": {"scheme": "w4", "distillation": True},
        "ptq": {"scheme": "w4"},
    }.items():
        further = [PTQCallback("rtn")] if name == "ptq" else []
        try:
            fit("sharded", arguments, *further)
        except ValueError as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {"compare": compare_with_ddp, "refuse": collect_refusals}[sys.argv[2]](folder)
    rank = torch.distributed.get_rank()
    (folder / f"{sys.argv[2]}{rank}.json").write_text(json.dumps(found))
