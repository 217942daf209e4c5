"""PTQCallback: the memory that a pass takes, measured on the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process can only be measured on Linux"
)


def measure(folder, num_rows, num_validations):
    root = Path(__file__).parents[2]
    # Large blocks go back to the system at once, so that the size of the process is what is in use.
    environment = {**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536"}
    arguments = [str(num_rows), str(num_validations), str(folder / "results.jsonl")]
    command = [sys.executable, "-m", "tests.callbacks.ptq_memory", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    before, peaks = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(before) == len(peaks) == num_validations
    return before, peaks


def test_a_pass_takes_one_copy_of_the_model_for_twelve_variants(tmp_path):
    size = 256 * MIB
    before, peaks = measure(tmp_path, num_rows=size // (4 * 64), num_validations=3)
    for smallest, largest in zip(before[1:], peaks[1:], strict=True):  # the first pass loads libraries, too
        assert 0.98 * size < largest - smallest < 1.1 * size


def test_nothing_grows_over_50_validations(tmp_path):
    before, peaks = measure(tmp_path, num_rows=10_000, num_validations=50)
    assert before[-1] - before[10] < 4 * MIB
    assert peaks[-1] - peaks[10] < 4 * MIB


def test_nothing_grows_over_1000_steps_of_training_with_everything(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.callbacks.long_run", str(tmp_path / "results.jsonl")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.strip().splitlines()[-1])
    print("MiB before each validation:", *(round(size / MIB, 1) for size in sizes))  # shown by pytest -rP
    assert len(sizes) == 50
    assert max(sizes[20:]) - sizes[20] < 2 * MIB  # the last rung is reached at the 38th
