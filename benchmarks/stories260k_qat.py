"""Quantization-aware training of a real 0.26M-parameter Llama, beside torchao's, on data that the model generated.

Every arm trains for 300 steps of 16 rows with AdamW and a cosine, is tuned over the same three learning rates by its
loss on rows of the training file that are kept aside, and is then scored on real text with its last weights. The model
and its data are not part of the project: set LIGHTNING_QAT_DATA to the folder that holds ``stories260k/``.

Usage: python benchmarks/stories260k_qat.py [--suite main|ablation|report] [--jobs 2] [--out FOLDER]

Runs are appended to ``runs.jsonl`` in the folder; those that are there are not repeated, so the script can be stopped
and started again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from shared import carry_out, data_folder, publish, read_runs
from stories260k_arms import BEST, MAIN, TECHNIQUES, WITH, WITHOUT, ablation, arguments_of, names_of
from torch import Tensor, nn

STEPS, ROWS_PER_STEP, WINDOW, NUM_HELD, SEEDS = 300, 16, 256, 256, (0, 1, 2)
LEARNING_RATES = {4: (1e-4, 3e-4, 1e-3), 3: (5e-4, 1e-3, 2e-3), 2: (2e-3, 4e-3, 8e-3), 32: (1e-4, 3e-4, 1e-3)}
OWN_RATES = {("everything", 4): (3e-4, 1e-3, 3e-3)}  # as many, from where the others' best is too small
CONTROL, PEER = "float control", "torchao"
PEER_DISTILLED = "torchao, distilled"
BITS = (4, 3, 2)


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
        callbacks = [QATCallback(**arguments_of(run.arm, run.bits, run.lr))]
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
    return {**asdict(run), **scores, "seconds": round(seconds, 1), "techniques": names_of(run.arm, run.bits)}


def read(out: Path) -> dict[Run, dict[str, Any]]:
    """Return the runs that are there, those of an arm that has changed since left out."""
    runs = {Run(*(run[field] for field in ("arm", "bits", "lr", "seed"))): run for run in read_runs(out)}
    return {run: line for run, line in runs.items() if line["techniques"] == names_of(run.arm, run.bits)}


def complete(runs: list[Run], out: Path, jobs: int) -> None:
    """Do the runs that are not there yet."""
    done = read(out)
    carry_out(__file__, [asdict(run) for run in runs if run not in done], out, jobs)


def rates(arm: str, bits: int) -> tuple[float, ...]:
    """Return the learning rates among which one is chosen for an arm."""
    return OWN_RATES.get((arm, bits), LEARNING_RATES[bits])


def choose(arm: str, bits: int, done: dict[Run, dict[str, Any]]) -> float:
    """Return the learning rate with the least loss on the rows kept aside, for the first seed."""
    return min(rates(arm, bits), key=lambda lr: float(done[Run(arm, bits, lr, SEEDS[0])]["held"]))


def conduct(arms: list[tuple[str, int]], out: Path, jobs: int) -> None:
    """Tune every arm with the first seed, then train it with the others."""
    complete([Run(*arm, lr, SEEDS[0]) for arm in arms for lr in rates(*arm)], out, jobs)
    done = read(out)
    complete([Run(*arm, choose(*arm, done), seed) for arm in arms for seed in SEEDS], out, jobs)


def conduct_ablation(seeds: int, out: Path, jobs: int) -> None:
    """Train the arms of the ablation with the learning rates of those that they differ from."""
    done = read(out)
    runs = [
        Run(arm, bits, choose(base, bits, done), seed)
        for seed in SEEDS[:seeds]
        for bits in BITS
        for arm, base in ablation(bits)
    ]
    complete(runs, out, jobs)


def scores_of(arm: str, bits: int, done: dict[Run, dict[str, Any]], lr: float | None = None) -> list[float]:
    """Return the scores of the seeds that are there, at the chosen learning rate or another."""
    lr = choose(arm, bits, done) if lr is None else lr
    runs = [Run(arm, bits, lr, seed) for seed in SEEDS]
    return [float(done[run]["dev"]) for run in runs if run in done]


def report(out: Path) -> None:
    """Print the tables and write them, with the conditions, beside the command."""
    done = read(out)
    lines = [
        "# Quantization-aware training of stories260k",
        "",
        "`python benchmarks/stories260k_qat.py`. NLL in nats per token on `tinystories_dev.npy` in windows of 256,",
        f"mean ± standard deviation of {len(SEEDS)} seeds, or the first seed alone where there is no ±; weights only,",
        f"symmetric, per output channel, head and embedding in float; {STEPS} steps of {ROWS_PER_STEP} rows of",
        f"`generated_train.npy`, of which {NUM_HELD} are kept aside to choose one of three learning rates for every",
        "arm. In brackets: the gap to the float control, as a share of torchao's.",
        "",
        *report_main(done),
        *report_ablation(done),
    ]
    publish(out, lines)


def report_main(done: dict[Run, dict[str, Any]]) -> list[str]:
    """Return the lines of the comparison with the peer."""
    control = scores_of(CONTROL, 32, done)
    lines = [
        f"Float control, as long trained: {show(control)} at learning rate {choose(CONTROL, 32, done):g}.",
        "",
        f"| arm | {' | '.join(f'W{bits}' for bits in BITS)} |",
        f"|---|{'---|' * len(BITS)}",
    ]
    for arm in (PEER, PEER_DISTILLED, *MAIN):
        cells = []
        for bits in BITS:
            scores = scores_of(arm, bits, done)
            gap = (mean(scores) - mean(control)) / (mean(scores_of(PEER, bits, done)) - mean(control))
            cells.append(f"{show(scores)} ({gap:.2f}), lr {choose(arm, bits, done):g}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    sets = "; ".join(f"W{bits}: {', '.join(names)}" for bits, names in BEST.items())
    return [*lines, "", f"LSQ: {', '.join(names_of('LSQ', 4))}. Everything: {sets}.", ""]


def report_ablation(done: dict[Run, dict[str, Any]]) -> list[str]:
    """Return the lines of the ablation, as far as it is done."""
    if not any(run.arm.startswith((WITH, WITHOUT)) for run in done):
        return []
    lines = [
        "## Each technique",
        "",
        "`python benchmarks/stories260k_qat.py --suite ablation`. What a technique changes, in thousandths of a nat",
        "(less is better), at the learning rate of the arm that it is compared with: alone (added to STE), and in the",
        "set called everything (added to it, or, where it is marked *, part of it: what leaving it out changes, with",
        "the sign turned). ± is the standard deviation over seeds, in brackets their number.",
        "",
        f"| technique | {' | '.join(f'W{bits} alone | W{bits} in everything' for bits in BITS)} |",
        f"|---|{'---|---|' * len(BITS)}",
    ]
    for name in TECHNIQUES:
        cells = []
        for bits in BITS:
            pairs = [pair for pair in ablation(bits) if pair[0].endswith(name)]
            cells += [change(*pair, bits, done) for pair in pairs] or ["", ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def change(arm: str, base: str, bits: int, done: dict[Run, dict[str, Any]]) -> str:
    """Return what a technique changes, seed by seed."""
    lr, is_part = choose(base, bits, done), arm.startswith(WITHOUT)
    pairs = [(Run(arm, bits, lr, seed), Run(base, bits, lr, seed)) for seed in SEEDS]
    changes = [1000 * float(done[one]["dev"] - done[other]["dev"]) for one, other in pairs if {one, other} <= set(done)]
    if not changes:
        return ""
    sign = -1 if is_part else 1
    spread = f" ± {stdev(changes):.0f}" if len(changes) > 1 else ""
    return f"{sign * mean(changes):+.0f}{spread} ({len(changes)}){' *' * is_part}"


def show(scores: list[float]) -> str:
    """Return mean and standard deviation."""
    return f"{mean(scores):.4f} ± {stdev(scores):.4f}" if len(scores) > 1 else f"{scores[0]:.4f}"


def main() -> None:
    """Do what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=("main", "ablation", "report"), default="main")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each with one thread")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many seeds the ablation has")
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
    if arguments.suite == "main":
        arms = [(arm, bits) for arm in (PEER, *reversed(MAIN), PEER_DISTILLED) for bits in BITS]
        conduct([(CONTROL, 32), *arms], arguments.out, arguments.jobs)
    if arguments.suite == "ablation":
        conduct_ablation(arguments.seeds, arguments.out, arguments.jobs)
    report(arguments.out)


if __name__ == "__main__":
    main()
