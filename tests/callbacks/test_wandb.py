"""What WandbLogger gets from the callbacks, read back from the files that an offline run leaves."""

import base64
import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import wandb
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_qat import PTQCallback, QATCallback, quantized_weights
from lightning_qat.charts import REFERENCE, Point, quality_chart
from lightning_qat.records import read_records
from tests.helpers import StopAt, TinyTask, batch_at, make_trainer
from tests.wandb_file import WandbFile

FIT = {"max_steps": 8, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None}
SCALARS = ("qat/", "ptq/", "ptq_of_latent/", "gap_to_best_ptq/")


def fit(task, *callbacks, ckpt_path=None, **options):
    trainer = make_trainer(*callbacks, **{**FIT, "log_every_n_steps": 1, **options})
    trainer.fit(task, DataLoader(torch.zeros(8, 1)), DataLoader(torch.zeros(2, 1)), ckpt_path=ckpt_path)
    return trainer


class Task(TinyTask):
    """Its forward takes real batches for the calibration, and Lightning logs nothing of it itself."""

    def forward(self, x):
        return self.net(batch_at(5) if x.shape[-1] == 1 else x)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.loss(batch_at(10_000 + batch_idx)), logger=False)


@pytest.fixture(autouse=True)
def _no_run_left(monkeypatch, tmp_path):
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")  # which the logger sets, too, and leaves behind
    yield
    wandb.finish()


def make_qat(**options):
    return QATCallback("w2", schedule=[8, 2], **options)


