"""Quantization-aware training of a real 0.26M-parameter Llama, beside torchao's, on data that the model generated.

Every arm trains for 300 steps of 16 rows with AdamW and a cosine, is tuned over the same three learning rates by its
loss on rows of the training file that are kept aside, and is then scored on real text with its last weights. The model
and its data are not part of the project: set LIGHTNING_QAT_DATA to the folder that holds ``stories260k/``.

Usage: python benchmarks/stories260k_qat.py [--suite main|ablation] [--jobs 2] [--out FOLDER]

Runs are appended to ``runs.jsonl`` in the folder; those that are there are not repeated, so the script can be stopped
and started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from shared import data_folder, publish
from torch import Tensor, nn

STEPS, ROWS_PER_STEP, WINDOW, NUM_HELD, SEEDS = 300, 16, 256, 256, (0, 1, 2)
LEARNING_RATES = {4: (5e-4, 1e-3, 2e-3), 3: (1e-3, 2e-3, 4e-3), 2: (2e-3, 4e-3, 8e-3), 32: (1e-4, 3e-4, 1e-3)}
CONTROL, PEER = "float control", "torchao"
PEER_DISTILLED = "torchao, distilled"
BITS = (4, 3, 2)


def best(bits: int, lr: float) -> dict[str, Any]:
    """Return the arguments of QATCallback with all that pays at a width."""
    scheme = "w2-nozero" if bits == 2 else f"w{bits}"
    return {"scheme": scheme, "observer": "mse", "scale_lr": lr, "distillation": True}


ARMS = {
    "STE": lambda bits, lr: {"scheme": f"w{bits}"},
    "LSQ": lambda bits, lr: {"scheme": f"w{bits}", "observer": "mse", "scale_lr": lr},
    "everything": best,
}
"""Arguments of QATCallback by arm, width and learning rate."""

ABLATION: dict[str, Any] = {}


@dataclass(frozen=True)
class Run:
    """One training run."""

    arm: str
    bits: int
    lr: float
    seed: int


class Logits(nn.Module):
    """The logits of a Hugging Face model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[B, T, V]``."""
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


def load(folder: Path) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Return model, training rows, rows kept aside, and the stream to score on in windows."""
    from transformers import AutoModelForCausalLM

    model = Logits(AutoModelForCausalLM.from_pretrained(folder))
    rows = torch.from_numpy(np.load(folder / "generated_train.npy").astype(np.int64))
    stream = torch.from_numpy(np.load(folder / "tinystories_dev.npy").astype(np.int64))
    return model, rows[:-NUM_HELD], rows[-NUM_HELD:], stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def negative_log_likelihood(model: nn.Module, rows: Tensor) -> float:
    """Return nats per token."""
    losses = [
        F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        for batch in rows.split(32)
    ]
    return sum(losses) / (len(rows) * (rows.shape[1] - 1))


