"""A run that is killed again and again ends as one that never was: to the bit, with every result once."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_qat.records import read_records
from tests.callbacks.test_checkpoints import assert_same

ROOT = Path(__file__).parents[2]


def start(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.killed", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


def outcomes(folder):
    """Return the values by what was scored; an entry that is there twice is an error."""
    records = read_records(folder / "results.jsonl")
    found = {(each.method, each.num_bits, each.metric, each.step): each.value for each in records}
    assert len(found) == len(records)
    return found


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_ends_as_one_that_is_not(num_kills, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    began = time.monotonic()
    finish(start(whole))
    longest = time.monotonic() - began
    source, num_killed = random.Random(num_kills), 0
    process = start(killed)  # killed after its first results and, most often, before its first checkpoint
    while not (killed / "results.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    for _ in range(num_kills):
        process = start(killed)
        while not (killed / "started").exists() and process.poll() is None:
            time.sleep(0.01)
        (killed / "started").unlink(missing_ok=True)
        time.sleep(source.uniform(0, longest / 12))
        process.kill()
        process.communicate()
        num_killed += process.returncode != 0
        if (killed / "final.pt").exists():
            break
    assert num_killed >= min(num_kills, 3)
    finish(start(killed))
    assert_same(*(torch.load(folder / "final.pt", weights_only=True) for folder in (whole, killed)))
    assert outcomes(killed) == outcomes(whole)
    lines = (killed / "results.jsonl").read_text().splitlines()
    assert all(json.loads(line) for line in lines)
    assert not list(killed.glob(".results.jsonl.*"))