def make_baseline(folder):
    """Fit in float with PTQCallback, and return its results file."""
    ptq = PTQCallback(("rtn", "gptq"), bits=(8, 2), results=folder / "float.jsonl")
    fit(Task(), ptq, default_root_dir=folder)
    return folder / "float.jsonl"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A fit with both callbacks and all loggers: folder, what was published, task, PTQCallback and the W&B file."""
    folder = tmp_path_factory.mktemp("wandb")
    loggers = [
        WandbLogger(offline=True, save_dir=folder / "w"),
        CSVLogger(folder / "csv", flush_logs_every_n_steps=1),
        TensorBoardLogger(folder / "tb"),
    ]
    (folder / "w").mkdir()
    ptq = PTQCallback(("rtn", "gptq"), bits=(8, 2), baseline=make_baseline(folder), results=folder / "results.jsonl")
    task = Task()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_MODE", "offline")
        for name in ("CACHE", "DATA", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(folder / name))
        published = watch_published(patch)
        fit(task, make_qat(log_codes=True), ptq, logger=loggers, default_root_dir=folder)
        wandb.finish()
    return folder, published, task, ptq, WandbFile(folder / "w")


def watch_published(patch):
    """Return a list that gets (step, figures) of all that the callbacks publish."""
    published = []
    for module in ("lightning_qat.callbacks.qat", "lightning_qat.callbacks.ptq"):
        real = sys.modules[module].publish

        def keep(trainer, figures, step, real=real):
            published.append((step, dict(figures)))
            real(trainer, figures, step)

        patch.setattr(f"{module}.publish", keep)
    return published


def series_of(published):
    found = {}
    for step, figures in published:
        for name, value in figures.items():
            found.setdefault(name, []).append((step, value))
    return found


def test_every_scalar_is_in_wandb_with_its_steps(finished):
    _, published, _, _, file = finished
    expected = series_of(published)
    assert {"qat/num_bits", "qat/sqnr_db", "gap_to_best_ptq/val/loss"} <= set(expected)
    assert {f"ptq_of_latent/{m}_w{b}/val/loss" for m in ("rtn", "gptq") for b in (8, 2)} <= set(expected)
    assert len(expected["qat/num_bits"]) == 8
    assert len(expected["gap_to_best_ptq/val/loss"]) == 4
    for name, series in expected.items():
        assert file.series(name) == series, name
    logged = {name for row in file.history for name in row}
    assert {name for name in logged if name.startswith(SCALARS)} == set(expected)


def test_scalars_are_what_the_records_say(finished):
    folder, _, _, _, file = finished
    for record in read_records(folder / "results.jsonl"):
        if record.method.startswith("ptq_of_latent"):
            series = file.series(f"{record.method}_w{record.num_bits:g}/{record.metric}")
            assert (record.step - 1, record.value) in series  # the step as Lightning counts


COLUMNS = ["method", "num_bits", "effective_bits", "model_bits", "val/loss", "step", "trained_with"]


def as_row(record):
    fields = [name if name != "val/loss" else "value" for name in COLUMNS]
    return [getattr(record, field) for field in fields]


def shown_at(step, ours, of_float):
    """The newest of our records until a step, and those of the float run at their steps and on their grids."""
    newest = {(each.method, each.num_bits): each for each in ours if each.step <= step}
    live = [each for each in ours if each.method == "qat" and each.step <= step]
    grids = {each.scheme: each.step for each in live}
    methods = [each for each in of_float if each.scheme in grids and each.step == grids[each.scheme]]
    steps = {each.step for each in (*newest.values(), *methods)}
    controls = [each for each in of_float if each.method == "float_control" and each.step in steps]
    return [*newest.values(), *methods, *controls]


def test_the_table_holds_the_records(finished):
    folder, *_, file = finished
    ours, of_float = read_records(folder / "results.jsonl"), read_records(folder / "float.jsonl")
    tables = [row for row in file.history if "quality_vs_bits_table/val/loss.path" in row]
    steps = sorted({record.step for record in ours})
    assert len(steps) == len(tables) == 4
    for step, row in zip(steps, tables, strict=True):
        table = file.table(row, "quality_vs_bits_table/val/loss")
        assert table["columns"] == COLUMNS
        expected = [as_row(record) for record in shown_at(step, ours, of_float)]
        assert sorted(map(str, table["data"])) == sorted(map(str, expected))
        assert row["trainer/global_step"] == step - 1  # as Lightning counts
    methods = {row[0]: row[-1] for row in table["data"]}
    assert methods["gptq"] == methods["float_control"] == "float"
    assert methods["qat"] == methods["ptq_of_latent/gptq"] == "qat"
    assert {row[1] for row in table["data"] if row[0] == "qat"} == {8, 2}  # both rungs


def test_the_chart_opens_by_itself(finished):
    *_, file = finished
    row = next(row for row in reversed(file.history) if "quality_vs_bits/val/loss_table.path" in row)
    points = file.table(row, "quality_vs_bits/val/loss_table")
    table = file.table(row, "quality_vs_bits_table/val/loss")
    assert points["columns"] == ["effective_bits", "val/loss", "method"]
    drawn = [[each[2], each[4], each[0]] for each in table["data"] if each[0] != "float_control"]
    assert [each for each in points["data"] if each[2] != "float_control"] == drawn
    controls = {each[5]: each[4] for each in table["data"] if each[0] == "float_control"}
    at_bits = {each[2]: each[5] for each in table["data"] if each[0] == "qat"}
    newest = {bits: max(each[5] for each in table["data"] if each[2] == bits) for bits in at_bits}
    line = {bits: value for bits, value, method in points["data"] if method == "float_control"}
    assert line == {bits: controls[newest[bits]] for bits in at_bits}
    panel = file.config["_wandb.visualize.quality_vs_bits/val/loss"]["panel_config"]
    assert panel["panelDefId"] == "wandb/line/v0"
    assert panel["fieldSettings"] == {"x": "effective_bits", "y": "val/loss", "stroke": "method"}
    (query,) = panel["userQuery"]["queryFields"]
    assert query["fields"][-1]["args"] == [{"name": "tableKey", "value": "quality_vs_bits/val/loss_table"}]


def test_the_configuration_says_what_the_run_is(finished):
    folder, *_, file = finished
    qat, ptq = (file.config["lightning_qat"][part] for part in ("qat", "ptq"))
    assert qat["rules"] == [{"target": "*", "scheme": "w2"}]
    assert qat["layers_by_scheme"] == {"w2": 2}
    assert qat["rungs"] == [[0, 8], [4, 2]]
    assert qat["total_steps"] == 8
    records = {record.num_bits: record for record in read_records(folder / "results.jsonl")}
    assert (qat["effective_bits"], qat["model_bits"]) == (records[2].effective_bits, records[2].model_bits)
    assert (qat["observer"], qat["estimator"]["name"]) == ({"name": "minmax"}, "ste")
    assert {name: method["name"] for name, method in ptq["methods"].items()} == {"rtn": "rtn", "gptq": "gptq"}
    assert ptq["bits"] == [8, 2]
    for pattern in ("qat/*", "ptq/*", "ptq_of_latent/*", "gap_to_best_ptq/*"):
        assert file.metrics[pattern] == "trainer/global_step"
    with open(next((folder / "csv").rglob("hparams.yaml"))) as text:
        assert yaml.safe_load(text)["lightning_qat"] == file.config["lightning_qat"]


def test_artifacts_hold_records_and_codes(finished):
    from safetensors import safe_open

    folder, _, task, _, file = finished
    (results,) = (each for each in file.artifacts if each.type == "results")
    (model,) = (each for each in file.artifacts if each.type == "quantized-model")
    (entry,) = results.manifest.contents
    assert entry.path == "results.jsonl"
    assert entry.digest == digest(folder / "results.jsonl")
    metadata = json.loads(results.metadata)
    last = read_records(folder / "results.jsonl")[-1]
    assert metadata["schemes"] == ["w2", "w8"]
    assert metadata["metrics"][f"{last.method}_w{last.num_bits:g}/val/loss"] == last.value
    (entry,) = model.manifest.contents
    assert entry.path == "codes.safetensors"
    assert entry.digest == digest(entry.local_path)
    metadata = json.loads(model.metadata)
    assert metadata["schemes"] == ["w2"]
    assert (last.num_bits, last.effective_bits) == (2, metadata["effective_bits"])
    assert metadata["metrics"]["val/loss"] == file_value(file, "qat", 2)
    codes = quantized_weights(task)
    with safe_open(entry.local_path, "pt") as stored:
        assert set(json.loads(stored.metadata()["schemes"])) == set(codes)
        assert set(stored.keys()) == {f"{name}.{part}" for name in codes for part in ("codes", "scale")}
        for name, weight in codes.items():
            assert torch.equal(stored.get_tensor(f"{name}.codes"), weight.codes)
            assert torch.equal(stored.get_tensor(f"{name}.scale"), weight.params.scale)


def digest(path):
    return base64.b64encode(hashlib.md5(Path(path).read_bytes()).digest()).decode()


def file_value(file, method, num_bits):
    row = next(row for row in reversed(file.history) if "quality_vs_bits_table/val/loss.path" in row)
    table = file.table(row, "quality_vs_bits_table/val/loss")
    return next(each[4] for each in table["data"] if each[:2] == [method, num_bits])


def test_csv_and_tensorboard_get_the_same_scalars(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, published, *_ = finished
    with open(next((folder / "csv").rglob("metrics.csv"))) as text:
        rows = list(csv.DictReader(text))
    events = EventAccumulator(str(next((folder / "tb").rglob("events.*"))))
    events.Reload()
    for name, series in series_of(published).items():
        assert [(int(row["step"]), float(row[name])) for row in rows if row[name]] == series, name
        found = [(each.step, each.value) for each in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in series], name
    assert "hp_metric" not in events.Tags()["scalars"]


# ------------------------------------------------------------------------------------------------- no trace, no harm


def final_state(task):
    return [*(parameter.detach().clone() for parameter in task.parameters()), torch.get_rng_state()]


def run(tmp_path, logger, task=None, **options):
    pl.seed_everything(4, verbose=False)
    task = task or Task()
    qat, ptq = make_qat(**options), PTQCallback("rtn", bits=(8, 2), results=tmp_path / "r.jsonl")
    trainer = fit(task, qat, ptq, logger=logger, default_root_dir=tmp_path)
    return final_state(task), trainer


def assert_equal(first, second):
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_training_is_the_same_with_wandb(tmp_path):
    without, _ = run(tmp_path / "without", False)
    found, _ = run(tmp_path / "with", WandbLogger(offline=True, save_dir=tmp_path), log_codes=True)
    assert_equal(found, without)


class Broken:
    """Stands for a run; whatever is asked of it fails."""

    def __getattr__(self, name):
        raise ConnectionError(f"no {name}")


class BrokenLogger(WandbLogger):
    """As W&B's logger, but whatever goes to the run fails."""

    def __init__(self, **options):
        super().__init__(offline=True, **options)
        self.failures = 0

    @property
    def experiment(self):
        self.failures += 1
        return Broken()