def prepare_peer(model: nn.Module, bits: int) -> None:
    """Put torchao's fake quantization into the linear layers of ``model``, the head excepted."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    dtype = getattr(torch, f"int{bits}")
    config = QATConfig(weight_config=IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True), step="prepare")
    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and not name.endswith("lm_head"))


def train(run: Run, folder: Path) -> dict[str, Any]:
    """Return the scores of one run."""
    import copy

    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from lightning_qat import QATCallback
    from lightning_qat.tasks import CausalLMTask

    class Distilled(CausalLMTask):
        """The peer's task with KL to the float model in place of the cross-entropy, as ``distillation=True``."""

        teacher: list[nn.Module]

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            student = F.log_softmax(self(batch[:, :-1]).flatten(0, 1), -1)
            with torch.no_grad():
                teacher = F.log_softmax(self.teacher[0](batch[:, :-1]).flatten(0, 1), -1)
            return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    pl.seed_everything(run.seed, verbose=False)
    model, rows, held, stream = load(folder)
    kind = Distilled if run.arm == PEER_DISTILLED else CausalLMTask
    task = kind(model, lr=run.lr, weight_decay=0.0, warmup_steps=STEPS // 20, final_lr_fraction=0.0)
    if kind is Distilled:
        task.teacher = [copy.deepcopy(model).eval().requires_grad_(False)]  # in a list: no part of the task
    callbacks = []
    if run.arm in (PEER, PEER_DISTILLED):
        prepare_peer(model, run.bits)
    elif run.arm != CONTROL:
        callbacks = [QATCallback(**{**ARMS, **ABLATION}[run.arm](run.bits, run.lr))]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(task, DataLoader(rows, ROWS_PER_STEP, shuffle=True, drop_last=True))
    seconds = time.perf_counter() - started
    task.eval()
    scores = {"held": negative_log_likelihood(task, held), "dev": negative_log_likelihood(task, stream)}
    return {**asdict(run), **scores, "seconds": round(seconds, 1)}


def run_in_process(run: Run, out: Path) -> None:
    """Train in a process with one thread, and append what it prints to the results."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--run", json.dumps(asdict(run))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{run} failed:\n{done.stderr[-3000:]}")
    with (out / "runs.jsonl").open("a") as file:
        file.write(done.stdout.strip().splitlines()[-1] + "\n")
    print(done.stdout.strip().splitlines()[-1], flush=True)


def read(out: Path) -> dict[Run, dict[str, Any]]:
    """Return the runs that are there."""
    path = out / "runs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {Run(*(line[field] for field in ("arm", "bits", "lr", "seed"))): line for line in lines}


def carry_out(runs: list[Run], out: Path, jobs: int) -> None:
    """Do the runs that are not there yet."""
    missing = [run for run in runs if run not in read(out)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: run_in_process(run, out), missing))


def choose(arm: str, bits: int, done: dict[Run, dict[str, Any]]) -> float:
    """Return the learning rate with the least loss on the rows kept aside, for the first seed."""
    return min(LEARNING_RATES[bits], key=lambda lr: float(done[Run(arm, bits, lr, SEEDS[0])]["held"]))


def conduct(arms: list[tuple[str, int]], out: Path, jobs: int) -> None:
    """Tune every arm with the first seed, then train it with the others."""
    carry_out([Run(*arm, lr, SEEDS[0]) for arm in arms for lr in LEARNING_RATES[arm[1]]], out, jobs)
    done = read(out)
    carry_out([Run(*arm, choose(*arm, done), seed) for arm in arms for seed in SEEDS], out, jobs)


def scores_of(arm: str, bits: int, done: dict[Run, dict[str, Any]]) -> tuple[float, list[float]]:
    """Return the chosen learning rate and the scores of all seeds."""
    lr = choose(arm, bits, done)
    return lr, [done[Run(arm, bits, lr, seed)]["dev"] for seed in SEEDS]


def report(arms: list[str], out: Path) -> None:
    """Print the table and write it, with the conditions, beside the command."""
    done = read(out)
    control_lr, control = scores_of(CONTROL, 32, done)
    lines = [
        "# Quantization-aware training of stories260k",
        "",
        "`python benchmarks/stories260k_qat.py`. NLL in nats per token on `tinystories_dev.npy` in windows of 256,",
        f"mean ± standard deviation of {len(SEEDS)} seeds; weights only, symmetric, per output channel, head and",
        f"embedding in float; {STEPS} steps of {ROWS_PER_STEP} rows of `generated_train.npy`, of which {NUM_HELD} rows",
        "are kept aside to choose one of three learning rates for every arm. In brackets: the gap to the float",
        "control, as a share of torchao's.",
        "",
        f"Float control, as long trained: {show(control)} at {control_lr:g}.",
        "",
        f"| arm | {' | '.join(f'W{bits}' for bits in BITS)} |",
        f"|---|{'---|' * len(BITS)}",
    ]
    for arm in arms:
        cells = []
        for bits in BITS:
            lr, scores = scores_of(arm, bits, done)
            gap = (mean(scores) - mean(control)) / (mean(scores_of(PEER, bits, done)[1]) - mean(control))
            cells.append(f"{show(scores)} ({gap:.2f}), lr {lr:g}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    publish(out, lines)


def show(scores: list[float]) -> str:
    """Return mean and standard deviation."""
    return f"{mean(scores):.4f} ± {stdev(scores):.4f}"


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each with one thread")
    parser.add_argument("--arms", help="only these arms, separated by commas, and no report")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stories260k_qat")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = data_folder("stories260k")
    if arguments.run:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        print(json.dumps(train(Run(**json.loads(arguments.run)), folder)))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    arms = [PEER, PEER_DISTILLED, *ARMS]
    chosen = arguments.arms.split(";") if arguments.arms else [CONTROL, *arms]
    conduct(
        [(arm, bits) for arm in chosen for bits in ((32,) if arm == CONTROL else BITS)], arguments.out, arguments.jobs
    )
    if not arguments.arms:
        report(arms, arguments.out)


if __name__ == "__main__":
    main()
