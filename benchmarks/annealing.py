"""Annealed widths beside direct ones, at equal total steps, on the recipe that ``make demo`` trains.

From one float base for every seed: a float control, and for each width QAT direct, annealed over the first 35 % of the
steps, and annealed in equal shares, as the recipe does. The score is that of the last weights on the validation data.

Usage: python benchmarks/annealing.py [--steps 400] [--seeds 3] [--jobs 2] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import torch
from hydra import compose, initialize_config_module
from shared import append_run, publish, read_runs
from stories260k_arms import ANNEALED

from lightning_qat import QATCallback
from lightning_qat.cli.arms import ArmRunner, load_trained

WIDTHS = (4, 3, 2)
SHARES = {4: [8, 4], 3: [8, 4, 3], 2: [8, 4, 3, 2]}
CONTROL = "float control"
METHODS = ("direct", "annealed in 35 %", "annealed in equal shares")


def make_callback(method: str, bits: int) -> QATCallback:
    """Return the callback of an arm; grids are those of the recipe."""
    schedules = {"direct": None, "annealed in 35 %": ANNEALED[bits], "annealed in equal shares": SHARES[bits]}
    grid = "-nozero" if bits == 2 else ""
    return QATCallback(f"w{bits}g32{grid}-bf16", schedule=schedules[method])


def run_seed(seed: int, steps: int, out: Path) -> None:
    """Train all arms of a seed that are not there yet."""
    done = {(run["arm"], run["bits"]) for run in read_runs(out) if (run["seed"], run["steps"]) == (seed, steps)}
    arms = [(CONTROL, 32), *((method, bits) for bits in WIDTHS for method in METHODS)]
    if done >= set(arms):
        return
    with initialize_config_module("lightning_qat.conf", version_base="1.3"), tempfile.TemporaryDirectory() as folder:
        length, quiet = f"finetune.trainer.max_steps={steps}", "+trainer.enable_progress_bar=false"
        cfg = compose("train", ["recipe=tiny_lm", "logger=none", length, quiet])
        runner = ArmRunner(cfg, seed, Path(folder))
        base = runner.train("base", cfg.base)
        for arm, bits in arms:
            if (arm, bits) in done:
                continue
            callbacks = [] if arm == CONTROL else [make_callback(arm, bits)]
            trained = runner.train(f"{arm} {bits}", cfg.finetune, init_from=base.last, callbacks=callbacks)
            score = runner.score(load_trained(runner.make_task(), trained.last, callbacks))
            run = {"arm": arm, "bits": bits, "seed": seed, "steps": steps, "perplexity": score}
            append_run(out, run)


def report(out: Path, steps: int, seeds: int) -> None:
    """Print the table and write it beside the command."""
    runs = [run for run in read_runs(out) if run["steps"] == steps and run["seed"] < seeds]

    def cell(arm: str, bits: int) -> str:
        scores = [run["perplexity"] for run in runs if (run["arm"], run["bits"]) == (arm, bits)]
        return f"{mean(scores):.3f} ± {stdev(scores):.3f}" if len(scores) > 1 else f"{scores[0]:.3f}"

    lines = [
        "# Annealed or direct",
        "",
        f"`python benchmarks/annealing.py --steps {steps} --seeds {seeds}`. Perplexity per byte of recipe `tiny_lm`",
        f"after {steps} steps from one float base, last weights, mean ± standard deviation of {seeds} seeds; groups of",
        "32, the 2-bit grid without a zero, STE. Annealed in 35 %: 8, 4, 3, 2 bits down to the width, which then has",
        f"65 % of the steps; in equal shares: as long at each. Float control: {cell(CONTROL, 32)}.",
        "",
        f"| | {' | '.join(f'W{bits}' for bits in WIDTHS)} |",
        f"|---|{'---|' * len(WIDTHS)}",
        *(f"| {arm} | {' | '.join(cell(arm, bits) for bits in WIDTHS)} |" for arm in METHODS),
    ]
    publish(out, lines)


def main() -> None:
    """Train what is missing, one process a seed, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="seeds at a time, each with one thread")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "annealing")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.seed is not None:
        torch.set_num_threads(1)
        run_seed(arguments.seed, arguments.steps, arguments.out)
        return

    def run_in_process(seed: int) -> None:
        command = [sys.executable, __file__, "--seed", str(seed), "--steps", str(arguments.steps)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--out", str(arguments.out)], check=True, env=environment)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run_in_process, range(arguments.seeds)))
    report(arguments.out, arguments.steps, arguments.seeds)


if __name__ == "__main__":
    main()