def test_a_failure_of_wandb_costs_one_warning(tmp_path):
    without, _ = run(tmp_path / "without", False)
    logger, table = BrokenLogger(save_dir=tmp_path), CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match=r"W&B failed, .* ConnectionError: no ") as caught:
        found, trainer = run(tmp_path / "with", [logger, table], log_codes=True)
    assert len([each for each in caught if "W&B" in str(each.message)]) == 1
    assert trainer.global_step == 8
    assert logger.failures > 12
    assert_equal(found, without)
    assert "qat/num_bits" in Path(table.log_dir, "metrics.csv").read_text().splitlines()[0]  # those after it go on


def test_failures_of_other_loggers_are_errors_as_ever(tmp_path):
    class BrokenTable(CSVLogger):
        def log_metrics(self, metrics, step=None):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, BrokenTable(tmp_path))


def test_a_disabled_wandb_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    wandb.teardown()  # it has read the environment already
    _, trainer = run(tmp_path, WandbLogger(save_dir=tmp_path), log_codes=True)
    wandb.teardown()
    assert trainer.global_step == 8
    assert not list(tmp_path.rglob("*.wandb"))


def test_a_run_of_the_user_and_a_prefix(tmp_path):
    with wandb.init(mode="offline", dir=tmp_path) as active:
        run(tmp_path, WandbLogger(experiment=active, prefix="arm"))
    file = WandbFile(tmp_path)
    assert file.metrics["arm-qat/*"] == "trainer/global_step"
    assert "_wandb.visualize.arm-quality_vs_bits/val/loss" in file.config
    assert len(file.series("arm-qat/num_bits")) == 8
    assert [each.type for each in file.artifacts if each.type != "run_table"] == ["results"]  # codes are not asked for


