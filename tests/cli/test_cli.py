"""The command line as a user runs it: in a process of its own, in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_qat
from lightning_qat.records import read_records

ROOT = Path(__file__).parents[2]
SMALL = [
    "base.trainer.max_steps=6",
    "finetune.trainer.max_steps=8",
    "+task.model.dim=32",
    "+task.model.num_layers=1",
    "+data.stride=256",
    "+data.block_size=64",
    "+trainer.accelerator=cpu",
]


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "lightning_qat.cli.main", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    done = run("compare", "recipe=tiny_lm", "seeds=[0,1]", "hydra.run.dir=out", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_compare_scores_every_method_at_every_rung(comparison):
    folder, _ = comparison
    records = read_records(folder / "out" / "results.jsonl")
    expected = {("float_base", 32, 0)}
    for bits, step in ((8, 2), (4, 4), (3, 6), (2, 8)):
        expected |= {("float_control", 32, step)}
        expected |= {(method, bits, step) for method in ("rtn", "awq", "gptq", "qat")}
    for seed in (0, 1):
        scored = [record for record in records if record.seed == seed]
        assert {(record.method, record.num_bits, record.step) for record in scored} == expected
        assert len(scored) == len(expected)
    assert len({record.data_hash for record in records}) == 1
    assert all(record.metric == "perplexity" and record.value > 1 for record in records)
    two_bits = next(record for record in records if record.method == "qat" and record.num_bits == 2)
    assert two_bits.scheme == "w2g32-nozero-bf16"
    assert two_bits.effective_bits == 2.5


def test_compare_ends_with_table_figure_and_an_offline_run(comparison):
    folder, done = comparison
    for text in ("round to nearest", "effective", "recovery", "results.jsonl", "quality_vs_bits.png", "±"):
        assert text in done.stdout
    assert (folder / "out" / "quality_vs_bits.png").stat().st_size > 10_000
    runs = list((folder / "out" / "wandb").glob("offline-run-*"))
    assert len(runs) == 1  # all arms of all seeds in one
    assert list(runs[0].glob("files/media/table/*.json"))
    assert list(runs[0].glob("files/media/images/quality_vs_bits*.png"))


def test_plot_draws_from_the_file_alone(comparison):
    folder, _ = comparison
    done = run("plot", "results=out/results.jsonl", "figure=again.svg", "title=Again", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Again" in (folder / "again.svg").read_text()
    assert "round to nearest" in done.stdout


def test_train_leaves_a_checkpoint_and_can_start_from_one(tmp_path):
    done = run("train", "logger=none", "hydra.run.dir=out", "callbacks.qat.scheme=w4g32", *SMALL,
               "callbacks.qat.schedule=[8,4]", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "seed 0: perplexity " in done.stdout
    base = next(tmp_path.rglob("base/step6.ckpt"))
    again = run(
        "train",
        "logger=csv",
        "seeds=3",
        "hydra.run.dir=out2",
        f"init_from={base}",
        "+trainer.log_every_n_steps=2",
        *SMALL,
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert not list(tmp_path.glob("out2/**/base"))
    assert "seed 3: perplexity " in again.stdout
    assert list(tmp_path.glob("out2/**/metrics.csv"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compare", "recipe=tiny"], 1, "tiny_lm"),
        (["compare", "callbacks.qat.shceme=w4"], 1, "shceme"),
        (["train", "seed=3"], 1, "seed"),
        (["plot"], 1, "results"),
        (["trian"], 2, "There is no command 'trian'"),
    ],
)
def test_bad_calls_fail_and_say_why(arguments, code, message, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert message in done.stderr


@pytest.mark.parametrize("command", ["compare", "train"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["callbacks.qat.scheme=w4g"], "Cannot read the scheme"),
        (["+callbacks.qat.ignore=[heads]"], "ignore pattern 'heads' matches no module"),
        (["+callbacks.qat.freeze_at=0.5"], "before the last rung"),
        (["seeds=[1,1]"], "seeds=[1, 1] must be one or more different"),
    ],
)
def test_what_cannot_work_fails_before_any_training(command, overrides, message, tmp_path):
    done = run(command, "logger=none", *overrides, *SMALL, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "optimizer steps" not in done.stdout  # the heading of an arm


def test_version(tmp_path):
    assert run("--version", cwd=tmp_path).stdout == f"lightning-qat {lightning_qat.__version__}\n"


def test_plot_refuses_an_empty_file(tmp_path):
    (tmp_path / "none.jsonl").touch()
    done = run("plot", "results=none.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "none.jsonl holds no records" in done.stderr


def test_help_lists_the_commands(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("train", "compare", "plot"):
        assert command in done.stdout
    assert "callbacks" in run("compare", "--help", cwd=tmp_path).stdout
