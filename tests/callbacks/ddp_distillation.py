"""Run by a test in two processes: distillation under DDP, of a module that each process builds with other weights."""

import sys
import warnings
from pathlib import Path

import torch

from lightning_qat import QATCallback
from lightning_qat.callbacks.step_checkpoint import StepCheckpoint
from tests.callbacks.test_distillation import Classifier, Distilled, classify
from tests.helpers import make_trainer

warnings.simplefilter("ignore")


def main() -> None:
    """Train on two ranks, then again from a checkpoint, and leave what each of them ended with."""
    folder = Path(sys.argv[1])
    for name, start in (("whole", None), ("resumed", folder / "step3.ckpt")):
        distillation = Distilled(save_teacher=True)
        saver = [StepCheckpoint(folder, [3])] if start is None else []
        trainer = make_trainer(
            QATCallback("w2", distillation=distillation),
            *saver,
            strategy="ddp",
            devices=2,
            max_steps=6,
            use_distributed_sampler=False,
        )
        task = Classifier(seed=10 + trainer.global_rank, ranks=2, calls_forward=name == "whole")
        trainer.fit(task, classify(), ckpt_path=start)
        weights = {key: weight.detach() for key, weight in task.net.named_parameters()}
        ended = {"weights": weights, "teacher": distillation.teacher_weights, "losses": task.losses}
        torch.save(ended, folder / f"{name}{trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
