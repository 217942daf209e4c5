"""Models that FSDP2 spreads over processes (ModelParallelStrategy): trained as under DDP, saved, resumed, refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_qat import load_qat, quantized_weights
from tests.matrix.models import Task

ROOT = Path(__file__).parents[2]


def run(folder, what):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.callbacks.sharded", str(folder), what]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{what}{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run(folder, "compare")


@pytest.mark.parametrize("name", ["observed", "learned", "static inputs", "by hand"])
def test_a_model_in_parts_trains_as_a_whole_one(compared, name):
    for found in compared[1]:
        assert found[name]["sharded"] == pytest.approx(found[name]["ddp"], rel=1e-4)


@pytest.mark.parametrize("name", ["observed", "learned", "static inputs"])
def test_all_processes_have_the_codes_that_ddp_has(compared, name):
    first, second = (found[name] for found in compared[1])
    assert first["codes"] == second["codes"]
    for layer, codes in first["codes"].items():
        same = torch.tensor(codes) == torch.tensor(first["expected codes"][layer])
        assert same.float().mean() > 0.99, layer  # sums in another order may round another way


@pytest.mark.parametrize("name", ["observed", "learned", "static inputs"])
def test_resuming_from_a_sharded_checkpoint_is_bit_exact(compared, name):
    for found in compared[1]:
        assert found[name]["resumed"] == found[name]["sharded"][5:]


def test_a_full_checkpoint_is_that_of_one_process(compared):
    folder, ranks = compared
    task = load_qat(Task(), folder / "full.ckpt")
    assert {name: each.codes.tolist() for name, each in quantized_weights(task).items()} == ranks[0]["learned"]["codes"]


def test_what_needs_the_whole_model_is_refused(tmp_path):
    for refusals in run(tmp_path, "refuse"):
        assert set(refusals) == {"oscillation", "init", "distillation", "ptq"}
        assert all("ModelParallelStrategy sp" in message for message in refusals.values()), refusals