def test_with_sync_tensorboard_its_axis_stays():
    from lightning_qat.callbacks.wandb_runs import define_steps

    class Run:
        def define_metric(self, *_, **__):
            pytest.fail("an axis was set that this logger never logs")

    define_steps(WandbLogger(offline=True, sync_tensorboard=True), Run(), ["qat/*"])


LAZY = """
import sys
import lightning_qat, lightning_qat.charts
from lightning.pytorch.loggers import CSVLogger
from lightning_qat import PTQCallback, QATCallback
from tests.helpers import TinyTask, fit
fit(TinyTask(), QATCallback("w4"), logger=CSVLogger({folder!r}), max_steps=2, num_batches=4, log_every_n_steps=1)
sys.exit("W&B was imported" if "wandb" in sys.modules else 0)
"""


def test_without_its_logger_wandb_is_not_imported(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", LAZY.format(folder=str(tmp_path))], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


# -------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")  # its batches depend on the step alone
def test_the_chart_survives_a_resumed_run(tmp_path):
    def make(name):
        return make_qat(), PTQCallback("rtn", bits=(8, 2), results=tmp_path / f"{name}.jsonl")

    whole, first, second = make("whole"), make("halves"), make("halves")
    fit(Task(), *whole)
    with pytest.warns(UserWarning, match="Training stopped at optimizer step 4"):
        trainer = fit(Task(), *first, StopAt(4))
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    fit(Task(), *second, ckpt_path=tmp_path / "stopped.ckpt")
    expected, found = ([as_row(each) for each in callbacks[1]._chart.records] for callbacks in (whole, second))
    assert found == expected
    assert {row[1] for row in found if row[0] == "qat"} == {8, 2}


def test_the_reference_is_drawn_over_all_bits_and_what_diverged_is_not():
    points = [Point("qat", bits, value, 9) for bits, value in ((8.5, 1.0), (4.5, 2.0), (2.5, float("nan")))]
    chart = quality_chart([*points, Point("rtn", 4.5, 3.0, 5)], {9: 0.5, 5: 0.7}, "loss", "A title")
    assert chart.table.data == [
        *([bits, 0.5, REFERENCE] for bits in (2.5, 4.5, 8.5)),
        *([8.5, 1.0, "qat"], [4.5, 2.0, "qat"], [4.5, 3.0, "rtn"]),
    ]
    assert chart.spec.string_fields == {"title": "A title"}


def test_codes_are_refused_where_they_cannot_be_saved_and_missed_where_nobody_takes_them(monkeypatch):
    with pytest.raises(TypeError, match="log_codes='all' must be True or False"):
        QATCallback("w4", log_codes="all")
    with pytest.warns(UserWarning, match="log_codes=True has no effect without WandbLogger"):
        fit(TinyTask(), QATCallback("w4", log_codes=True), max_steps=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="log_codes=True needs safetensors"):
        QATCallback("w4", log_codes=True)


def test_codes_have_zero_points_where_the_scheme_has(tmp_path):
    from safetensors.torch import load_file

    from lightning_qat.callbacks.codes_artifact import save_codes

    model = nn.Sequential(nn.Linear(8, 4))
    QATCallback("w4-asym").prepare(model)
    from lightning_qat.nn import set_num_bits

    set_num_bits(model, 4, 4)
    save_codes(weights := quantized_weights(model), tmp_path / "codes.safetensors")
    stored = load_file(tmp_path / "codes.safetensors")
    assert torch.equal(stored["0.zero_point"], weights["0"].params.zero_point)
