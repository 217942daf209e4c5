"""The command line as a user runs it: in a process of its own, in an empty folder."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lightning_qat
from lightning_qat.records import read_records

ROOT = Path(__file__).parents[2]
SMALL = [
    "base.trainer.max_steps=6",
    "finetune.trainer.max_steps=8",
    "task.model.dim=32",
    "task.model.num_layers=1",
    "data.stride=256",
    "data.block_size=64",
    "trainer.accelerator=cpu",
]
ALL = ["compare", "recipe=tiny_lm", "seeds=[0,1]", "bits=[4,2]", "methods=[rtn,awq,gptq,qat,qat_annealed]", *SMALL]


def start(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "lightning_qat.cli.main", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def run(*arguments, cwd):
    process = start(*arguments, cwd=cwd)
    stdout, stderr = process.communicate(timeout=600)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def outcomes(path):
    """Return what was scored and how well, without times."""
    return [(r.method, r.scheme, r.num_bits, r.effective_bits, r.step, r.seed, r.value) for r in read_records(path)]


def finished(folder):
    """Return the arms that are done, with the time at which they were."""
    return {path.parent: path.stat().st_mtime_ns for path in folder.glob("arms/*/*/arm.json")}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    done = run(*ALL, "hydra.run.dir=out", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copy(folder / "out" / "results.jsonl", folder / "first.jsonl")
    return folder, done


def test_compare_scores_every_method_at_every_width(comparison):
    folder, _ = comparison
    records = read_records(folder / "first.jsonl")
    expected = {("float_base", 32, 0), ("float_control", 32, 4), ("float_control", 32, 8)}
    expected |= {(method, 4, 4) for method in ("rtn", "awq", "gptq", "qat_annealed")}  # its first rung
    expected |= {(method, bits, 8) for bits in (4, 2) for method in ("rtn", "awq", "gptq", "qat")}
    expected |= {("qat_annealed", 2, 8)}
    for seed in (0, 1):
        scored = [record for record in records if record.seed == seed]
        assert {(record.method, record.num_bits, record.step) for record in scored} == expected
        assert len(scored) == len(expected)
    assert len({record.data_hash for record in records}) == 1
    assert all(record.metric == "perplexity" and record.value > 1 for record in records)
    assert all(record.trained_with == ("qat" if "qat" in record.method else "float") for record in records)
    schemes = {(r.num_bits, r.scheme, r.effective_bits) for r in records if r.num_bits < 32}
    assert schemes == {(4, "w4g32-bf16", 4.5), (2, "w2g32-nozero-bf16", 2.5)}


def test_compare_ends_with_table_figure_and_offline_runs(comparison):
    folder, done = comparison
    for text in (
        "round to nearest",
        "effective",
        "recovery",
        "QAT, annealed",
        "results.jsonl",
        "quality_vs_bits.png",
        "±",
    ):
        assert text in done.stdout
    assert (folder / "out" / "quality_vs_bits.png").stat().st_size > 10_000
    (reported,) = (folder / "out" / "wandb").glob("offline-run-*")
    assert list(reported.glob("files/media/table/**/*.json"))
    assert list(reported.glob("files/media/images/quality_vs_bits*.png"))
    assert len(list((folder / "out").glob("arms/*/*/wandb/offline-run-*"))) == 2 * 5


def test_compare_again_repeats_nothing_and_takes_more_into_account(comparison):
    folder, _ = comparison
    before, arms = outcomes(folder / "out" / "results.jsonl"), finished(folder / "out")
    done = run(*ALL, "hydra.run.dir=out", "logger=none", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 of 8 arms are there already." in done.stdout
    assert outcomes(folder / "out" / "results.jsonl") == before
    fewer = [each.replace("rtn,awq", "imatrix").replace("[0,1]", "[1]") for each in ALL]
    done = run(*fewer, "hydra.run.dir=out", "logger=none", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    after = outcomes(folder / "out" / "results.jsonl")
    assert {each[0] for each in after} - {each[0] for each in before} == {"imatrix"}
    assert [each for each in after if each[0] != "imatrix"] == [
        each for each in before if each[5] == 1 and each[0] != "awq"
    ]
    assert finished(folder / "out") == arms


def test_a_finished_arm_is_not_taken_for_one_with_other_settings(comparison):
    folder, _ = comparison
    done = run(*ALL, "hydra.run.dir=out", "finetune.task.lr=0.1", cwd=folder)
    assert done.returncode == 2
    assert "was trained with other settings (task.lr: 0.001 -> 0.1)" in done.stderr


def test_compare_that_was_killed_goes_on_and_loses_nothing(comparison, tmp_path):
    folder, _ = comparison
    for target in ("control", "qat_w2"):  # within the control, and after an arm of QAT has begun
        process = start(*ALL, "hydra.run.dir=out", "logger=none", cwd=tmp_path)
        while not (tmp_path / "out" / "arms" / "seed0" / target / ".hydra").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        arms = finished(tmp_path / "out")
    assert len(arms) >= 3
    done = run(*ALL, "hydra.run.dir=out", "logger=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert arms.items() <= finished(tmp_path / "out").items()
    assert outcomes(tmp_path / "out" / "results.jsonl") == outcomes(folder / "first.jsonl")


def test_arms_run_on_another_launcher(comparison, tmp_path):
    folder, _ = comparison
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "logger=none", "hydra.run.dir=out"]
    done = run(*ALL, *parallel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert outcomes(tmp_path / "out" / "results.jsonl") == outcomes(folder / "first.jsonl")


def test_plot_draws_from_files_alone(comparison):
    folder, _ = comparison
    done = run("plot", "out/results.jsonl", "figure=again.svg", "title=Again", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Again" in (folder / "again.svg").read_text()
    assert "round to nearest" in done.stdout


def test_train_leaves_a_checkpoint_and_can_start_from_one(tmp_path):
    done = run("train", "logger=none", "hydra.run.dir=out", "callbacks.qat.scheme=w4g32", *SMALL,
               "callbacks.qat.freeze_at=0.8", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "seed 0: perplexity " in done.stdout
    base = tmp_path / "out" / "seed0" / "base" / "step6.ckpt"
    (record,) = read_records(tmp_path / "out" / "results.jsonl")
    assert (record.method, record.scheme, record.step) == ("qat", "w4g32", 8)
    options = ["logger=csv", "seeds=3", f"init_from={base}", "trainer.log_every_n_steps=2", *SMALL]
    again = run("train", "hydra.run.dir=out2", *options, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert not list(tmp_path.glob("out2/**/base"))
    assert "seed 3: perplexity " in again.stdout
    assert list(tmp_path.glob("out2/**/metrics.csv"))


def test_sweep_trains_every_combination_and_ends_with_a_table(tmp_path):
    done = run("sweep", "callbacks.qat.scheme=w8,w2", "logger=none", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    table = done.stdout[done.stdout.index("Sweep of tiny_lm") :]
    assert table.index("callbacks.qat.scheme=w8") < table.index("callbacks.qat.scheme=w2")  # the better one first
    assert "task.model.dim" not in table  # common to all
    found = [read_records(path)[0].scheme for path in sorted(tmp_path.glob("outputs/sweep/tiny_lm/*/*/results.jsonl"))]
    assert found == ["w8", "w2"]


@pytest.mark.parametrize("command", ["compare", "train"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["callbacks.qat.scheme=w4g"], "Cannot read the scheme"),
        (["callbacks.qat.ignore=[heads]"], "ignore pattern 'heads' matches no module"),
        (["seeds=[1,1]"], "seeds=[1, 1] must be one or more different"),
        (["callbacks=[ptq]"], "callbacks"),
    ],
)
def test_what_cannot_work_fails_before_any_training(command, overrides, message, tmp_path):
    done = run(command, "logger=none", *overrides, *SMALL, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "optimizer steps" not in done.stdout  # the heading of an arm


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["bits=[4,1]"], "bits=1 is less than the 2 bits of callbacks.qat.scheme"),
        (["methods=[rtn,gptk]"], "There is no method 'gptk'. Did you mean 'gptq'?"),
        (["methods=[qat_annealed]", "callbacks.qat.freeze_at=0.5"], "before the last rung"),
        (["metric.key=val/loss"], "metric.key=val/loss is not among what validation logs: ['val/perplexity']"),
    ],
)
def test_what_cannot_be_compared_is_refused(overrides, message, tmp_path):
    done = run("compare", "logger=none", *overrides, *SMALL, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_version(tmp_path):
    assert run("--version", cwd=tmp_path).stdout == f"lightning-qat {lightning_qat.__version__}\n"


def test_plot_refuses_an_empty_file(tmp_path):
    (tmp_path / "none.jsonl").touch()
    done = run("plot", "none.jsonl", cwd=tmp_path)
    assert done.returncode == 1
    assert "none.jsonl holds no records" in done.stderr


def test_help_lists_the_commands(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("train", "compare", "sweep", "export", "plot"):
        assert command in done.stdout
        assert run(command, "--help", cwd=tmp_path).returncode == 0


def test_the_command_lines_in_the_readme_run(tmp_path):
    section = (ROOT / "README.md").read_text().partition("## Command line")[2]
    lines = section.split("```")[1].strip().splitlines()
    assert len(lines) == 5
    for line in lines:
        program, *arguments = shlex.split(line.replace("step400", "step8"))
        assert program == "lightning-qat"
        done = run(*arguments, *(SMALL if arguments[0] != "plot" else []), cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
    assert "before and after" in done.stdout
    assert json.loads((tmp_path / "deployed" / "manifest.json").read_text())["schemes"] == {"w4g32-bf16": 7}
