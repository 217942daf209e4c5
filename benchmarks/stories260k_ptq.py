"""Quantization after training of a real 0.26M-parameter Llama, beside llm-compressor's GPTQ on the same rows.

The model and its data are not part of the project: set LIGHTNING_QAT_DATA to the folder that holds
``stories260k/``. The peer needs a Python of its own (``pip install torch llmcompressor==0.14.0.1``).

Usage: python benchmarks/stories260k_ptq.py --peer-python PATH [--repeats 3] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from shared import data_folder, publish, table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_qat import quantize_model, restore_float
from lightning_qat.ptq import AWQ, GPTQ, RTN, IMatrix

NUM_ROWS, WINDOW = 256, 256
METHODS = {"rtn": RTN(), "imatrix": IMatrix(), "awq": AWQ(), "gptq (min-max)": GPTQ(search=None), "gptq": GPTQ()}
SEQUENTIAL = {f"{name}, sequential": METHODS[name] for name in ("imatrix", "awq", "gptq (min-max)", "gptq")}


def negative_log_likelihood(model: nn.Module, stream: Tensor) -> float:
    """Return nats per token of ``model`` on ``stream``, in windows."""
    rows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    with torch.no_grad():
        for batch in rows.split(32):
            logits = model(batch).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (len(rows) * (WINDOW - 1))


def sweep_and_score(
    model: nn.Module, batches: list, stream: Tensor, methods: dict, bits: tuple, scheme: str, sequential: bool = False
) -> dict:
    """Return the score of every method and width."""
    results = quantize_model(
        model, batches, methods=methods, bits=bits, scheme=scheme, sequential=sequential, progress=False
    )
    print(results.calibration)
    scores = {}
    for method, width in results.weights:
        twin = copy.deepcopy(model)
        results.apply(twin, method, width)
        restore_float(twin)
        scores[method, width] = negative_log_likelihood(twin, stream)
    for report in results.fallbacks():
        print(f"{report.method} kept round-to-nearest in {report.layer} at {report.num_bits:g} bits: {report.fallback}")
    return scores


def time_sweep(model: nn.Module, batches: list, stream: Tensor) -> tuple[float, float, float]:
    """Return the seconds of one sweep, of the same with all its results scored, and of one sequential GPTQ."""
    methods, bits = ("rtn", "awq", "gptq"), (8, 4, 3, 2)
    started = time.perf_counter()
    quantize_model(model, batches, methods=methods, bits=bits, scheme="w2", progress=False)
    alone = time.perf_counter() - started
    started = time.perf_counter()
    sweep_and_score(model, batches, stream, methods, bits, "w2")
    scored = time.perf_counter() - started
    started = time.perf_counter()
    quantize_model(model, batches, methods="gptq", bits=4, sequential=True, progress=False)
    return alone, scored, time.perf_counter() - started


def run_peer(python: str, folder: Path, bits: int) -> tuple[float, str, dict[str, Tensor]]:
    """Return seconds, version and weights of llm-compressor's GPTQ."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "weights.pt")
        script = Path(__file__).with_name("peer_llmcompressor.py")
        rows = folder / "generated_train.npy"
        command = [python, script, folder, rows, str(NUM_ROWS), str(bits), out]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
        if done.returncode:
            sys.exit(f"The peer failed:\n{done.stderr[-2000:]}")
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        return answer["seconds"], answer["version"], torch.load(out, weights_only=True)


def main() -> None:
    """Print every row, also those that lose, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="a Python that has llmcompressor; without it there are no peer rows")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each side, alternating")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "stories260k_ptq")
    arguments = parser.parse_args()
    folder = data_folder("stories260k")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = torch.from_numpy(np.load(folder / "generated_train.npy").astype(np.int64))[:NUM_ROWS]
    stream = torch.from_numpy(np.load(folder / "tinystories_dev.npy").astype(np.int64))
    batches = [{"input_ids": batch} for batch in rows.split(32)]
    reference = negative_log_likelihood(model, stream)

    scores = {}
    for scheme, bits in (("w2", (8, 4, 3, 2)), ("w2-nozero", (2,))):
        for methods in (METHODS, SEQUENTIAL):
            found = sweep_and_score(model, batches, stream, methods, bits, scheme, methods is SEQUENTIAL)
            scores.update({(method, "2 nozero" if len(bits) == 1 else f"{b:g}"): v for (method, b), v in found.items()})
    peer_seconds, our_seconds, peer_version = [], [], None
    if arguments.peer_python:
        for bits in (4, 3, 2):
            _, peer_version, weights = run_peer(arguments.peer_python, folder, bits)
            twin = copy.deepcopy(model)
            twin.load_state_dict(weights, strict=False)
            scores["gptq (llm-compressor)", f"{bits}"] = negative_log_likelihood(twin, stream)
        for _ in range(arguments.repeats):
            our_seconds.append(time_sweep(model, batches, stream))
            peer_seconds.append(run_peer(arguments.peer_python, folder, 4)[0])
    report(arguments.out, reference, scores, our_seconds, peer_seconds, peer_version)


def _median(pairs: list, index: int) -> float:
    return statistics.median(pair[index] for pair in pairs)


def report(out: Path, reference: float, scores: dict, ours: list, peers: list, peer_version: str | None) -> None:
    """Print the table and write it, with the conditions, beside the command."""
    widths = ["8", "4", "3", "2", "2 nozero"]
    lines = [
        "# Quantization after training of stories260k",
        "",
        "`python benchmarks/stories260k_ptq.py --peer-python ...`. NLL in nats per token on `tinystories_dev.npy` in",
        f"windows of {WINDOW}; weights only, symmetric, per output channel, head and embedding in float;",
        f"{NUM_ROWS} rows of `generated_train.npy` for calibration. Float: {reference:.4f}. Nothing in it is random.",
        "",
        *table(scores, widths, 4),
    ]
    if peers:
        lines += [
            "",
            f"Wall time, medians of {len(peers)} alternating runs: a sweep of rtn, awq and gptq at 8, 4, 3 and 2 bits",
            f"{_median(ours, 0):.1f} s, {_median(ours, 1):.1f} s with the scoring of all 12; one sequential GPTQ at",
            f"4 bits {_median(ours, 2):.1f} s; one GPTQ of llm-compressor {peer_version}, which is sequential, at 4",
            f"bits {statistics.median(peers):.1f} s. The last two are not scored.",
        ]
    publish(out, lines)


if __name__ == "__main__":
    main()
